"""Parameters of experts under FSDP1 (``FullyShardedDataParallel``), which must not flatten them."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

from lightning_eplb import _compat
from lightning_eplb.parallel.parallelize import expert_layers


def spread_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the expert parameters whose rows differ between ranks, by name. FSDP must ignore them."""
    return {
        name: parameter
        for experts in expert_layers(model)
        if experts.layer.groups.size > 1
        for name, parameter in experts.parameters.items()
    }


def prepare_for_flattening(model: nn.Module, device: torch.device, compute_dtype: torch.dtype | None) -> None:
    """Move and cast experts, which FSDP ignores, as FSDP does all else. Call it before the optimizer is created.

    Args:
        model: Converted model that FSDP is about to wrap.
        device: Device to move experts to, in place.
        compute_dtype: Dtype that weights are cast to in forward passes, FSDP's ``MixedPrecision.param_dtype``.
            Gradients are accumulated in the parameters' own dtype. ``None`` casts nothing.

    Raises:
        ValueError: An expert is on the meta device, and FSDP does not materialize parameters that it ignores.
    """
    for name, parameter in spread_parameters(model).items():
        if parameter.is_meta:
            raise ValueError(
                f"{name} is on the meta device, and FSDP does not materialize parameters that it ignores. Build the"
                " model on the CPU, or use lightning_eplb.ExpertParallelStrategy()."
            )
        parameter.data = parameter.data.to(device)
    for layer, _ in expert_layers(model):
        layer.set_compute_dtype(compute_dtype if layer.groups.size > 1 else None)


def check_not_flattened(model: nn.Module) -> None:
    """Raise ``ValueError`` if FSDP flattened an expert, since it would shard a rank's experts once more."""
    for name, parameter in spread_parameters(model).items():
        if is_flattened(parameter):
            raise ValueError(
                f"{name} was sharded by FullyShardedDataParallel. Let FSDPStrategy wrap the model, or wrap it with"
                " ignored_states=[parameter for _, experts in expert_layers(model) for parameter in"
                " experts.parameters(recurse=False)]"
            )


def is_flattened(parameter: nn.Parameter) -> bool:
    """Return ``True`` if a parameter is a flat parameter or part of one."""
    return _compat.is_flattened(parameter)


def shard_groups(model: nn.Module) -> Mapping[int, dist.ProcessGroup]:
    """Return the process groups that FSDP shards parameters over, by ``id`` of each sharded parameter."""
    groups: dict[int, dist.ProcessGroup] = {}
    for wrapped in FullyShardedDataParallel.fsdp_modules(model):  # outer ones first
        for parameter in filter(is_flattened, wrapped.parameters()):
            groups.pop(id(parameter), None)
            if wrapped.sharding_strategy != ShardingStrategy.NO_SHARD:
                assert wrapped.process_group is not None
                groups[id(parameter)] = wrapped.process_group
    return groups
