"""Transfer of a resize: parameters, optimizer state and gradients get another number of rows, filled by other ranks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_eplb.parallel.packing import bytes_of_row
from lightning_eplb.parallel.row_exchange import Route, RowExchange
from lightning_eplb.relocation.optimizer_state import has_rows, leaves, map_leaves, state_of, state_rows
from lightning_eplb.relocation.resize_plan import RowMoves


def replace_rows(module: nn.Module, optimizers: Sequence[Optimizer], moves: RowMoves, least_rows: int = 0) -> int:
    """Give a layer's tensors the rows that ``moves`` says. All ranks of the default group call it with the same moves.

    Parameters stay the same objects, with other data and gradients. Optimizer state gets new tensors.

    Args:
        module: Converted expert module. Its tensors have the rows that ``moves`` reads.
        optimizers: Optimizers with those nested in them.
        moves: Source of each row afterwards.
        least_rows: Rows that each rank has at least. Those of phantom experts, behind the others, are zeros.

    Returns:
        Bytes that crossed ranks, over all ranks.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    crosses = moves.source_rank != moves.target_rank
    mine = (moves.target_rank == rank) & ~crosses
    own_rows, own_targets = (torch.from_numpy(rows[mine]) for rows in (moves.source_row, moves.target_row))
    places = (moves.source_rank, moves.source_row, moves.target_rank, moves.target_row)
    route = Route.of_moves(*(place[crosses] for place in places), rank=rank, size=size)
    num_rows = max(int((moves.target_rank == rank).sum()), least_rows)
    group = dist.group.WORLD
    assert group is not None
    parameters = list(module.parameters(recurse=False))
    before = [tensor for parameter in parameters for tensor in _tensors_of(parameter, optimizers)]
    with torch.no_grad():
        after = [tensor.new_zeros(num_rows, *tensor.shape[1:]) for tensor in before]
        for old, new in zip(before, after, strict=True):
            new[own_targets.to(new.device)] = old[own_rows.to(old.device)]
        for device in sorted({str(tensor.device) for tensor in before}):
            on_device = [i for i, tensor in enumerate(before) if str(tensor.device) == device]
            exchange = RowExchange([[before[i]] for i in on_device], route, group).send()
            exchange.prepare_write([[after[i]] for i in on_device]).write()
        replaced = {id(old): new for old, new in zip(before, after, strict=True)}
        for parameter in parameters:
            _install(parameter, optimizers, replaced)
    return int(crosses.sum()) * bytes_of_row(before)


def _tensors_of(parameter: nn.Parameter, optimizers: Sequence[Optimizer]) -> list[Tensor]:
    """Return a parameter, its optimizer state and its gradient, as far as they have its rows."""
    gradient = [] if parameter.grad is None else [parameter.grad]
    return [parameter, *state_rows(optimizers, parameter), *gradient]


def _install(parameter: nn.Parameter, optimizers: Sequence[Optimizer], replaced: dict[int, Tensor]) -> None:
    for optimizer in optimizers:
        state = state_of(optimizer, parameter)
        for key in state:
            state[key] = map_leaves(lambda value: replaced.get(id(value), value), state[key])
    gradient = parameter.grad
    parameter.grad = None
    set_data(parameter, replaced[id(parameter)])
    if gradient is not None:
        parameter.grad = replaced[id(gradient)]


def set_data(parameter: nn.Parameter, data: Tensor) -> None:
    """Set the data of a parameter to a tensor of another shape.

    A graph that is still alive holds the parameter's gradient accumulator, which would reduce gradients to the old
    shape. A change of the dtype makes autograd create another one.
    """
    other = torch.float16 if data.dtype != torch.float16 else torch.float32
    parameter.data = torch.empty(0, dtype=other, device=data.device)
    parameter.data = data


def check_unambiguous(parameters: dict[str, nn.Parameter], optimizers: Sequence[Optimizer]) -> None:
    """Raise ``ValueError`` if a rank has one expert and state of shape ``[1]``, which is a row or belongs to all."""
    for name, parameter in parameters.items():
        for optimizer in optimizers if len(parameter) == 1 and parameter.ndim > 1 else ():
            state = state_of(optimizer, parameter)
            for key in state:
                if any(isinstance(value, Tensor) and value.shape == (1,) for value in leaves(state[key])):
                    raise ValueError(
                        f"{key!r} of {type(optimizer).__name__} for {name} has shape [1] where each rank holds one"
                        " expert, so that a number for each expert can't be told from one for all of them."
                        " Resume from a checkpoint on another number of ranks instead."
                    )


@dataclass(frozen=True)
class _Rows:
    """Tensor of optimizer state with a row for each expert, without its rows."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    is_beside_parameter: bool


@dataclass(frozen=True)
class _Shared:
    """Tensor of optimizer state that is the same on all ranks."""

    value: Tensor
    is_beside_parameter: bool


@dataclass(frozen=True)
class StateLayout:
    """State of one parameter, as a joining rank creates it.

    Attributes:
        has_gradient: The parameter has a gradient.
        states: ``state[parameter]`` of each optimizer, with :class:`_Rows` and :class:`_Shared` in place of tensors.
    """

    has_gradient: bool
    states: list[dict[Any, Any]]

    @classmethod
    def of(cls, parameter: nn.Parameter, optimizers: Sequence[Optimizer]) -> "StateLayout":
        """Describe the state of a parameter."""

        def described(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            beside = value.device == parameter.device
            if has_rows(value, len(parameter)):
                return _Rows(tuple(value.shape[1:]), value.dtype, beside)
            return _Shared(value.detach().cpu(), beside)

        states = [
            {key: map_leaves(described, value) for key, value in state_of(optimizer, parameter).items()}
            for optimizer in optimizers
        ]
        return cls(parameter.grad is not None, states)

    def signature(self) -> str:
        """Return text that is the same on ranks with the same layout. Values of all experts are left out."""

        def shown(value: Any) -> str:
            kind = type(value).__name__
            return str((kind, value.shape, value.dtype)) if isinstance(value, _Rows) else kind

        states = [
            [(str(key), [shown(leaf) for leaf in leaves(state[key])]) for key in sorted(state, key=str)]
            for state in self.states
        ]
        return str((self.has_gradient, states))

    def create(self, parameter: nn.Parameter, optimizers: Sequence[Optimizer]) -> None:
        """Create state and gradient of a parameter without rows, so that it can receive them."""

        def created(value: Any) -> Any:
            if isinstance(value, _Rows):
                device = parameter.device if value.is_beside_parameter else torch.device("cpu")
                return torch.empty(0, *value.shape, dtype=value.dtype, device=device)
            if isinstance(value, _Shared):
                return value.value.to(parameter.device) if value.is_beside_parameter else value.value.clone()
            return value

        parameter.grad = torch.empty_like(parameter) if self.has_gradient else None
        known: set[int] = set()
        for optimizer, state in zip(optimizers, self.states, strict=True):
            if not state or id(state_of(optimizer, parameter)) in known:
                continue  # a wrapper may expose the state of the wrapped optimizer
            optimizer.state[parameter] = {key: map_leaves(created, value) for key, value in state.items()}
            known.add(id(state_of(optimizer, parameter)))
