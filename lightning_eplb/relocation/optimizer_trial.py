"""Trial of an optimizer on toy parameters: checks that its update of one expert does not depend on others."""

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
from lightning_eplb.relocation.optimizer_state import (
    call_after_steps,
    contents,
    nested_optimizers,
    state_of,
    state_rows,
)

TOLERANCE = 1e-9
"""Largest difference, relative to the update of the row. Measured with the classes of pytorch-optimizer 4.1: those that
update rows independently differ by 0, Nero by 2.5e-10; those that don't by 2.3e-5 (AdamS) and more."""

TOLERANCE_FLOAT32 = 1e-4
"""The same for an optimizer that can't run in float64."""

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
    """Parameter whose update of a row depends on other rows, as by a norm of the whole parameter."""
    left_behind: str | None
    """Parameter whose rows are updated otherwise after they moved together with their rows of state."""
    optimizer: Optimizer
    """Copy of the optimizer after its last step."""
    toys: dict[str, Tensor]
    """Expert parameters of the copy by name, ``[3, ...]``."""
    calls_step_hooks: bool
    """``True`` if step hooks of the optimizer, or of one nested in it, are called."""


def run_trial(optimizer: Optimizer, experts: Mapping[str, Tensor]) -> Trial:
    """Step copies of an optimizer on toy parameters, and compare rows that are updated together and one by one.

    The copies have the settings of all parameter groups. Random generators keep their state, and no hook of the
    optimizer is called. Needs no communication, and finds the same on all ranks.

    Args:
        optimizer: Optimizer. Neither it nor its contents change.
        experts: Parameters of the optimizer with a row for each expert, by name.

    Raises:
        Exception: Any exception that copying the optimizer or stepping the copies raised.
    """
    toys = _Toys(optimizer, experts)
    with warnings.catch_warnings(), _preserve_random_state(toys.devices):
        warnings.simplefilter("ignore")
        config, whole = _first_working_config(toys)
        if whole.is_random:  # one row by itself gets other noise
            other = _run(toys, config, _ROWS, others_vary=True)
            return Trial(_differs(whole, [other], [0]), None, whole.optimizer, whole.toys, whole.calls_step_hooks)
        mixed = _differs(whole, [_run(toys, config, [row]) for row in _ROWS], _ROWS)
        moved = _run(toys, config, _ROWS, moves=True)
        left_behind = _differs(whole, [moved] * NUM_ROWS, _ROWS) if mixed is None else None
        return Trial(mixed, left_behind, whole.optimizer, whole.toys, whole.calls_step_hooks)


@dataclass(frozen=True)
class _Config:
    """Configuration of the copies."""

    dtype: torch.dtype
    """Dtype of the toy parameters. Some optimizers don't support float64."""
    keeps_state: bool
    """Resize existing state to the toy parameters, else copies start without state."""
    has_closure: bool


def _first_working_config(toys: "_Toys") -> "tuple[_Config, _Outcome]":
    errors = []
    for choices in itertools.product((torch.float64, torch.float32), (False, True), (True, False)):
        config = _Config(*choices)
        try:
            return config, _run(toys, config, _ROWS)
        except Exception as error:
            errors.append(error)
    raise errors[0]


class _Toys:
    """Toy parameters in place of an optimizer's: for each group and number of dimensions one of experts and one other.

    Args:
        optimizer: Optimizer with nested optimizers.
        experts: Parameters of the optimizer with a row for each expert, by name.
    """

    def __init__(self, optimizer: Optimizer, experts: Mapping[str, Tensor]) -> None:
        self._live = optimizer
        self._nested = nested_optimizers([optimizer])
        names = {id(parameter): name for name, parameter in experts.items()}
        self._toy_index: dict[int, int] = {}
        """Index of the toy parameter by ``id`` of the parameter."""
        self._models: list[Tensor] = []
        """Parameter that each toy parameter stands for."""
        self.names: list[str | None] = []
        """Name of each expert parameter, ``None`` for other parameters."""
        self._groups: list[tuple[list, list[int]]] = []
        groups = {id(group): group for each in self._nested for group in getattr(each, "param_groups", ())}
        for group in groups.values():
            in_group: dict[tuple[bool, int], int] = {}
            for parameter in group["params"]:
                kind = id(parameter) in names, parameter.ndim
                if id(parameter) in self._toy_index:
                    in_group.setdefault(kind, self._toy_index[id(parameter)])
                    continue
                if kind not in in_group:
                    in_group[kind] = len(self._models)
                    self._models.append(parameter)
                    self.names.append(names.get(id(parameter)))
                self._toy_index[id(parameter)] = in_group[kind]
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

    def make(self, rows: Sequence[int], config: _Config) -> tuple[Optimizer, list[nn.Parameter]]:
        """Create a copy of the optimizer, and its toy parameters, those of experts with these rows only."""
        toys = [nn.Parameter(self.start(i, rows).to(config.dtype)) for i in self._indices]
        shells = {id(each): object.__new__(type(each)) for each in self._nested}
        memo: dict[int, Any] = dict(shells)
        memo.update({key: toys[index] for key, index in self._toy_index.items()})
        memo.update({id(params): [toys[i] for i in indices] for params, indices in self._groups})
        for _, value in contents(self._live):
            if isinstance(value, nn.Module) and any(id(each) in self._toy_index for each in value.parameters()):
                memo[id(value)] = nn.Module()  # a model is too large to copy
        for each in self._nested:
            if isinstance(state := vars(each).get("state"), Mapping):
                memo[id(state)] = defaultdict(dict)
        for each in self._nested:
            shell = shells[id(each)]
            for name, value in list(vars(each).items()):
                if _compat.is_hook_attribute(name):
                    vars(shell)[name] = OrderedDict()
                elif not callable(getattr(type(each), name, None)):  # a replaced method acts on the original
                    vars(shell)[name] = copy.deepcopy(value, memo)
            if config.keeps_state and isinstance(state := vars(each).get("state"), Mapping):
                self._fill_state(vars(shell)["state"], state, rows, toys, memo)
        copied = shells[id(self._live)]
        for group in (group for shell in shells.values() for group in getattr(shell, "param_groups", ())):
            _let_train(group)
        if callable(train := getattr(copied, "train", None)):  # schedule-free optimizers have modes, as modules do
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
        """Resize a value of a parameter's state to the toy parameter: its start, or one number everywhere."""
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
        """Return a new tensor with the start values of a toy parameter."""
        start = self._start[index]
        return (start[list(rows)] if self.names[index] is not None else start.clone()).to(self.devices[index])

    def gradient(self, index: int, step: int, rows: Sequence[int], weights: Tensor, others_vary: bool) -> Tensor:
        """Return a toy parameter's gradient at this step, plus a pull of the weights towards zero."""
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
    """Return gradients for all steps whose directions agree, turn or reverse, and whose sizes jump or are zero."""
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
    """Raise learning rates that are nearly zero while they warm up, since they would show nothing."""
    lr = group.get("lr")
    if isinstance(lr, (int, float, Tensor)) and float(lr) < _LEAST_LR:
        later = group.get("initial_lr")
        later = float(later) if isinstance(later, (int, float, Tensor)) and float(later) >= _LEAST_LR else 1e-3
        group["lr"] = torch.full_like(lr, later) if isinstance(lr, Tensor) else later


