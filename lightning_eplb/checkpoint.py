"""Parameters and optimizer state are the unmodified model's: every row of an expert in logical order."""

import hashlib
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from lightning.fabric import is_wrapped
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lightning_eplb.agreement import check_same_on_all_ranks
from lightning_eplb.parallel.convert import expert_layers
from lightning_eplb.parallel.experts import ExpertLayer
from lightning_eplb.parallel.state_dict import to_local, to_logical
from lightning_eplb.parallel.waiting import wait_for_all_ranks
from lightning_eplb.relocation.optimizer import has_rows

_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
"""Parts of parameters' names that FSDP1, activation checkpointing and ``torch.compile`` put in."""


def logical_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Return all parameters as the unmodified model has them: every expert, in logical order. Every rank must call it.

    ``model.named_parameters()`` has the experts of this rank only, in the order of the placement, which changes. For
    weight averages, statistics, exports or checkpoints of your own, use this, or ``model.state_dict()``.

    Example::

        weights = logical_parameters(model)
        if rank == 0:
            torch.save(weights, "weights.pt")  # the unmodified model loads it with strict=False: it has no buffers

    Args:
        model: Converted by ``parallelize_experts``; plain, or wrapped in ``DistributedDataParallel``, by FSDP1, by
            FSDP2 or by Fabric.

    Returns:
        By the names of the unmodified model, copies on the CPU that need no gradient; the same on every rank.

    Raises:
        RuntimeError: Some ranks did not call it within ten minutes. A warning names them after ten seconds.
    """
    layer_of = _layers_by_parameter(model)
    for layer in list(layer_of.values())[:1]:
        wait_for_all_ranks(layer.groups, "logical_parameters() gathers experts from all ranks")
    is_flattened = bool(FullyShardedDataParallel.fsdp_modules(model))
    with (
        torch.no_grad(),
        FullyShardedDataParallel.summon_full_params(model, writeback=False) if is_flattened else nullcontext(),
    ):
        return {
            _without_wrappers(name): _whole(parameter, layer_of.get(id(parameter)))
            for name, parameter in _unwrapped(model).named_parameters()
        }


def _whole(parameter: Tensor, layer: ExpertLayer | None) -> Tensor:
    tensor = parameter.detach()
    if layer is not None and layer.groups.size > 1:
        tensor = to_logical(tensor, layer)
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    return tensor.to("cpu", copy=True)


def _unwrapped(model: nn.Module) -> nn.Module:
    while is_wrapped(model) or isinstance(model, (DistributedDataParallel, FullyShardedDataParallel)):
        assert isinstance(model.module, nn.Module)
        model = model.module
    return model


def _without_wrappers(name: str) -> str:
    for part in _WRAPPERS:
        name = name.replace(part, "")
    return name


def _layers_by_parameter(model: nn.Module) -> dict[int, ExpertLayer]:
    return {id(p): layer for layer, module in expert_layers(model) for p in module.parameters(recurse=False)}


def install_optimizer_hooks(optimizer: Optimizer, model: nn.Module) -> None:
    """Make ``optimizer.state_dict()`` gather all experts' rows, and ``load_state_dict()`` keep this rank's.

    From then on all ranks must call both together, as they must with the state dict of the model.

    Args:
        optimizer: Holds parameters of ``model``.
        model: Converted by ``parallelize_experts``.
    """
    layer_of = _layers_by_parameter(model)
    if getattr(optimizer, "_gathers_experts", False) or not any(layer.groups.size > 1 for layer in layer_of.values()):
        return

    def gather(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        groups = next(iter(layer_of.values())).groups
        state = dict(state_dict["state"])
        rows = [
            (index, key, layer)
            for index, layer in _expert_states(optimizer, layer_of, state_dict)
            for key, value in sorted(state[index].items())  # ranks that resumed may have the keys in another order
            if has_rows(value, layer.num_logical_experts if isinstance(value, DTensor) else layer.num_primaries)
        ]
        names = repr([(index, key) for index, key, _ in rows]).encode()
        said = {"state": f"{type(optimizer).__name__} with {len(rows)} tensors {hashlib.sha256(names).hexdigest()[:8]}"}
        what = "state_dict() of an optimizer gathers the state of experts from all ranks"
        check_same_on_all_ranks(said, what, groups)
        for index, key, layer in rows:
            state[index] = {**state[index], key: to_logical(state[index][key], layer)}
        return {**state_dict, "state": state}

    def cut(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        state = dict(state_dict["state"])
        for index, layer in _expert_states(optimizer, layer_of, state_dict):
            state[index] = {
                key: to_local(value, layer, f"{key} of {layer.name}")
                if isinstance(value, Tensor) and value.ndim > 0
                else value
                for key, value in sorted(state[index].items())
            }
        return {**state_dict, "state": state}

    optimizer.register_state_dict_post_hook(gather)
    optimizer.register_load_state_dict_pre_hook(cut)
    optimizer._gathers_experts = True  # type: ignore[attr-defined]


def _expert_states(
    optimizer: Optimizer, layer_of: dict[int, ExpertLayer], state_dict: dict[str, Any]
) -> Iterable[tuple[Any, ExpertLayer]]:
    """The keys of expert parameters in a state dict: numbers or names, in the order of the parameters of all groups."""
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    keys = (key for group in state_dict["param_groups"] for key in group["params"])
    for key, parameter in zip(keys, parameters, strict=False):  # a dictionary that does not fit is refused by torch
        if key in state_dict["state"] and id(parameter) in layer_of:
            yield key, layer_of[id(parameter)]
