"""Transfer of primaries between ranks as planned: weights, optimizer state and gradients that are still needed."""

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from lightning_eplb.parallel.dtensor import local_shard
from lightning_eplb.parallel.groups import ExpertGroups
from lightning_eplb.parallel.packing import Stack, bytes_of_row, max_rows_together
from lightning_eplb.parallel.row_exchange import Route, RowExchange
from lightning_eplb.relocation.optimizer_state import state_rows
from lightning_eplb.relocation.plan import LayerMoves

_Layout: TypeAlias = "tuple[torch.Size, torch.dtype, torch.device]"


def tensors_to_move(module: nn.Module, optimizers: Sequence[Optimizer], with_gradients: bool) -> list[Tensor]:
    """Return this rank's shard of every tensor with a row for each primary of a converted module, ``[n, ...]`` each."""
    _reshard(module)
    tensors: list[Tensor] = []
    for parameter in module.parameters(recurse=False):
        tensors += [parameter, *state_rows(optimizers, parameter)]
        if with_gradients and parameter.grad is not None:
            tensors.append(parameter.grad)
    return [local_shard(tensor) for tensor in tensors]


def gradients_to_move(module: nn.Module) -> list[Tensor]:
    """Return the gradients among the tensors of :func:`tensors_to_move`."""
    _reshard(module)
    return [local_shard(p.grad) for p in module.parameters(recurse=False) if p.grad is not None]


def route_of(layers: Sequence[LayerMoves], num_primaries: int, groups: ExpertGroups) -> Route:
    """Return this rank's route for several layers, whose rows are numbered through."""
    source_rank, target_rank = (
        np.concatenate(ranks) for ranks in ([m.source_rank for m in layers], [m.target_rank for m in layers])
    )
    source_row = np.concatenate([moves.source_row + i * num_primaries for i, moves in enumerate(layers)])
    target_row = np.concatenate([moves.target_row + i * num_primaries for i, moves in enumerate(layers)])
    return Route.of_moves(source_rank, source_row, target_rank, target_row, groups.rank, groups.size)


class LayerTransfer:
    """Transfer of several layers in the same collectives, since few large ones are faster.

    All ranks of ``group`` create it and call its methods alike. The tensors must not change from :meth:`send` until
    :meth:`commit`.

    Args:
        plan: Moves of the layers that wait. The transfer pops those that it takes.
        tensors_of: Returns a layer's tensors, see :func:`tensors_to_move`, with the same shapes and dtypes on every
            rank.
        groups: Process groups of the layers.
        group: Process group that the rows travel on.
        max_bytes: Bytes of the fullest rank from which on no further layer is taken. Defaults to no bound.
        overlaps_training: Training goes on meanwhile. Defaults to ``False``.
    """

    def __init__(
        self,
        plan: deque[LayerMoves],
        tensors_of: Callable[[int], Sequence[Tensor]],
        groups: ExpertGroups,
        group: dist.ProcessGroup,
        max_bytes: float = math.inf,
        overlaps_training: bool = False,
    ) -> None:
        self.moves: list[LayerMoves] = []
        """Moves of the layers that it took."""
        self.max_rank_bytes = 0
        """Bytes that the fullest rank sends or receives."""
        self.num_bytes = 0
        """Bytes that cross ranks, over all ranks of the EP group."""
        tensors_of_layers: list[Sequence[Tensor]] = []
        first_layout: list[_Layout] = []
        num_rows = row_bytes = 0
        while plan:
            tensors = tensors_of(plan[0].layer)
            layout = [(tensor.shape, tensor.dtype, tensor.device) for tensor in tensors]
            num_rows += plan[0].max_rows * len(tensors)
            if not self.moves:
                first_layout = layout
                row_bytes = bytes_of_row(tensors)
            elif self.max_rank_bytes >= max_bytes or num_rows > max_rows_together(tensors[0]) or layout != first_layout:
                break
            self.moves.append(plan.popleft())
            tensors_of_layers.append(tensors)
            self.max_rank_bytes += row_bytes * self.moves[-1].max_rows
            self.num_bytes += row_bytes * self.moves[-1].num_rows_between_ranks
        self._parts: list[tuple[list[Stack], RowExchange]] = []
        stacks = list(zip(*tensors_of_layers, strict=True))
        if stacks:
            route = route_of(self.moves, len(stacks[0][0]), groups)
            with torch.no_grad():
                self._parts = [
                    (part, RowExchange(part, route, group, overlaps_training=overlaps_training))
                    for part in _by_device(stacks)
                ]

    def send(self) -> None:
        """Send the rows."""
        with torch.no_grad():
            for _, rows in self._parts:
                rows.send()

    def drain(self) -> None:
        """Wait for the rows and drop them."""
        for _, rows in self._parts:
            rows.drain()

    def prepare_commit(self) -> None:
        """Prepare :meth:`commit` on the host, without waiting."""
        with torch.no_grad():
            for stacks, rows in self._parts:
                rows.prepare_write(stacks)

    def commit(self) -> None:
        """Wait for the rows and write them in place."""
        with torch.no_grad():
            for _, rows in self._parts:
                rows.write()


def relocate(plan: Sequence[LayerMoves], tensors_of: Callable[[int], Sequence[Tensor]], groups: ExpertGroups) -> int:
    """Move the rows of primaries, in place. All ranks of the EP group call it with the same plan.

    The first rows of some layers travel while the last rows of the layers before are written. So the buffers of two
    exchanges exist at a time.

    Args:
        plan: Moves, layer by layer.
        tensors_of: Returns a layer's tensors, see :class:`LayerTransfer`.
        groups: Process groups of the layers.

    Returns:
        Bytes that crossed ranks, over all ranks of the EP group.
    """
    assert groups.ep_group is not None
    num_bytes, waiting, previous = 0, deque(plan), None
    while waiting:
        transfer = LayerTransfer(waiting, tensors_of, groups, groups.ep_group)
        transfer.send()
        num_bytes += transfer.num_bytes
        if previous is not None:
            previous.commit()
        transfer.prepare_commit()
        previous = transfer
    if previous is not None:
        previous.commit()
    return num_bytes


def _by_device(stacks: Sequence[Stack]) -> list[list[Stack]]:
    """Split stacks by device. Optimizer state may be offloaded, and a collective takes tensors of one device."""
    devices = sorted({str(stack[0].device) for stack in stacks})
    return [[stack for stack in stacks if str(stack[0].device) == device] for device in devices]


def _reshard(module: nn.Module) -> None:
    if isinstance(module, FSDPModule):
        module.reshard()  # parameters unsharded for a forward would not see their shards change