@dataclass(frozen=True)
class _Outcome:
    optimizer: Optimizer
    toys: dict[str, Tensor]
    updates: list[tuple[str | None, Tensor]]
    """Update of each toy parameter, with its name if it is one of experts, whose rows are then in logical order."""
    numbers: dict[tuple, float]
    is_random: bool
    calls_step_hooks: bool


def _run(
    toys: _Toys,
    config: _Config,
    rows: Sequence[int],
    moves: bool = False,
    others_vary: bool = False,
) -> _Outcome:
    """Step a copy of the optimizer.

    Args:
        toys: Toy parameters.
        config: Configuration of the copy.
        rows: Rows of experts that the copy has.
        moves: Permute rows in the middle, together with their rows of state.
        others_vary: Change the gradients of all rows but the first.
    """
    optimizer, parameters = toys.make(rows, config)
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
                parameter.grad = toys.gradient(i, step, order, parameter.detach().double(), others_vary).to(
                    config.dtype
                )
            return torch.tensor(1.0 / (step + 1), dtype=torch.float64, device="cpu")

        closure()
        before = _seed(step, toys.devices)
        if config.has_closure:
            optimizer.step(closure)  # type: ignore[arg-type]
        else:
            optimizer.step()
        is_random |= _random_states(toys.devices) != before
    updates: list[tuple[str | None, Tensor]] = []
    for i, (name, parameter) in enumerate(zip(toys.names, parameters, strict=True)):
        end = parameter.detach()
        updates.append((name, (end[back] if name is not None else end) - toys.start(i, rows).to(config.dtype)))
    named = {str(toys.names[i]): parameters[i] for i in experts}
    return _Outcome(optimizer, dict(named), updates, _numbers(optimizer, named), is_random, bool(seen))


def _numbers(optimizer: Optimizer, toys: Mapping[str, Tensor]) -> dict[tuple, float]:
    """Return numbers of the optimizer that all rows, or all parameters, share. They must not depend on the rows.

    A number may have no effect yet, such as an estimate from which a step size is chosen later.
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
    """Return the name of an expert parameter whose update differs, or of any if another parameter or number differs.

    Args:
        whole: Outcome with all rows.
        others: Outcomes, one for each of ``rows``, with this row in its place or by itself.
        rows: Rows to compare.
    """
    any_name, dtype = next(iter(whole.toys)), whole.updates[0][1].dtype
    for row, other in zip(rows, others, strict=True):
        for (name, update), (_, other_update) in zip(whole.updates, other.updates, strict=True):
            if name is not None:
                update, other_update = update[row], other_update[row if len(other_update) == NUM_ROWS else 0]
            if _is_off(update, other_update):
                return name or any_name
        for key, number in whole.numbers.items():
            numbers = torch.tensor([number, other.numbers.get(key, number)], dtype=dtype, device="cpu")
            if _is_off(numbers[0], numbers[1]):
                return key[1] if key[1] in whole.toys else any_name
    return None


def _is_off(one: Tensor, other: Tensor) -> bool:
    tolerance = TOLERANCE if one.dtype == torch.float64 else TOLERANCE_FLOAT32
    one, other = one.double(), other.double()
    if not torch.equal(one.isnan(), other.isnan()):
        return True
    difference = (one - other).nan_to_num(0.0, posinf=float("inf")).abs()
    return bool((difference > tolerance * one.nan_to_num(0.0).abs().max()).any())


@contextmanager
def _preserve_random_state(devices: Sequence[torch.device]) -> Iterator[None]:
    """Restore all random generators on exit."""
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
