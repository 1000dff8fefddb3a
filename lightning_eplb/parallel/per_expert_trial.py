"""Trial of attributes with an element for each expert: finds at conversion how a forward uses them.

It knows nothing of their meaning. Parts of the experts compute tokens as ranks would, and outputs and tensors must be
those of one call of the whole module.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from itertools import chain, combinations
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lightning_eplb import _compat
from lightning_eplb.parallel.per_expert_state import DICTIONARIES, CounterUpdates, PerExpertState, make_part


def find_per_expert_state(name: str, module: nn.Module) -> PerExpertState:
    """Find the attributes of ``module`` with an element for each expert. Needs no communication.

    Args:
        name: Name of the module, for messages.
        module: Module before its conversion, also on the meta device.

    Raises:
        ValueError: The forward uses something by expert that can't be selected by expert, or changes it otherwise than
            by additions.
    """
    candidates = _with_an_element_each(module)
    if not candidates and not any(True for _ in _inner_state(module)):
        return PerExpertState()
    devices = {parameter.device for parameter in module.parameters(recurse=False)} - {torch.device("meta")}
    device = next(iter(devices), torch.device("cpu"))
    with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        trial = _Trial(name, module, device)
        for number in range(len(candidates), -1, -1):
            for taken in combinations(candidates, number):
                if trial.differences(taken) is None:
                    has_modules = any(isinstance(getattr(module, one), nn.Module) for one in taken)
                    return PerExpertState(taken, tuple(one for one in taken if one in trial.written), has_modules)
        raise ValueError(trial.differences(candidates))


_OF_EVERY_MODULE = frozenset(nn.Module().__dict__)


def _with_an_element_each(module: nn.Module) -> tuple[str, ...]:
    """Return names of buffers, tensors, arrays, lists and dictionaries, also of modules, with one element an expert."""
    number = module.num_experts
    own = {name: value for name, value in vars(module).items() if name not in _OF_EVERY_MODULE}
    _, buffers, children = _compat.registered(module)
    found = own | buffers | children
    return tuple(name for name, value in found.items() if _num_elements(value) == number)


def _num_elements(value: Any) -> int:
    if isinstance(value, Tensor) or (isinstance(value, np.ndarray) and value.dtype.kind in "biuf"):
        return value.shape[0] if value.ndim else 0
    return len(value) if isinstance(value, (list, tuple, *DICTIONARIES, nn.ModuleList, nn.ParameterList)) else 0


def _inner_state(module: nn.Module) -> Iterator[object]:
    """Yield other state that may belong to experts or change in a forward: other buffers, and state of submodules."""
    yield from module.buffers()
    number = module.num_experts
    for child in module.children():
        for inner in child.modules():
            parameters, _, children = _compat.registered(inner)
            own = chain(parameters.values(), children.values(), vars(inner).values())
            yield from (value for value in [inner, *own] if _num_elements(value) == number)


class _Call(NamedTuple):
    """Arguments of a forward, ``[T, D]``, ``[T, K]`` and ``[T, K]``."""

    hidden: Tensor
    index: Tensor
    weights: Tensor


class _Trial:
    """Calls of a module with all experts and of parts of it, with random values in place of its own.

    All experts have the same weights, one row of them, since only state beside the weights is tried. Integers are
    shuffled, since they may be indices.
    """

    def __init__(self, name: str, module: nn.Module, device: torch.device) -> None:
        self._name, self._module, self._device = name, module, device
        self._number: int = module.num_experts  # type: ignore[assignment]
        self.written: set[str] = set()
        """Names of tensors that the forward changes."""
        self._parameters = {
            key: torch.rand((1, *value.shape[1:]), device=device).sub_(0.5).to(value.dtype)
            for key, value in module.named_parameters(recurse=False)
        }
        _, buffers, children = _compat.registered(module)
        self._tensors = {
            key: _other_values(value, device)
            for key, value in (vars(module) | buffers).items()
            if isinstance(value, Tensor)
        }
        self._children = {key: _other_child(child, device) for key, child in children.items()}
        self._call = self._find_call()

    def differences(self, taken: Sequence[str]) -> str | None:
        """Describe how calls of parts that select ``taken`` differ from one call with all experts, if they do."""
        return self._differences(taken, False) or self._differences(taken, True)

    def _find_call(self) -> _Call:
        """Create random tokens of a width that the module takes: one of the dimensions of its weights."""
        matrices = [value for value in self._parameters.values() if value.ndim > 2]
        widths = dict.fromkeys(size for value in matrices for size in value.shape[1:])
        dtypes = (value.dtype for value in self._parameters.values() if value.is_floating_point())
        dtype = next(dtypes, torch.get_default_dtype())
        experts = list(dict.fromkeys((0, self._number - 1, self._number // 2)))
        index_TK = torch.tensor(list(combinations(experts, 2)) * 4, device=self._device)
        error: Exception | None = None
        for width in widths:
            hidden_TD, weights_TK = (
                torch.rand(len(index_TK), size, device=self._device).sub_(shift).to(dtype)
                for size, shift in ((width, 0.5), (2, 0.0))
            )
            call = _Call(hidden_TD, index_TK, weights_TK)
            try:
                if self._run(self._whole(False), call).shape == hidden_TD.shape:
                    return call
            except Exception as raised:
                error = error or raised
        cause = f" ({type(error).__name__}: {error})" if error is not None else ""
        raise ValueError(
            f"{self._name} holds {self._listed()} beside its parameters, and a trial call that tells how its forward"
            f" uses them failed{cause}; it must take random tokens for any experts, on the device of its parameters"
        )

    def _differences(self, taken: Sequence[str], training: bool) -> str | None:
        whole = self._whole(training)
        before = self._state(whole)
        expected_TD = self._run(whole, self._call)
        expected = self._state(whole)
        self.written |= {key for key, value in expected.items() if not _same(value, before[key])}
        if uncounted := [key for key in self.written if key not in taken or not _can_count(before[key])]:
            return self._changes(uncounted)
        parts = self._whole(training)
        try:
            output_TD = self._run_parts(parts, taken)
        except Exception as error:
            return self._message(f"fails with some of its experts ({type(error).__name__}: {error})")
        is_random = not _same(expected_TD, self._run(self._whole(training), self._call))  # dropout, noise
        if not is_random and not _same(output_TD, expected_TD):
            return self._message("computes another output with some of its experts than with all")
        state = self._state(parts)
        changed = [key for key, value in expected.items() if not _same(value, state[key])]
        return self._changes(changed) if changed else None

    def _changes(self, names: Sequence[str]) -> str:
        return (
            f"{self._name} changes {', '.join(sorted(names))} in its forward otherwise than by adding to the row of an"
            " expert what each of its tokens brings: ranks that compute some of the tokens can't tell what one process"
            " would have. Change it outside of the experts, or add to a buffer with a row for each expert"
        )

    def _message(self, what: str) -> str:
        return (
            f"{self._name} {what}: it holds {self._listed()}, and its forward uses some of it by what tokens have in"
            " common (statistics of the batch), or by expert where it can't be given the elements of a rank's experts;"
            " make that a parameter, a buffer or an nn.ModuleList of the"
            f" module itself, with {self._number} elements, which its forward indexes by expert"
        )

    def _listed(self) -> str:
        names = [*_with_an_element_each(self._module)]
        names += [name for name, _ in self._module.named_buffers() if name not in names]
        names += [name for name, _ in self._module.named_children() if name not in names]
        return ", ".join(names)

    def _whole(self, training: bool) -> nn.Module:
        """Create a module like the original with tensors and lists of its own."""
        whole = object.__new__(type(self._module))
        whole.__dict__.update(self._module.__dict__, training=training)
        whole.__dict__.update(_lists(self._module))
        tensors = {key: value.clone() for key, value in self._tensors.items()}
        parameters, buffers, _ = _compat.registered(whole)
        whole.__dict__.update({key: value for key, value in tensors.items() if key not in buffers})
        _compat.replace_registered(
            whole,
            parameters | self._rows(self._number),
            {key: tensors.get(key) for key in buffers},
            copy.deepcopy(self._children),
        )
        for child in whole.children():
            child.train(training)
            for inner in child.modules():
                _compat.call_without_hooks(inner)
        return whole

    def _rows(self, number: int) -> dict[str, Tensor]:
        return {key: value.expand(number, *value.shape[1:]) for key, value in self._parameters.items()}

    def _run(self, module: nn.Module, call: _Call) -> Tensor:
        return type(self._module).forward(module, *call)

    def _run_parts(self, module: nn.Module, taken: Sequence[str]) -> Tensor:
        """Compute the pairs of the call as ranks would: experts in another order, one on two ranks, one by itself."""
        first, last, middle = 0, self._number - 1, self._number // 2
        hidden_TD, index_TK, weights_TK = self._call
        pair_N = torch.arange(index_TK.numel(), device=self._device)
        expert_N, is_even_N = index_TK.flatten(), pair_N % 4 < 2
        is_last_N = expert_N == last
        parts = [
            ((last, first), is_even_N & (is_last_N | (expert_N == first))),
            ((first,), ~is_even_N & (expert_N == first)),
            (tuple(dict.fromkeys((middle, last))), (~is_even_N & is_last_N) | ((expert_N == middle) & ~is_last_N)),
        ]
        counters = CounterUpdates(module, [name for name in taken if name in self.written])
        outputs_ND = hidden_TD.repeat_interleave(index_TK.shape[1], dim=0)
        inputs_ND = outputs_ND.clone()
        for experts, is_computed_N in parts:
            position_N = torch.stack([expert_N == expert for expert in experts]).int().argmax(dim=0)
            pairs = pair_N[is_computed_N]
            pairs = pairs[position_N[pairs].argsort(stable=True)]
            slots_M1 = position_N[pairs].unsqueeze(-1)
            part = make_part(module, type(self._module), self._rows(len(experts)), taken, experts)
            call = _Call(inputs_ND[pairs], slots_M1, torch.ones_like(slots_M1, dtype=weights_TK.dtype))
            outputs_ND[pairs] = self._run(part, call).to(outputs_ND.dtype)
            counters.add(part, experts)
        counters.write()
        shape = *index_TK.shape, hidden_TD.shape[1]
        return (outputs_ND * weights_TK.reshape(-1, 1)).view(shape).sum(dim=1)

    def _state(self, module: nn.Module) -> dict[str, Any]:
        """Copy the tensors and lists that a forward may change."""
        tensors = {key: getattr(module, key).clone() for key in self._tensors}
        inner = {
            f"{key}.{name}": value.clone()
            for key, child in module.named_children()
            for name, value in child.named_buffers()
        }
        return {**tensors, **_lists(module), **inner}


def _lists(module: nn.Module) -> dict[str, Any]:
    """Copy a module's own lists, dictionaries and arrays, and the tensors in them."""
    own = {key: value for key, value in vars(module).items() if key not in _OF_EVERY_MODULE}
    return {key: _copy(value) for key, value in own.items() if type(value) in (list, tuple, dict, np.ndarray)}


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, dict):
        return {key: one.clone() if isinstance(one, Tensor) else one for key, one in value.items()}
    return type(value)(one.clone() if isinstance(one, Tensor) else one for one in value)


