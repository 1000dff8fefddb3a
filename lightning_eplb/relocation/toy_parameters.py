"""Toy parameters for the trial of an optimizer, and copies of the optimizer that update them."""

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_eplb import _compat
from lightning_eplb.relocation.optimizer_state import contents, nested_optimizers

NUM_STEPS = 12
NUM_ROWS = 3
_SHAPE_OF_EXPERTS = (NUM_ROWS, 6, 5, 2, 2)
_SHAPE_OF_OTHERS = (5, 4, 2, 2, 2)
_SCALE = (1, 1, 100, 1, 0.01, 1, 1, 1, 100, 1, 0.1, 1)
_SCALE_OF_ROW = (1, 10, 0.1)
_STEPS_THAT_AGREE = (5, 6, 7)
_STEP_BACK = 8
_STEPS_ALONG_THE_LEVEL = (3, 9)
_LEAST_LR = 1e-6


@dataclass(frozen=True)
class TrialConfig:
    """Configuration of the copies."""

    dtype: torch.dtype
    """Dtype of the toy parameters. Some optimizers don't support float64."""
    keeps_state: bool
    """Resize existing state to the toy parameters, else copies start without state."""
    has_closure: bool


class ToyParameters:
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

    def make(self, rows: Sequence[int], config: TrialConfig) -> tuple[Optimizer, list[nn.Parameter]]:
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
