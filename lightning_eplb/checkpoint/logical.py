"""Parameters and optimizer state are the unmodified model's: every row of an expert in logical order."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from lightning.fabric import is_wrapped
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lightning_eplb import _compat
from lightning_eplb.parallel.consensus import check_same_on_all_ranks
from lightning_eplb.parallel.convert import expert_layers
from lightning_eplb.parallel.experts import ExpertLayer
from lightning_eplb.parallel.groups import ExpertGroups
from lightning_eplb.parallel.state_dict import to_local, to_logical
from lightning_eplb.parallel.waiting import wait_for_all_ranks
from lightning_eplb.relocation.optimizer import (
    has_rows,
    leaves,
    map_leaves,
    nested_optimizers,
    parameters_of,
    state_of,
)

_WHOLE: set[int] = set()
"""Ids of the optimizers whose state has all experts' rows just now, as one around them makes its state dict."""

_HOOKED = "lightning_eplb_hooks"
"""Attribute of an optimizer whose state dict has all experts' rows."""


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
    for part in _compat.WRAPPER_NAMES:
        name = name.replace(part, "")
    return name


def _layers_by_parameter(model: nn.Module) -> dict[int, ExpertLayer]:
    return {id(p): layer for layer, module in expert_layers(model) for p in module.parameters(recurse=False)}


def install_optimizer_hooks(optimizer: Optimizer, model: nn.Module) -> None:
    """Make ``optimizer.state_dict()`` gather all experts' rows, and ``load_state_dict()`` keep this rank's.

    From then on all ranks must call both together, as they must with the state dict of the model. Those of optimizers
    inside it do the same.

    Args:
        optimizer: Holds parameters of ``model``.
        model: Converted by ``parallelize_experts``.
    """
    layer_of = _layers_by_parameter(model)
    if not any(layer.groups.size > 1 for layer in layer_of.values()):
        return
    for each in nested_optimizers([optimizer]):
        if not isinstance(each, Optimizer) or _HOOKED in vars(each):
            continue
        if _has_state_dict_of_its_own(each):
            _replace_methods(each, layer_of)
        else:
            _register_hooks(each, layer_of)
        vars(each)[_HOOKED] = True


