"""Trial of an optimizer on toy parameters: checks that its update of one expert does not depend on others."""

import itertools
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_eplb.relocation.optimizer_state import call_after_steps, nested_optimizers, state_of, state_rows
from lightning_eplb.relocation.toy_parameters import NUM_ROWS, NUM_STEPS, ToyParameters, TrialConfig

TOLERANCE = 1e-9
"""Largest difference, relative to the update of the row. Measured with the classes of pytorch-optimizer 4.1: those that
update rows independently differ by 0, Nero by 2.5e-10; those that don't by 2.3e-5 (AdamS) and more."""

TOLERANCE_FLOAT32 = 1e-4
"""The same for an optimizer that can't run in float64."""

_ROWS = tuple(range(NUM_ROWS))
_STEP_OF_MOVE = 6


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
    toys = ToyParameters(optimizer, experts)
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


def _first_working_config(toys: "ToyParameters") -> "tuple[TrialConfig, _Outcome]":
    errors = []
    for choices in itertools.product((torch.float64, torch.float32), (False, True), (True, False)):
        config = TrialConfig(*choices)
        try:
            return config, _run(toys, config, _ROWS)
        except Exception as error:
            errors.append(error)
    raise errors[0]


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
    toys: ToyParameters,
    config: TrialConfig,
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
