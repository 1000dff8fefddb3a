"""State dict of converted modules: that of the unmodified model, with all experts in logical order."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_eplb.parallel.barrier import monitored_barrier
from lightning_eplb.parallel.dtensor import as_distributed, local_shard, with_local
from lightning_eplb.parallel.expert_layer import ExpertLayer, pad_rows
from lightning_eplb.parallel.forward import ParallelExperts
from lightning_eplb.parallel.row_exchange import Route, exchange_rows, gather_rows


def install_state_dict_hooks(module: nn.Module) -> None:
    """Make ``module.state_dict()`` gather the rows of all ranks, and ``load_state_dict()`` keep this rank's.

    Deep copies inherit the hooks. Their rows stay when those of ``module`` move.
    """
    module.register_state_dict_post_hook(_gather)
    module.register_load_state_dict_pre_hook(_select_rows)


def _gather(module: nn.Module, state: dict[str, Any], prefix: str, local_metadata: dict[str, Any]) -> None:
    layer = _layer_of(module)
    if layer.index == 0:
        monitored_barrier(layer.groups, "state_dict() of a model gathers experts from all ranks")
    for name, parameter in module.named_parameters(recurse=False):
        state[prefix + name] = to_logical(parameter.detach(), layer)


def _select_rows(module: nn.Module, state: dict[str, Any], prefix: str, *args: Any) -> None:
    for name, _ in module.named_parameters(recurse=False):
        if (full := state.get(prefix + name)) is not None:
            state[prefix + name] = to_local(full, _layer_of(module), prefix + name)


def _layer_of(module: nn.Module) -> ExpertLayer:
    """Return the module's own state. A deep copy of a module has its own, too."""
    assert isinstance(module, ParallelExperts)
    return module.expert_layer


def to_logical(rows: Tensor, layer: ExpertLayer) -> Tensor:
    """Gather all experts' rows in logical order, ``[L, ...]``, on the CPU, from each rank's ``[n, ...]``. Collective.

    A DTensor stays a DTensor on its device, and rows to be saved in shards become one. Each rank then gets the rows
    that torch gives it of a tensor with ``L`` rows, and nothing is gathered.
    """
    assert layer.groups.ep_group is not None
    if isinstance(rows, DTensor):
        return _without_phantoms(_reordered(rows, layer, layer.row_order), layer)
    if layer.saves_shards:
        distributed = as_distributed(rows, layer.groups.ep_group)
        return _without_phantoms(_reordered(distributed, layer, layer.row_order), layer).cpu()
    return gather_rows(rows, layer.row_order, layer.num_logical_experts, layer.groups.ep_group)


def to_local(full: Tensor, layer: ExpertLayer, name: str) -> Tensor:
    """Select this rank's rows, ``[n, ...]``, of all experts', ``[L, ...]``. Reorder a DTensor to the placement.

    A DTensor is expected only if parameters are DTensors or saved in shards. It may have rows of phantom experts.

    Raises:
        ValueError: ``full`` does not have a row for each logical expert.
    """
    allowed = {layer.num_logical_experts} | ({len(layer.row_order)} if isinstance(full, DTensor) else set())
    if full.ndim == 0 or full.shape[0] not in allowed:
        raise ValueError(
            f"{name} has shape {list(full.shape)}; loading takes all {layer.num_logical_experts} experts in logical"
            " order, as state_dict() gives them"
        )
    if isinstance(full, DTensor):
        rows = _reordered(_with_phantoms(full, layer), layer, torch.argsort(layer.row_order))
        return local_shard(rows) if layer.saves_shards else rows
    full = torch.detach(full)  # reads Lightning's lazily loaded tensors, which indexing does not
    return layer.select_rows(full)


def _without_phantoms(rows: DTensor, layer: ExpertLayer) -> DTensor:
    """Cut a DTensor in logical order, ``[R*n, ...]``, to ``[L, ...]``. The last ranks have fewer rows."""
    if len(rows) == layer.num_logical_experts:
        return rows
    left = layer.num_logical_experts - layer.groups.rank * layer.num_primaries
    return with_local(rows, local_shard(rows)[: max(left, 0)], layer.num_logical_experts)


def _with_phantoms(full: DTensor, layer: ExpertLayer) -> DTensor:
    """Add rows of zeros to a DTensor in logical order, ``[L, ...]``, up to ``[R*n, ...]``."""
    if len(full) == len(layer.row_order):
        return full
    return with_local(full, pad_rows(local_shard(full), layer.num_primaries), len(layer.row_order))


def _reordered(rows: DTensor, layer: ExpertLayer, order: Tensor) -> DTensor:
    """Copy ``rows`` such that its row ``i`` becomes row ``order[i]``, or return it if that changes nothing."""
    groups, places = layer.groups, torch.arange(len(order))
    if torch.equal(order, places):
        return rows
    assert groups.ep_group is not None
    n = layer.num_primaries
    moves = (place.numpy() for place in (places // n, places % n, order // n, order % n))
    route = Route.of_moves(*moves, rank=groups.rank, size=groups.size)
    mine = local_shard(rows)
    sent = mine.to("cpu" if dist.get_backend(groups.ep_group) == "gloo" else "cuda")
    received = torch.empty_like(sent)
    exchange_rows([sent], [received], route, groups.ep_group)
    return with_local(rows, received.to(mine.device))
