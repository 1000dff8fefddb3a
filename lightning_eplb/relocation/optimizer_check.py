"""Checks of optimizers: they must update each expert by itself, and their state must be able to move with experts."""

from collections.abc import Iterable, Mapping
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_eplb.relocation.optimizer_state import (
    copied_parameters,
    has_rows,
    leaves,
    nested_optimizers,
    parameters_of,
    state_of,
    stray_rows,
)
from lightning_eplb.relocation.optimizer_trial import run_trial


def check_optimizers(
    optimizers: Iterable[Optimizer], parameters: Mapping[str, Tensor], use_async: bool = False
) -> None:
    """Reject optimizers that mix experts, or whose state can't move with experts. Call it before the first step.

    Copies of the optimizer step on toy parameters. Needs no communication, and finds the same on all ranks. Warns of an
    optimizer that can't be tried.

    Args:
        optimizers: Optimizers with their settings. They are not stepped.
        parameters: Expert parameters of this rank by name, dimension 0 the expert.
        use_async: Transfers overlap with training, so that steps must be observed. Defaults to ``False``.

    Raises:
        ValueError: Names the optimizer, the parameter and what is wrong with them.
    """
    for optimizer in optimizers:
        name = type(optimizer).__name__
        if hasattr(optimizer, "consolidate_state_dict"):  # ZeroRedundancyOptimizer and its kin
            raise ValueError(
                f"{name} gives every rank other parameters to update and to keep state for, while"
                f" every rank has experts of its own. {_REMEDY}"
            )
        for copied in copied_parameters(optimizer, parameters):
            raise ValueError(
                f"{name} updates a copy of {copied}, whose rows can't follow the experts. Give it the parameters"
                " themselves. " + _REMEDY
            )
        mine = _held(optimizer, parameters)
        if not mine:
            continue
        _check_stray_rows(optimizer, optimizer, mine)
        for each in nested_optimizers([optimizer]):
            if type(each).__module__.startswith("torchao."):
                raise ValueError(
                    f"{type(each).__name__} of torchao keeps the state of {next(iter(mine))} in quantized blocks or on"
                    f" another device, and single experts can't be taken out of it. {_REMEDY}"
                )
        try:
            trial = run_trial(optimizer, mine)
        except Exception as error:
            rank_zero_warn(
                f"{name} could not be tried out on toy parameters ({type(error).__name__}: {error}), so that it is not"
                " known whether its update of one expert depends on others; training is right only if it does not"
            )
            continue
        if trial.mixed is not None:
            raise ValueError(
                f"{name} updates each row of a parameter by what is in the others ({trial.mixed}), and a rank has"
                f" some of the experts only: it would not be the same training. {_REMEDY}"
            )
        _check_stray_rows(optimizer, trial.optimizer, trial.toys)
        check_state([trial.optimizer], trial.toys)
        if trial.left_behind is not None:
            raise ValueError(
                f"{name} keeps something of {trial.left_behind} elsewhere than in state[parameter];"
                f" its rows can't follow the experts. {_REMEDY}"
            )
        if use_async and not trial.calls_step_hooks:
            raise ValueError(
                f"{name} calls no hooks that were registered by register_step_post_hook(), and use_async=True must"
                " know when an optimizer has stepped. Use use_async=False, or call torch.optim.Optimizer.__init__ in"
                f" {name}"
            )


def check_state(optimizers: Iterable[Optimizer], parameters: Mapping[str, Tensor]) -> None:
    """Reject optimizers whose state can't move with experts. Needs no communication.

    Args:
        optimizers: Optimizers after a step, when state exists.
        parameters: Expert parameters of this rank by name.

    Raises:
        ValueError: Names the optimizer, the parameter and the state.
    """
    for optimizer in optimizers:
        _check_stray_rows(optimizer, optimizer, _held(optimizer, parameters))
        for each in nested_optimizers([optimizer]):
            for name, parameter in _held(each, parameters).items():
                for key, entry in state_of(each, parameter).items():
                    for value in leaves(entry):
                        _check_value(type(each).__name__, name, parameter, key, value)


def _check_value(optimizer: str, name: str, parameter: Tensor, key: str, value: Any) -> None:
    if _is_scalar(value):
        return
    if not has_rows(value, parameter.shape[0]):
        raise ValueError(
            f"{optimizer} keeps {key!r} of {name} as {_describe(value)}, which has no row"
            f" for each of the rank's {parameter.shape[0]} experts and can't follow them. {_REMEDY}"
        )
    if type(value) not in (Tensor, nn.Parameter, DTensor):
        raise ValueError(
            f"{optimizer} keeps {key!r} of {name} as {type(value).__name__}, a tensor of its own kind, and single"
            f" experts can't be taken out of it. {_REMEDY}"
        )


def _check_stray_rows(named: Optimizer, optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> None:
    for place, name in stray_rows(optimizer, parameters):
        raise ValueError(
            f"{type(named).__name__} keeps a copy of {name}, or something else with its rows, in {place} and not in"
            f" state[parameter]; these rows can't follow the experts. Average what model.state_dict() returns instead."
            f" {_REMEDY}"
        )


def _held(optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the parameters that the optimizer, or one nested in it, updates."""
    owned = {id(parameter) for parameter in parameters_of(nested_optimizers([optimizer]))}
    return {name: parameter for name, parameter in parameters.items() if id(parameter) in owned}


_REMEDY = (
    "Use an optimizer with state by element or by row (AdamW, SGD with momentum, Lion, ...), or another optimizer for"
    " the experts alone."
)


def _is_scalar(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() <= 1
    return value is None or isinstance(value, (bool, int, float, str))


def _describe(value: Any) -> str:
    return f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
