"""Move primaries between ranks as planned: weights, optimizer state and, where they are still wanted, gradients."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from lightning_eplb.parallel.groups import ExpertGroups
from lightning_eplb.parallel.rows import Route, RowsUnderway
from lightning_eplb.parallel.shards import local_shard
from lightning_eplb.relocation.optimizer import state_rows
from lightning_eplb.relocation.plan import LayerMoves


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


def parameters_of_autograd(module: nn.Module) -> list[nn.Parameter]:
    """The parameters whose gradients autograd accumulates: all, or none where FSDP reduces them."""
    return [] if isinstance(module, FSDPModule) else list(module.parameters(recurse=False))


def route_of(moves: LayerMoves, groups: ExpertGroups) -> Route:
    """How this rank's rows of a layer travel."""
    places = (moves.source_rank, moves.source_row, moves.target_rank, moves.target_row)
    return Route.of_moves(*places, rank=groups.rank, size=groups.size)


def by_device(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Optimizer state may lie elsewhere than weights (offloading); a collective takes tensors of one device."""
    devices = sorted({str(tensor.device) for tensor in tensors})
    return [[tensor for tensor in tensors if str(tensor.device) == device] for device in devices]


def relocate(plan: Sequence[LayerMoves], tensors_of: Callable[[int], Sequence[Tensor]], groups: ExpertGroups) -> int:
    """Move the rows of primaries, in place. All ranks of the EP group call it with the same plan.

    While a layer's last rows are put in place, the first of the next layer travel: the buffers of two layers are held.

    Args:
        plan: What moves, layer by layer.
        tensors_of: Of a layer, its tensors as ``tensors_to_move`` gives them: of the same shapes and dtypes on every
            rank.

    Returns:
        Bytes that crossed ranks, over all ranks of the EP group.
    """
    assert groups.exchange is not None
    num_bytes = 0
    sent: list[tuple[list[Tensor], RowsUnderway]] = []
    with torch.no_grad():
        for moves in plan:
            tensors, route = tensors_of(moves.layer), route_of(moves, groups)
            before, sent = sent, []
            for device_tensors in by_device(tensors):
                sent.append((device_tensors, RowsUnderway(device_tensors, route, groups.exchange)))
            for device_tensors, rows in before:
                rows.write(device_tensors)
            num_bytes += sum(t[0].numel() * t.element_size() for t in tensors) * moves.num_rows_between_ranks
        for device_tensors, rows in sent:
            rows.write(device_tensors)
    return num_bytes


def _reshard(module: nn.Module) -> None:
    if isinstance(module, FSDPModule):
        module.reshard()  # what was gathered for a forward would not see its shards change
