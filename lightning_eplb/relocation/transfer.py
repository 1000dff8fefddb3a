"""Move primaries between ranks as planned: weights, optimizer state and, where they are still wanted, gradients."""

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
from lightning_eplb.parallel.packing import Stack, most_rows_together
from lightning_eplb.parallel.row_exchange import Route, RowsUnderway
from lightning_eplb.relocation.optimizer_state import state_rows
from lightning_eplb.relocation.plan import LayerMoves

_Kind: TypeAlias = "tuple[torch.Size, torch.dtype, torch.device]"


def tensors_to_move(module: nn.Module, optimizers: Sequence[Optimizer], with_gradients: bool) -> list[Tensor]:
    """What this rank holds of every tensor with a row for each primary of a converted module, ``[n, ...]`` each."""
    _reshard(module)
    tensors: list[Tensor] = []
    for parameter in module.parameters(recurse=False):
        tensors += [parameter, *state_rows(optimizers, parameter)]
        if with_gradients and parameter.grad is not None:
            tensors.append(parameter.grad)
    return [local_shard(tensor) for tensor in tensors]


def gradients_to_move(module: nn.Module) -> list[Tensor]:
    """The gradients among those tensors."""
    _reshard(module)
    return [local_shard(p.grad) for p in module.parameters(recurse=False) if p.grad is not None]


def route_of(layers: Sequence[LayerMoves], num_primaries: int, groups: ExpertGroups) -> Route:
    """How this rank's rows of these layers travel; each layer's are counted on from those of the one before it."""
    source_rank, target_rank = (
        np.concatenate(ranks) for ranks in ([m.source_rank for m in layers], [m.target_rank for m in layers])
    )
    source_row = np.concatenate([moves.source_row + i * num_primaries for i, moves in enumerate(layers)])
    target_row = np.concatenate([moves.target_row + i * num_primaries for i, moves in enumerate(layers)])
    return Route.of_moves(source_rank, source_row, target_rank, target_row, groups.rank, groups.size)


class LayersUnderway:
    """Layers whose primaries move together, in the same collectives: few large ones are faster.

    All ranks of ``group`` make it alike, and :meth:`send`. The tensors must stay as they are from then on until
    :meth:`put_in_place`.

    Args:
        plan: Layers that wait; those that this takes are taken off its head.
        tensors_of: Of a layer, its tensors as :func:`tensors_to_move` gives them: of the same shapes and dtypes on
            every rank.
        groups: Of the layers.
        group: What they travel on.
        most_bytes: No layer more is taken once the fullest rank sends or receives so many.
        is_behind: Training goes on meanwhile.
    """

    def __init__(
        self,
        plan: deque[LayerMoves],
        tensors_of: Callable[[int], Sequence[Tensor]],
        groups: ExpertGroups,
        group: dist.ProcessGroup,
        most_bytes: float = math.inf,
        is_behind: bool = False,
    ) -> None:
        self.moves: list[LayerMoves] = []
        """Of the layers that it took."""
        self.bytes_of_fullest = 0
        """What the rank sends or receives that does so most."""
        self.num_bytes = 0
        """What crosses ranks, over all ranks of the EP group."""
        tensors_of_layers: list[Sequence[Tensor]] = []
        kinds_of_first: list[_Kind] = []
        num_rows = row_bytes = 0
        while plan:
            tensors = tensors_of(plan[0].layer)
            kinds = [(tensor.shape, tensor.dtype, tensor.device) for tensor in tensors]
            num_rows += plan[0].most_rows * len(tensors)
            if not self.moves:
                kinds_of_first = kinds
                row_bytes = sum(math.prod(shape[1:]) * dtype.itemsize for shape, dtype, _ in kinds)
            elif (
                self.bytes_of_fullest >= most_bytes
                or num_rows > most_rows_together(tensors[0])
                or kinds != kinds_of_first
            ):
                break
            self.moves.append(plan.popleft())
            tensors_of_layers.append(tensors)
            self.bytes_of_fullest += row_bytes * self.moves[-1].most_rows
            self.num_bytes += row_bytes * self.moves[-1].num_rows_between_ranks
        self._parts: list[tuple[list[Stack], RowsUnderway]] = []
        stacks = list(zip(*tensors_of_layers, strict=True))
        if stacks:
            route = route_of(self.moves, len(stacks[0][0]), groups)
            with torch.no_grad():
                self._parts = [
                    (part, RowsUnderway(part, route, group, is_behind=is_behind)) for part in _by_device(stacks)
                ]

    def send(self) -> None:
        """Send the rows off."""
        with torch.no_grad():
            for _, rows in self._parts:
                rows.send()

    def aim(self) -> None:
        """Prepare what the host can of :meth:`put_in_place`; it waits for nothing."""
        with torch.no_grad():
            for stacks, rows in self._parts:
                rows.aim(stacks)

    def put_in_place(self) -> None:
        """Wait for the rows, and put them where :meth:`aim` was told."""
        with torch.no_grad():
            for _, rows in self._parts:
                rows.write()


def relocate(plan: Sequence[LayerMoves], tensors_of: Callable[[int], Sequence[Tensor]], groups: ExpertGroups) -> int:
    """Move the rows of primaries, in place. All ranks of the EP group call it with the same plan.

    While the last rows of some layers are put in place, the first of the next travel: the buffers of two exchanges are
    held.

    Args:
        plan: What moves, layer by layer.
        tensors_of: See :class:`LayersUnderway`.

    Returns:
        Bytes that crossed ranks, over all ranks of the EP group.
    """
    assert groups.ep_group is not None
    num_bytes, waiting, before = 0, deque(plan), None
    while waiting:
        underway = LayersUnderway(waiting, tensors_of, groups, groups.ep_group)
        underway.send()
        num_bytes += underway.num_bytes
        if before is not None:
            before.put_in_place()
        underway.aim()
        before = underway
    if before is not None:
        before.put_in_place()
    return num_bytes


def _by_device(stacks: Sequence[Stack]) -> list[list[Stack]]:
    """Optimizer state may lie elsewhere than weights (offloading); a collective takes tensors of one device."""
    devices = sorted({str(stack[0].device) for stack in stacks})
    return [[stack for stack in stacks if str(stack[0].device) == device] for device in devices]


def _reshard(module: nn.Module) -> None:
    if isinstance(module, FSDPModule):
        module.reshard()  # what was gathered for a forward would not see its shards change
