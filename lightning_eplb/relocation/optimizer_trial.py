"""Try out an optimizer on toy parameters: do its updates of an expert depend on the other experts of the rank?"""

import copy
import itertools
import random
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_eplb import _compat
from lightning_eplb.relocation.optimizer import call_after_steps, contents, nested_optimizers, state_of, state_rows

BAR = 1e-9
"""Largest difference, as a part of how far the row came. Measured with the classes of pytorch-optimizer 4.1: those that
train alike differ by 0, Nero by 2.5e-10; those that don't by 2.3e-5 (AdamS) and more."""

BAR_OF_FLOAT32 = 1e-4
"""The same for an optimizer that can't be tried in float64."""

NUM_STEPS = 12
NUM_ROWS = 3
_ROWS = (0, 1, 2)
_SHAPE_OF_EXPERTS = (NUM_ROWS, 6, 5, 2, 2)
_SHAPE_OF_OTHERS = (5, 4, 2, 2, 2)
_SCALE = (1, 1, 100, 1, 0.01, 1, 1, 1, 100, 1, 0.1, 1)
_SCALE_OF_ROW = (1, 10, 0.1)
_STEPS_THAT_AGREE = (5, 6, 7)
_STEP_BACK = 8
_STEPS_ALONG_THE_LEVEL = (3, 9)
_STEP_OF_MOVE = 6
_LEAST_LR = 1e-6


@dataclass(frozen=True)
class Trial:
    """Findings about an optimizer, each the name of an expert parameter that shows it, or ``None``."""

    mixed: str | None
    """Rows whose update depends on other rows, as a norm of the whole parameter does."""
    left_behind: str | None
    """Rows that train otherwise after they changed places with what the optimizer's state has of them."""
    optimizer: Optimizer
    """A copy of the one that was tried, after its last step."""
    toys: dict[str, Tensor]
    """The parameters of the copy by name, ``[3, ...]``."""
    calls_step_hooks: bool
    """Hooks on steps, its own or those of an optimizer inside it, are called."""


def try_out(optimizer: Optimizer, experts: Mapping[str, Tensor]) -> Trial:
    """Let copies of an optimizer step on toy parameters, and compare rows that are together with rows alone.

    The copies have the settings of all groups. Generators of random numbers are left as they were, and no hook of the
    optimizer is called. Needs no communication, and finds the same on all ranks.

    Args:
        optimizer: It is not stepped, and what it holds stays as it is.
        experts: Those of its parameters that have a row for each expert, by name.

    Raises:
        Exception: Whatever copying the optimizer or stepping the copies raised.
    """
    toys = _Toys(optimizer, experts)
    with warnings.catch_warnings(), _same_random_numbers(toys.devices):
        warnings.simplefilter("ignore")
        way, whole = _first_that_works(toys)
        if whole.is_random:  # the noise of a row alone is other noise
            other = _run(toys, way, _ROWS, others_vary=True)
            return Trial(_differs(whole, [other], [0]), None, whole.optimizer, whole.toys, whole.calls_step_hooks)
        mixed = _differs(whole, [_run(toys, way, [row]) for row in _ROWS], _ROWS)
        moved = _run(toys, way, _ROWS, moves=True)
        left_behind = _differs(whole, [moved] * NUM_ROWS, _ROWS) if mixed is None else None
        return Trial(mixed, left_behind, whole.optimizer, whole.toys, whole.calls_step_hooks)


@dataclass(frozen=True)
class _Way:
    """How copies are made and stepped."""

    dtype: torch.dtype
    """Of the toy parameters: some optimizers know no float64."""
    keeps_state: bool
    """State that the optimizer has already is made to fit; else copies start without."""
    has_closure: bool


def _first_that_works(toys: "_Toys") -> "tuple[_Way, _Outcome]":
    errors = []
    for choices in itertools.product((torch.float64, torch.float32), (False, True), (True, False)):
        way = _Way(*choices)
        try:
            return way, _run(toys, way, _ROWS)
        except Exception as error:
            errors.append(error)
    raise errors[0]