def _other_values(value: Tensor, device: torch.device) -> Tensor:
    if value.is_floating_point():
        return torch.rand(value.shape, device=device).add_(0.5).to(value.dtype)
    if value.is_meta:
        return torch.zeros_like(value, device=device)
    order = torch.randperm(value.shape[0], device=device) if value.ndim else ()
    return value.detach().to(device)[order].clone()


def _other_child(child: nn.Module | None, device: torch.device) -> nn.Module | None:
    if child is None:
        return None
    other = copy.deepcopy(child).to_empty(device=device) if _is_on_meta(child) else copy.deepcopy(child)
    for module, like in zip(other.modules(), child.modules(), strict=True):
        for tensor, own in zip(
            chain(module.parameters(recurse=False), module.buffers(recurse=False)),
            chain(like.parameters(recurse=False), like.buffers(recurse=False)),
            strict=True,
        ):
            tensor.data.copy_(_other_values(own.detach(), device))
    return other


def _is_on_meta(module: nn.Module) -> bool:
    return any(tensor.is_meta for tensor in chain(module.parameters(), module.buffers()))


def _can_count(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype != torch.bool


def _same(ours: Any, theirs: Any) -> bool:
    """Return ``True`` if two tensors are equal up to rounding, or two lists, dictionaries or arrays of them."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return _same([*ours, *ours.values()], [*theirs, *theirs.values()])
    if isinstance(ours, list | tuple):
        return len(ours) == len(theirs) and all(map(_same, ours, theirs))
    if isinstance(ours, np.ndarray | int | float | str):
        return np.array_equal(ours, theirs)
    if not isinstance(ours, Tensor):
        return ours is theirs
    if not isinstance(theirs, Tensor) or ours.shape != theirs.shape:
        return False
    if not ours.is_floating_point():
        return torch.equal(ours, theirs)
    largest = float(theirs.detach().abs().max()) if theirs.numel() else 0.0
    return torch.allclose(ours, theirs, rtol=0, atol=math.sqrt(torch.finfo(ours.dtype).eps) * largest, equal_nan=True)
