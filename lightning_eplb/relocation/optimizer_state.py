"""Optimizer state with a row for each expert, also of nested optimizers."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_eplb import _compat
from lightning_eplb.parallel.dtensor import local_shard

MAX_DEPTH = 6
"""Attributes and items that are followed from an optimizer to its contents."""


def state_rows(optimizers: Iterable[Optimizer], parameter: Tensor) -> list[Tensor]:
    """Return the optimizers' state tensors for ``parameter`` that have its rows.

    These are moments, momentum, fp32 masters and row-wise factors. Scalars, such as AdamW's ``step``, belong to the
    whole parameter and stay on their rank.

    Args:
        optimizers: Optimizers with those nested in them, see :func:`nested_optimizers`.
        parameter: Expert parameter.

    Returns:
        Tensors ``[n, ...]``, each once, in an order that is the same on every rank.
    """
    found: dict[int, Tensor] = {}
    for optimizer in optimizers:
        for value in leaves(state_of(optimizer, parameter)):
            if has_rows(value, parameter.shape[0]):
                found.setdefault(id(value), value)  # a wrapper may expose the state of the wrapped optimizer
    return list(found.values())


def state_of(optimizer: Optimizer, parameter: Tensor) -> dict[str, Any]:
    """Return ``optimizer.state[parameter]``, or an empty dictionary."""
    state = getattr(optimizer, "state", {}).get(parameter, {})
    return state if isinstance(state, dict) else {}


def has_rows(value: Any, num_rows: int) -> bool:
    """Return ``True`` if a value of a parameter's state is a tensor with a row for each of its experts."""
    return isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == num_rows


def leaves(value: Any) -> Iterator[Any]:
    """Yield the values in the dictionaries and lists of a parameter's state, in the same order on every rank."""
    if isinstance(value, Mapping):
        for key in sorted(value, key=str):  # ranks that resumed may have the keys in another order
            yield from leaves(value[key])
    elif isinstance(value, (list, tuple, deque)):
        for inner in value:
            yield from leaves(inner)
    else:
        yield value


def map_leaves(function: Callable[[Any], Any], value: Any) -> Any:
    """Apply ``function`` to each value in dictionaries and lists, in the order of :func:`leaves`."""
    if isinstance(value, Mapping):
        mapped = {key: map_leaves(function, value[key]) for key in sorted(value, key=str)}
        return {key: mapped[key] for key in value}
    if isinstance(value, deque):
        return deque((map_leaves(function, inner) for inner in value), value.maxlen)
    if isinstance(value, (list, tuple)):
        return type(value)([map_leaves(function, inner) for inner in value])
    return function(value)


def nested_optimizers(optimizers: Iterable[Optimizer]) -> list[Optimizer]:
    """Return the optimizers, each followed by those that it holds in attributes, lists and dictionaries.

    Returns:
        Each optimizer once, in an order that is the same on every rank.
    """
    found: dict[int, Optimizer] = {}
    for optimizer in optimizers:
        for _, value in contents(optimizer):
            if value is optimizer or isinstance(value, Optimizer):
                found.setdefault(id(value), value)
    return list(found.values())


def call_after_steps(optimizers: Iterable[Optimizer], hook: Callable[..., None]) -> list[RemovableHandle]:
    """Register a hook that is called after steps. Wrappers without hooks are skipped: nested optimizers have them."""
    handles = []
    for optimizer in optimizers:
        try:
            handles.append(optimizer.register_step_post_hook(hook))
        except AttributeError:  # Optimizer.__init__ was not called, or it is no Optimizer
            continue
    return handles


def parameters_of(optimizers: Iterable[Optimizer]) -> list[Tensor]:
    """Return the parameters of all parameter groups, each once."""
    groups = (group for optimizer in optimizers for group in getattr(optimizer, "param_groups", ()))
    return list({id(parameter): parameter for group in groups for parameter in group["params"]}.values())


def copied_parameters(optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> Iterator[str]:
    """Yield names of expert parameters of which the optimizer updates a copy instead, such as one in float32."""
    name_of, known = _names_by_shape(parameters), {id(parameter) for parameter in parameters.values()}
    for held in parameters_of(nested_optimizers([optimizer])):
        name = name_of.get(held.shape) if id(held) not in known else None
        if name is not None and _is_copy(held, parameters[name]):
            yield name


def stray_rows(optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    """Find tensors with the shape of expert parameters that are kept elsewhere than in ``state[parameter]``.

    Yields:
        Path in the optimizer, such as ``shadow[3]``, and the name of a parameter of that shape.
    """
    name_of, nested = _names_by_shape(parameters), nested_optimizers([optimizer])
    held = [*parameters.values(), *parameters_of(nested)]
    known = {id(tensor) for parameter in held for tensor in (parameter, parameter.grad)}
    known |= {id(value) for each in nested for p in parameters.values() for value in leaves(state_of(each, p))}
    for place, value in contents(optimizer):
        for where, tensor in _tensors(place, value):
            if id(tensor) not in known and (name := name_of.get(tensor.shape)) is not None:
                yield where, name


def _names_by_shape(parameters: Mapping[str, Tensor]) -> dict[torch.Size, str]:
    """Map shapes to the first parameter of that shape. One-dimensional shapes are too common to be included."""
    return {parameter.shape: name for name, parameter in reversed(list(parameters.items())) if parameter.ndim > 1}


def contents(root: Any) -> Iterator[tuple[str, Any]]:
    """Yield all objects reachable from the root by attributes, items and elements, each once, with its path.

    Modules, other objects of torch and Python that are no containers, and the state of parameters are not entered.
    """
    seen: dict[int, Any] = {}
    waiting: list[tuple[str, Any, int]] = [("", root, 0)]
    while waiting:
        place, value, depth = waiting.pop()
        if isinstance(value, _LEAVES) or id(value) in seen:
            continue
        seen[id(value)] = value
        yield place.removeprefix("."), value
        if depth < MAX_DEPTH and not isinstance(value, (Tensor, nn.Module)):
            waiting += [(place + step, inner, depth + 1) for step, inner in reversed(list(_inside(value)))]


_LEAVES = (bool, int, float, complex, str, bytes, type(None), type)


def _inside(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in list(value.items()):
            yield ("[parameter]" if isinstance(key, Tensor) else f"[{key!r}]"), inner
    elif isinstance(value, (list, tuple, set, frozenset, deque)):
        for i, inner in enumerate(value):
            yield f"[{i}]", inner
    elif isinstance(value, Optimizer) or type(value).__module__.partition(".")[0] not in ("builtins", "torch"):
        for name, inner in list(getattr(value, "__dict__", {}).items()):
            if name == "state" and isinstance(inner, Mapping):
                yield ".state", {key: entry for key, entry in inner.items() if not isinstance(key, Tensor)}
            elif not _compat.is_hook_attribute(name):
                yield f".{name}", inner


def _tensors(place: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield place, value
    elif isinstance(value, nn.Module):
        for name, tensor in [*value.named_parameters(), *value.named_buffers()]:
            yield f"{place}.{name}", tensor


def _is_copy(tensor: Tensor, parameter: Tensor) -> bool:
    """Return ``True`` if values are equal, too. Another parameter may have the same shape."""
    one, other = local_shard(tensor.detach()), local_shard(parameter.detach())
    return one.shape == other.shape and bool(other.any()) and torch.equal(one.to(other), other)