class _Toys:
    """Small stand-ins for an optimizer's parameters: for each group one for experts and one for others, by dimensions.

    Args:
        optimizer: With all that is inside it.
        experts: Its parameters with a row for each expert, by name.
    """

    def __init__(self, optimizer: Optimizer, experts: Mapping[str, Tensor]) -> None:
        self._live = optimizer
        self._nested = nested_optimizers([optimizer])
        names = {id(parameter): name for name, parameter in experts.items()}
        self._stand_in: dict[int, int] = {}
        """By the id of a parameter."""
        self._models: list[Tensor] = []
        """The parameters that the stand-ins are for."""
        self.names: list[str | None] = []
        """Of the stand-ins for experts; ``None`` for those for others."""
        self._groups: list[tuple[list, list[int]]] = []
        groups = {id(group): group for each in self._nested for group in getattr(each, "param_groups", ())}
        for group in groups.values():
            in_group: dict[tuple[bool, int], int] = {}
            for parameter in group["params"]:
                kind = id(parameter) in names, parameter.ndim
                if id(parameter) in self._stand_in:
                    in_group.setdefault(kind, self._stand_in[id(parameter)])
                    continue
                if kind not in in_group:
                    in_group[kind] = len(self._models)
                    self._models.append(parameter)
                    self.names.append(names.get(id(parameter)))
                self._stand_in[id(parameter)] = in_group[kind]
            self._groups.append((group["params"], list(dict.fromkeys(in_group.values()))))
        self.devices = [model.device if model.device.type == "cuda" else torch.device("cpu") for model in self._models]
        numbers = torch.Generator("cpu").manual_seed(20)
        self._start = [_random(self._shape(i), numbers) for i in self._indices]
        self._gradients = [
            [_gradients(start.shape, numbers) for start in self._start] for _ in range(2)
        ]  # the second: other rows than the first have other gradients

    @property
    def _indices(self) -> range:
        return range(len(self._models))

    def _shape(self, index: int) -> tuple[int, ...]:
        shape = _SHAPE_OF_EXPERTS if self.names[index] is not None else _SHAPE_OF_OTHERS
        return (shape + (1,) * self._models[index].ndim)[: self._models[index].ndim]

    def make(self, rows: Sequence[int], way: _Way) -> tuple[Optimizer, list[nn.Parameter]]:
        """A copy of the optimizer, and the stand-ins that it has for parameters, of experts with these rows only."""
        toys = [nn.Parameter(self.start(i, rows).to(way.dtype)) for i in self._indices]
        shells = {id(each): object.__new__(type(each)) for each in self._nested}
        memo: dict[int, Any] = dict(shells)
        memo.update({key: toys[index] for key, index in self._stand_in.items()})
        memo.update({id(params): [toys[i] for i in indices] for params, indices in self._groups})
        for _, value in contents(self._live):
            if isinstance(value, nn.Module) and any(id(each) in self._stand_in for each in value.parameters()):
                memo[id(value)] = nn.Module()  # a model is too large to copy
        for each in self._nested:
            if isinstance(state := vars(each).get("state"), Mapping):
                memo[id(state)] = defaultdict(dict)
        for each in self._nested:
            shell = shells[id(each)]
            for name, value in list(vars(each).items()):
                if _compat.is_hook_attribute(name):
                    vars(shell)[name] = OrderedDict()
                elif not callable(getattr(type(each), name, None)):  # a method that was replaced acts on the original
                    vars(shell)[name] = copy.deepcopy(value, memo)
            if way.keeps_state and isinstance(state := vars(each).get("state"), Mapping):
                self._fill_state(vars(shell)["state"], state, rows, toys, memo)
        copied = shells[id(self._live)]
        for group in (group for shell in shells.values() for group in getattr(shell, "param_groups", ())):
            _let_train(group)
        if callable(train := getattr(copied, "train", None)):  # schedule-free ones have modes, as modules have
            train()
        return copied, toys

    def _fill_state(
        self, state: dict, live: Mapping, rows: Sequence[int], toys: list[nn.Parameter], memo: dict[int, Any]
    ) -> None:
        for index, (model, toy) in enumerate(zip(self._models, toys, strict=True)):
            if isinstance(entries := live.get(model), dict):
                fit = {key: self._fit(value, index, rows, toy.dtype) for key, value in entries.items()}
                state[toy] = {key: copy.deepcopy(value, memo) for key, value in fit.items()}
        for key, value in live.items():
            if not isinstance(key, Tensor):
                state[key] = copy.deepcopy(value, memo)

    def _fit(self, value: Any, index: int, rows: Sequence[int], dtype: torch.dtype) -> Any:
        """A value of a parameter's state as one of its stand-in: the parameter again, or the same number everywhere."""
        model = self._models[index]
        if not isinstance(value, Tensor) or value.ndim != model.ndim or value.ndim == 0:
            return value
        start = self.start(index, rows)
        if value.shape == model.shape and torch.equal(value, model.detach()):
            return start.to(dtype)
        sizes = zip(start.shape, value.shape, model.shape, strict=True)
        mean = float(value.double().mean()) if value.numel() else 0.0
        shape = [small if have == full else have for small, have, full in sizes]
        return torch.full(shape, mean, device=start.device).to(dtype if value.is_floating_point() else value.dtype)

    def start(self, index: int, rows: Sequence[int]) -> Tensor:
        """A new tensor with the values that a stand-in starts from."""
        start = self._start[index]
        return (start[list(rows)] if self.names[index] is not None else start.clone()).to(self.devices[index])

    def gradient(self, index: int, step: int, rows: Sequence[int], weights: Tensor, others_vary: bool) -> Tensor:
        """A stand-in's gradient: what it is at this step, and a pull of the weights towards zero."""
        gradient = self._gradients[0][index][step]
        if self.names[index] is not None:
            if others_vary:
                gradient = torch.cat([gradient[:1], self._gradients[1][index][step][1:]])
            gradient = gradient[list(rows)]
        gradient = gradient.to(weights.device, copy=True)
        if step in _STEPS_ALONG_THE_LEVEL and self.names[index] is not None:
            for row, w in zip(gradient, weights, strict=True):  # by row, so that no sum is another
                row -= (row * w).sum() / (w * w).sum().clamp_min(1e-30) * w
            return gradient
        return gradient + 0.1 * weights


