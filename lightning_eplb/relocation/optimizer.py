"""Which tensors of an optimizer's state have a row for each expert."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

LEAST_MIXED = 1e-4
"""Of an update: what differs by less is rounding, as in an optimizer that computes in bfloat16."""


def state_rows(optimizers: Iterable[Optimizer], parameter: Tensor) -> list[Tensor]:
    """The tensors that the optimizers keep for ``parameter`` and that have its rows: moments, momentum, fp32 masters,
    row-wise factors. Scalars, such as AdamW's ``step``, belong to the whole parameter and stay where they are.

    Returns:
        Tensors ``[n, ...]``, in an order that is the same on every rank.
    """
    states = (optimizer.state.get(parameter, {}) for optimizer in optimizers)
    return [value for state in states for _, value in sorted(state.items()) if has_rows(value, parameter.shape[0])]


def has_rows(value: Any, num_rows: int) -> bool:
    """Whether a value of a parameter's state is a tensor with a row for each of its experts."""
    return isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == num_rows


def check_optimizers(optimizers: Iterable[Optimizer], parameters: dict[str, Tensor]) -> None:
    """Refuse an optimizer whose state for experts can't be moved with them. Needs no communication.

    Args:
        optimizers: After their first step, when state exists.
        parameters: This rank's expert parameters by name, dimension 0 the expert.

    Raises:
        ValueError: Names the optimizer, the parameter and the state.
    """
    for optimizer in optimizers:
        if hasattr(optimizer, "consolidate_state_dict"):  # ZeroRedundancyOptimizer and its kin
            raise ValueError(
                f"{type(optimizer).__name__} gives every rank other parameters to update and to keep state for, while"
                f" every rank has experts of its own. {_REMEDY}"
            )
        owned = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        mine = {name: parameter for name, parameter in parameters.items() if id(parameter) in owned}
        if mine and mixes_rows(optimizer):
            raise ValueError(
                f"{type(optimizer).__name__} updates each row of a parameter by what is in the others, and a rank has"
                f" some of the experts only: it would not be the same training. {_REMEDY}"
            )
        for name, parameter in mine.items():
            state = optimizer.state.get(parameter, {})
            if not state and parameter.grad is not None and _keeps_tensors(optimizer):
                raise ValueError(
                    f"{type(optimizer).__name__} keeps its state for {name} elsewhere than in state[parameter];"
                    f" its rows can't follow the experts. {_REMEDY}"
                )
            for key, value in state.items():
                if not _is_scalar(value) and not has_rows(value, parameter.shape[0]):
                    raise ValueError(
                        f"{type(optimizer).__name__} keeps {key!r} of {name} as {_describe(value)}, which has no row"
                        f" for each of the rank's {parameter.shape[0]} experts and can't follow them. {_REMEDY}"
                    )


def mixes_rows(optimizer: Optimizer) -> bool:
    """Whether what an optimizer does to a row depends on other rows of the parameter, as a norm of it all does.

    It is tried: an optimizer of the same class and settings steps on two rows, and on the first of them alone. One that
    can't be made that way is taken to update by element. The generator of random numbers is left as it was.
    """
    start = torch.arange(1.0, 9.0, dtype=torch.float64, device="cpu").view(2, 2, 2)
    grad = start.new_tensor([[[1.0, -2.0], [3.0, 0.5]], [[50.0, 40.0], [-90.0, 7.0]]])
    updates = []
    with torch.random.fork_rng(devices=[]):
        for num_rows in (1, 2):
            rows = nn.Parameter(start[:num_rows].clone())
            try:
                settings = {key: value for key, value in optimizer.defaults.items() if not isinstance(value, Tensor)}
                tried = type(optimizer)([rows], **settings)
                for step in (1, 2):
                    torch.default_generator.manual_seed(step)  # noise that is added is the same for the first row
                    rows.grad = step * grad[:num_rows]
                    tried.step()
            except Exception:
                return False
            updates.append(rows.detach()[0] - start[0])
    alone, together = updates
    return bool((alone - together).abs().max() > LEAST_MIXED * alone.abs().max())


_REMEDY = (
    "Optimizers with state by element or by row would do (AdamW, SGD with momentum, Lion, ...), as would another"
    " optimizer for the experts alone"
)


def _is_scalar(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() <= 1
    return value is None or isinstance(value, (bool, int, float, str))


def _keeps_tensors(optimizer: Optimizer) -> bool:
    return any(
        not _is_scalar(value)
        for state in optimizer.state.values()
        if isinstance(state, dict)
        for value in state.values()
    )


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    if isinstance(value, Sequence):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"
