"""Parameters and optimizer state in the unmodified model's form: all experts, in logical order."""

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
from lightning_eplb.parallel.barrier import monitored_barrier
from lightning_eplb.parallel.consensus import check_same_on_all_ranks
from lightning_eplb.parallel.expert_layer import ExpertLayer
from lightning_eplb.parallel.groups import ExpertGroups
from lightning_eplb.parallel.parallelize import layers_by_parameter
from lightning_eplb.parallel.state_dict import to_local, to_logical
from lightning_eplb.relocation.optimizer_state import (
    has_rows,
    leaves,
    map_leaves,
    nested_optimizers,
    parameters_of,
    state_of,
)

_WHOLE: set[int] = set()
"""Ids of optimizers whose state has all experts' rows while an optimizer around them makes its state dict."""

_HOOKED = "lightning_eplb_hooks"
"""Attribute of an optimizer whose state dict has all experts' rows."""


def logical_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Return all parameters of the unmodified model: every expert, in logical order. Every rank must call it.

    ``model.named_parameters()`` has only the experts of this rank, in the order of the placement, which changes. Use
    this function or ``model.state_dict()`` for weight averages, statistics, exports and checkpoints of your own.

    Example::

        weights = logical_parameters(model)
        if rank == 0:
            torch.save(weights, "weights.pt")  # the unmodified model loads it with strict=False: it has no buffers

    Args:
        model: Model converted by ``parallelize_experts``, plain or wrapped by DDP, FSDP1, FSDP2 or Fabric.

    Returns:
        Copies on the CPU without gradient, by the names of the unmodified model. The same on every rank.

    Raises:
        RuntimeError: Some ranks did not call it within ten minutes. A warning names them after ten seconds.
    """
    layer_of = layers_by_parameter(model)
    for layer in list(layer_of.values())[:1]:
        monitored_barrier(layer.groups, "logical_parameters() gathers experts from all ranks")
    is_flattened = bool(FullyShardedDataParallel.fsdp_modules(model))
    with (
        torch.no_grad(),
        FullyShardedDataParallel.summon_full_params(model, writeback=False) if is_flattened else nullcontext(),
    ):
        return {
            _without_wrappers(name): _whole(parameter, layer_of.get(id(parameter)))
            for name, parameter in unwrapped(model).named_parameters()
        }


def _whole(parameter: Tensor, layer: ExpertLayer | None) -> Tensor:
    tensor = parameter.detach()
    if layer is not None and layer.groups.size > 1:
        tensor = to_logical(tensor, layer)
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    return tensor.to("cpu", copy=True)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module within DDP, FSDP1 and Fabric's wrappers."""
    while is_wrapped(model) or isinstance(model, (DistributedDataParallel, FullyShardedDataParallel)):
        assert isinstance(model.module, nn.Module)
        model = model.module
    return model


def _without_wrappers(name: str) -> str:
    for part in _compat.WRAPPER_NAMES:
        name = name.replace(part, "")
    return name


def install_optimizer_hooks(optimizer: Optimizer, model: nn.Module) -> None:
    """Make ``optimizer.state_dict()`` gather all experts' rows, and ``load_state_dict()`` keep this rank's.

    From then on both are collective, as the model's state dict is. Nested optimizers get the same hooks.

    Args:
        optimizer: Optimizer of parameters of ``model``.
        model: Model converted by ``parallelize_experts``.
    """
    layer_of = layers_by_parameter(model)
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
    def gather(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        if id(optimizer) in _WHOLE:
            return state_dict
        groups = next(iter(layer_of.values())).groups
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
    """Return ``True`` if ``state_dict`` is overridden: it may call no hooks, or hold more than hooks are given."""
    return type(optimizer).state_dict is not Optimizer.state_dict


def _replace_methods(optimizer: Optimizer, layer_of: dict[int, ExpertLayer]) -> None:
    """Let an optimizer with a state dict of its own make it from state with all experts' rows."""
    make, load = optimizer.state_dict, optimizer.load_state_dict

    def state_dict(*args: Any, **kwargs: Any) -> Any:
        if id(optimizer) in _WHOLE:
            return make(*args, **kwargs)
        inside, groups = nested_optimizers([optimizer]), next(iter(layer_of.values())).groups
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
    """Give the optimizers' state all experts' rows in logical order, for the length of the context."""
    before = _entries(optimizers, layer_of)
    gathered: dict[int, Any] = {}
    _WHOLE.update(map(id, optimizers))
    try:
        for state, parameter, entries in before:
            if id(entries) not in gathered:  # a wrapper may share the state of the optimizer inside
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
    """Return the entries for expert parameters, each with the optimizer's state and the parameter."""
    return [
        (optimizer.state, parameter, entries)
        for optimizer in optimizers
        for parameter in parameters_of([optimizer])
        if id(parameter) in layer_of and (entries := state_of(optimizer, parameter))
    ]


def _check_alike(
    optimizer: Optimizer, entries: Sequence[tuple[dict[str, Any], ExpertLayer]], groups: ExpertGroups
) -> None:
    """Raise ``ValueError`` on all ranks unless all ranks keep rows of experts under the same names."""
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
    """Yield the keys of expert parameters in a state dict, numbers or names, each with its layer."""
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    keys = (key for group in state_dict["param_groups"] for key in group["params"])
    for key, parameter in zip(keys, parameters, strict=False):  # torch raises for a dictionary that does not fit
        if key in state_dict["state"] and id(parameter) in layer_of:
            yield key, layer_of[id(parameter)]