def _random(shape: Sequence[int], numbers: torch.Generator) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=numbers, device="cpu")


def _gradients(shape: torch.Size, numbers: torch.Generator) -> list[Tensor]:
    """For each step: directions that agree, turn or go back, sizes that jump, some or all of it zero."""
    gradients = []
    direction = _random(shape, numbers)
    for step in range(NUM_STEPS):
        gradient = _random(shape, numbers)
        if step in _STEPS_THAT_AGREE:
            gradient = direction + 0.01 * gradient
        elif step == _STEP_BACK:
            gradient = 0.1 * gradient - direction
        for row in range(shape[0]) if shape else ():
            gradient[row] *= _SCALE[(step + row) % NUM_STEPS] * _SCALE_OF_ROW[row % NUM_ROWS]
            if step == 4 + 3 * row:
                gradient[row] = 0
        gradients.append(gradient)
    return gradients


def _let_train(group: dict[str, Any]) -> None:
    """Learning rates that are zero, or nearly so, while they warm up, would show nothing."""
    lr = group.get("lr")
    if isinstance(lr, (int, float, Tensor)) and float(lr) < _LEAST_LR:
        later = group.get("initial_lr")
        later = float(later) if isinstance(later, (int, float, Tensor)) and float(later) >= _LEAST_LR else 1e-3
        group["lr"] = torch.full_like(lr, later) if isinstance(lr, Tensor) else later


@dataclass(frozen=True)
class _Outcome:
    optimizer: Optimizer
    toys: dict[str, Tensor]
    ways: list[tuple[str | None, Tensor]]
    """How far each stand-in came, with its name if it has rows of experts, which are then in their order."""
    numbers: dict[tuple, float]
    is_random: bool
    calls_step_hooks: bool


