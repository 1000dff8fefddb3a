"""``FullyShardedDataParallel`` (FSDP1): experts are no part of its flat parameters."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

from lightning_eplb import _compat
from lightning_eplb.parallel.convert import expert_layers


def spread_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of converted modules that every rank has other rows of, by name: FSDP must ignore them."""
    return {
        f"{layer.name}.{name}": parameter
        for layer, module in expert_layers(model)
        if layer.groups.size > 1
        for name, parameter in module.named_parameters(recurse=False)
    }


def prepare_for_flattening(model: nn.Module, device: torch.device, compute_dtype: torch.dtype | None) -> None:
    """Do for the experts what FSDP does for all that it does not ignore. Before the optimizer is made.

    Args:
        model: Converted; FSDP is about to wrap it.
        device: Where experts are to be; they stay the same parameters.
        compute_dtype: What their weights are cast to in a forward, FSDP's ``MixedPrecision.param_dtype``; their
            gradients are accumulated in their own dtype. ``None``: they are not cast.

    Raises:
        ValueError: An expert has no memory (it is on the meta device), which FSDP would not give it.
    """
    for name, parameter in spread_parameters(model).items():
        if parameter.is_meta:
            raise ValueError(
                f"{name} is on the meta device, and FSDP gives no memory to parameters that it ignores; build the model"
                " on the CPU, or use lightning_eplb.ExpertParallelStrategy()"
            )
        parameter.data = parameter.data.to(device)
    for layer, _ in expert_layers(model):
        layer.compute_dtype = compute_dtype if layer.groups.size > 1 else None


def check_not_flattened(model: nn.Module) -> None:
    """Raise ``ValueError`` if FSDP took an expert into a flat parameter: a rank's experts are then cut once more."""
    for name, parameter in spread_parameters(model).items():
        if is_flattened(parameter):
            raise ValueError(
                f"{name} was sharded by FullyShardedDataParallel; let FSDPStrategy wrap the model, or wrap it with"
                " ignored_states=[parameter for _, experts in expert_layers(model) for parameter in"
                " experts.parameters(recurse=False)]"
            )


def is_flattened(parameter: nn.Parameter) -> bool:
    """Whether a parameter is part of a flat parameter, or one itself."""
    return _compat.is_flattened(parameter)


def shard_groups(model: nn.Module) -> Mapping[int, dist.ProcessGroup]:
    """Over which ranks FSDP has cut each parameter, by its ``id``; those that each rank has whole are not in it."""
    groups: dict[int, dist.ProcessGroup] = {}
    for wrapped in FullyShardedDataParallel.fsdp_modules(model):  # outer ones first
        for parameter in filter(is_flattened, wrapped.parameters()):
            groups.pop(id(parameter), None)
            if wrapped.sharding_strategy != ShardingStrategy.NO_SHARD:
                assert wrapped.process_group is not None
                groups[id(parameter)] = wrapped.process_group
    return groups