def _register_hooks(optimizer: Optimizer, layer_of: dict[int, ExpertLayer]) -> None:
    groups = next(iter(layer_of.values())).groups

    def gather(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        if id(optimizer) in _WHOLE:
            return state_dict
        state = dict(state_dict["state"])
        _check_alike(
            optimizer, [(state[key], layer) for key, layer in _expert_states(optimizer, layer_of, state_dict)], groups
        )
        for index, layer in _expert_states(optimizer, layer_of, state_dict):
            state[index] = _gathered(state[index], layer)
        return {**state_dict, "state": state}

    def cut(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        state = dict(state_dict["state"])
        for index, layer in _expert_states(optimizer, layer_of, state_dict):
            state[index] = _cut(state[index], layer)
        return {**state_dict, "state": state}

    optimizer.register_state_dict_post_hook(gather)
    optimizer.register_load_state_dict_pre_hook(cut)


def _has_state_dict_of_its_own(optimizer: Optimizer) -> bool:
    """It calls no hooks, or has more in its state dict than they are given."""
    return type(optimizer).state_dict is not Optimizer.state_dict


def _replace_methods(optimizer: Optimizer, layer_of: dict[int, ExpertLayer]) -> None:
    """For a state dict in a form that is not known: the optimizer makes it of state that has all experts' rows."""
    make, load = optimizer.state_dict, optimizer.load_state_dict
    groups = next(iter(layer_of.values())).groups

    def state_dict(*args: Any, **kwargs: Any) -> Any:
        if id(optimizer) in _WHOLE:
            return make(*args, **kwargs)
        inside = nested_optimizers([optimizer])
        _check_alike(optimizer, [(kept, layer_of[id(p)]) for _, p, kept in _entries(inside, layer_of)], groups)
        with _all_rows(inside, layer_of):
            return make(*args, **kwargs)

    def load_state_dict(*args: Any, **kwargs: Any) -> Any:
        result = load(*args, **kwargs)
        inside = [each for each in nested_optimizers([optimizer]) if each is not optimizer]
        are_cut = {id(entries) for _, _, entries in _entries(inside, layer_of)}
        for _, parameter, entries in _entries([optimizer], layer_of):
            if id(entries) not in are_cut:
                entries.update(_cut(entries, layer_of[id(parameter)]))
        return result

    optimizer.state_dict = state_dict
    optimizer.load_state_dict = load_state_dict


@contextmanager
def _all_rows(optimizers: Sequence[Optimizer], layer_of: dict[int, ExpertLayer]) -> Iterator[None]:
    """The optimizers' state has all experts' rows, in logical order."""
    before = _entries(optimizers, layer_of)
    gathered: dict[int, Any] = {}
    _WHOLE.update(map(id, optimizers))
    try:
        for state, parameter, entries in before:
            if id(entries) not in gathered:  # a wrapper may show the state of what it wraps as its own
                gathered[id(entries)] = _gathered(entries, layer_of[id(parameter)])
            state[parameter] = gathered[id(entries)]
        yield
    finally:
        _WHOLE.difference_update(map(id, optimizers))
        for state, parameter, entries in before:
            state[parameter] = entries


def _entries(
    optimizers: Sequence[Optimizer], layer_of: dict[int, ExpertLayer]
) -> list[tuple[Any, Tensor, dict[str, Any]]]:
    """The states of optimizers that have entries for expert parameters, with the parameter and the entries."""
    return [
        (optimizer.state, parameter, entries)
        for optimizer in optimizers
        for parameter in parameters_of([optimizer])
        if id(parameter) in layer_of and (entries := state_of(optimizer, parameter))
    ]


def _check_alike(
    optimizer: Optimizer, entries: Sequence[tuple[dict[str, Any], ExpertLayer]], groups: ExpertGroups
) -> None:
    """Raise ``ValueError`` on all ranks unless all keep rows of experts by the same names, which they are to gather."""
    names = [
        (layer.name, sorted(map(str, kept)), sum(_is_per_expert(value, layer) for value in leaves(kept)))
        for kept, layer in entries
    ]
    number, digest = sum(rows for *_, rows in names), hashlib.sha256(repr(names).encode()).hexdigest()[:8]
    said = {"state": f"{type(optimizer).__name__} with {number} tensors {digest}"}
    check_same_on_all_ranks(said, "state_dict() of an optimizer gathers the state of experts from all ranks", groups)


def _is_per_expert(value: Any, layer: ExpertLayer) -> bool:
    return has_rows(value, layer.num_logical_experts if isinstance(value, DTensor) else layer.num_primaries)


def _gathered(entries: Any, layer: ExpertLayer) -> Any:
    return map_leaves(lambda value: to_logical(value, layer) if _is_per_expert(value, layer) else value, entries)


def _cut(entries: dict[str, Any], layer: ExpertLayer) -> dict[str, Any]:
    def cut(key: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.numel() <= 1:
            return value
        return to_local(value, layer, f"{key} of {layer.name}")

    return {key: map_leaves(partial(cut, key), entries[key]) for key in sorted(entries, key=str)}


def _expert_states(
    optimizer: Optimizer, layer_of: dict[int, ExpertLayer], state_dict: dict[str, Any]
) -> Iterable[tuple[Any, ExpertLayer]]:
    """The keys of expert parameters in a state dict: numbers or names, in the order of the parameters of all groups."""
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    keys = (key for group in state_dict["param_groups"] for key in group["params"])
    for key, parameter in zip(keys, parameters, strict=False):  # a dictionary that does not fit is refused by torch
        if key in state_dict["state"] and id(parameter) in layer_of:
            yield key, layer_of[id(parameter)]