def _run(
    toys: _Toys,
    way: _Way,
    rows: Sequence[int],
    moves: bool = False,
    others_vary: bool = False,
) -> _Outcome:
    """Step a copy of the optimizer.

    Args:
        rows: Of experts, those that are there.
        moves: In the middle, rows change places, with what the optimizer's state has of them.
        others_vary: All rows but the first have other gradients.
    """
    optimizer, parameters = toys.make(rows, way)
    experts = [i for i, name in enumerate(toys.names) if name is not None]
    order, back = list(rows), list(range(len(rows)))
    is_random = False
    seen: list[bool] = []
    call_after_steps(nested_optimizers([optimizer]), lambda *_: seen.append(True))
    for step in range(NUM_STEPS):
        if moves and step == _STEP_OF_MOVE:
            order, back = [order[i] for i in (2, 0, 1)], [1, 2, 0]
            nested = nested_optimizers([optimizer])
            with torch.no_grad():
                for i in experts:
                    for tensor in [parameters[i], *state_rows(nested, parameters[i])]:
                        tensor.copy_(tensor[[2, 0, 1]])

        def closure(step: int = step, order: Sequence[int] = tuple(order)) -> Tensor:
            for i, parameter in enumerate(parameters):
                parameter.grad = toys.gradient(i, step, order, parameter.detach().double(), others_vary).to(way.dtype)
            return torch.tensor(1.0 / (step + 1), dtype=torch.float64, device="cpu")

        closure()
        before = _seed(step, toys.devices)
        if way.has_closure:
            optimizer.step(closure)  # type: ignore[arg-type]
        else:
            optimizer.step()
        is_random |= _random_states(toys.devices) != before
    ways: list[tuple[str | None, Tensor]] = []
    for i, (name, parameter) in enumerate(zip(toys.names, parameters, strict=True)):
        end = parameter.detach()
        ways.append((name, (end[back] if name is not None else end) - toys.start(i, rows).to(way.dtype)))
    named = {str(toys.names[i]): parameters[i] for i in experts}
    return _Outcome(optimizer, dict(named), ways, _numbers(optimizer, named), is_random, bool(seen))


def _numbers(optimizer: Optimizer, toys: Mapping[str, Tensor]) -> dict[tuple, float]:
    """What is one number for all rows of a parameter, or for all parameters: it must not depend on what rows there are.

    It may not act yet, as an estimate does by which a step size is chosen later.
    """
    found: dict[tuple, Any] = {}
    for i, each in enumerate(nested_optimizers([optimizer])):
        for name, toy in toys.items():
            found |= {(i, name, key): value for key, value in state_of(each, toy).items()}
        groups: Sequence[dict[str, Any]] = getattr(each, "param_groups", [])
        for j, group in enumerate(groups):
            found |= {(i, j, key): value for key, value in group.items()}
        found |= {(i, key): value for key, value in vars(each).items()}
    return {
        key: float(value)
        for key, value in found.items()
        if isinstance(value, float) or (isinstance(value, Tensor) and value.numel() == 1 and value.is_floating_point())
    }


def _differs(whole: _Outcome, others: Sequence[_Outcome], rows: Sequence[int]) -> str | None:
    """The name of an expert parameter that came elsewhere; of any where another parameter did, or a number differs.

    Args:
        others: One for each of ``rows``, with this row in its place, or alone.
    """
    any_name, dtype = next(iter(whole.toys)), whole.ways[0][1].dtype
    for row, other in zip(rows, others, strict=True):
        for (name, way), (_, there) in zip(whole.ways, other.ways, strict=True):
            if name is not None:
                way, there = way[row], there[row if len(there) == NUM_ROWS else 0]
            if _is_off(way, there):
                return name or any_name
        for key, number in whole.numbers.items():
            numbers = torch.tensor([number, other.numbers.get(key, number)], dtype=dtype, device="cpu")
            if _is_off(numbers[0], numbers[1]):
                return key[1] if key[1] in whole.toys else any_name
    return None


def _is_off(one: Tensor, other: Tensor) -> bool:
    bar = BAR if one.dtype == torch.float64 else BAR_OF_FLOAT32
    one, other = one.double(), other.double()
    if not torch.equal(one.isnan(), other.isnan()):
        return True
    difference = (one - other).nan_to_num(0.0, posinf=float("inf")).abs()
    return bool((difference > bar * one.nan_to_num(0.0).abs().max()).any())


@contextmanager
def _same_random_numbers(devices: Sequence[torch.device]) -> Iterator[None]:
    """Leave all generators as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    cuda = {device.index or 0 for device in devices if device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=sorted(cuda)):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _seed(step: int, devices: Sequence[torch.device]) -> list[bytes]:
    random.seed(step)
    np.random.seed(step)
    torch.default_generator.manual_seed(step)
    for device in {device for device in devices if device.type == "cuda"}:
        with torch.cuda.device(device):
            torch.cuda.manual_seed(step)
    return _random_states(devices)


def _random_states(devices: Sequence[torch.device]) -> list[Any]:
    states = [torch.get_rng_state()]
    states += [torch.cuda.get_rng_state(device) for device in {d for d in devices if d.type == "cuda"}]
    numpy: Any = np.random.get_state()
    return [random.getstate(), numpy[2], numpy[1].tobytes(), *(state.numpy().tobytes() for state in states)]
