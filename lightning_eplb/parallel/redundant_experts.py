"""Redundant experts: primaries send them weights in the forward pass, and they return gradients in the backward pass.

Both overlap with the compute of the primaries. Forward: :meth:`~RedundantExperts.attach_anchor`, dispatch of tokens,
:meth:`~RedundantExperts.send_weights`, compute of the primaries, :meth:`~RedundantExperts.receive_weights`, compute of
the redundant experts. Backward, in reverse: compute of the redundant experts, their gradients are sent, compute of the
primaries, dispatch of the tokens' gradients, the redundant experts' gradients are received and added.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_eplb.parallel.groups import ExpertGroups
from lightning_eplb.parallel.packing import bytes_of_row, to_device
from lightning_eplb.parallel.row_exchange import Route, RowExchange
from lightning_eplb.placement import EMPTY

STAGING_BYTES = 256 * 2**20
"""Upper bound of a rank's buffers for weights in flight. More are sent when the first of them were received."""


class RedundantRoutes:
    """Routes of weights from primaries to redundant experts of one layer, and of gradients back.

    Args:
        physical_to_logical_RS: Slots of the layer by rank, int64.
        primaries_per_rank: Number of primaries among the slots of a rank, ``n``.
        rank: EP rank of this process.
    """

    def __init__(self, physical_to_logical_RS: np.ndarray, primaries_per_rank: int, rank: int) -> None:
        size, n = len(physical_to_logical_RS), primaries_per_rank
        primary_L = np.empty(size * n, dtype=np.int64)
        primaries_X = physical_to_logical_RS[:, :n].ravel()
        places_X = np.flatnonzero(primaries_X != EMPTY)
        primary_L[primaries_X[places_X]] = places_X
        target_rank, slot = np.nonzero(physical_to_logical_RS[:, n:] != EMPTY)
        primary = primary_L[physical_to_logical_RS[target_rank, slot + n]]
        self.num_redundant = len(slot)
        """Number of filled redundant slots, over all ranks."""
        self.weights = Route.of_moves(primary // n, primary % n, target_rank, slot, rank, size)
        """Route from primary rows to redundant slots."""
        self.serving_order = np.concatenate((np.arange(n), n + self.weights.recv_rows.numpy()))
        """Slots of this rank: all of primaries, then the filled redundant ones in the order in which weights arrive."""
        rounds = _rounds_of_unique_rows(self.weights.send_rows.numpy())
        self.rounds = [torch.from_numpy(positions) for positions in rounds]
        """Positions of the returned gradients, in rounds in which every primary occurs once at most."""
        self._device: torch.device | None = None

    @property
    def gradients(self) -> Route:
        """Route of gradients, in the order in which weights arrive, to primary rows."""
        return self.weights.arriving_in_order.reverse

    def move_to(self, device: torch.device) -> None:
        """Move row indices to ``device``. Does nothing where they are there already."""
        if device != self._device:
            self.weights = self.weights.to(device)
            self.rounds = [to_device(positions.numpy(), device) for positions in self.rounds]
            self._device = device


def _rounds_of_unique_rows(rows: np.ndarray) -> list[np.ndarray]:
    """Split positions into rounds in which every row occurs once at most."""
    order = np.argsort(rows, kind="stable")
    places = np.arange(len(rows))
    is_first = np.diff(rows[order], prepend=-1) != 0
    turn = np.empty_like(places)
    turn[order] = places - np.maximum.accumulate(np.where(is_first, places, 0))
    return [np.flatnonzero(turn == t) for t in range(int(turn.max()) + 1 if len(rows) else 0)]


class RedundantExperts:
    """Redundant experts of one layer in one forward pass and its backward pass. All EP ranks call its methods alike.

    In the backward pass the gradients of redundant experts are added to those of their primaries. A primary gets the
    gradients of all ranks' tokens, while losses are averaged over ranks as under DDP. So its gradient is divided by the
    EP size. A redundant expert without tokens returns zeros, since its rank must enter the same collectives.

    Args:
        parameters: Expert parameters of this rank's primaries, ``[n, ...]`` each.
        routes: Routes of this forward pass.
        groups: Process groups of the layer.
        check: Called in the backward pass before the gradients of the parameters are accumulated.
        divisor: Number that gradients are divided by: the EP size, or 1 if gradients of rows came divided by it.
    """

    def __init__(
        self,
        parameters: list[Tensor],
        routes: RedundantRoutes,
        groups: ExpertGroups,
        check: Callable[[], None] | None = None,
        divisor: int | None = None,
    ) -> None:
        self.parameters = parameters
        self.routes = routes
        self.groups = groups
        self.check = check
        self.divisor = groups.size if divisor is None else divisor
        routes.move_to(parameters[0].device)
        self.trained = [i for i, parameter in enumerate(parameters) if parameter.requires_grad]
        self.in_flight: RowExchange | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes that cross ranks in this forward pass and its backward pass, over all ranks."""
        if not self.routes.num_redundant:
            return 0
        returned = [self.parameters[i] for i in self.trained if torch.is_grad_enabled()]
        return self.routes.num_redundant * (bytes_of_row(self.parameters) + bytes_of_row(returned))

    def attach_anchor(self, parts: Sequence[slice]) -> tuple[list[list[Tensor]], Tensor]:
        """Return the weights of the primaries, views of the parameters, and the anchor for :meth:`receive_weights`.

        Args:
            parts: Primaries that are computed together, in order. The parts cover all of them. Rows behind the last one
                get a gradient of zeros.

        Returns:
            For each part one tensor a parameter, and the anchor.
        """
        *primaries, anchor = _AttachAnchor.apply(self, parts, *self.parameters)
        num_parameters = len(self.parameters)
        return [primaries[i * num_parameters : (i + 1) * num_parameters] for i in range(len(parts))], anchor

    def send_weights(self) -> None:
        """Send the primaries' weights to the redundant experts."""
        self.in_flight = self._send(self.parameters, self.routes.weights)

    def receive_weights(self, anchor: Tensor) -> list[Tensor]:
        """Wait for the weights. Return those of this rank's redundant experts, one tensor a parameter."""
        return list(_ReceiveWeights.apply(self, anchor))

    def send_gradients(self, grads: list[Tensor]) -> None:
        """Send the gradients of redundant experts to their primaries: those of trained parameters."""
        self.in_flight = self._send(grads, self.routes.gradients)

    def add_gradients(self, grad_of: dict[int, Tensor]) -> None:
        """Wait for the gradients of redundant experts, and add each to that of its primary, in place."""
        received = self.take_in_flight()
        for i, rows in zip(self.trained, received, strict=True):
            for positions in self.routes.rounds:
                primary_rows, added = self.routes.weights.send_rows, rows
                if len(self.routes.rounds) > 1:
                    primary_rows, added = primary_rows[positions], rows[positions]
                grad_of[i].index_add_(0, primary_rows, added, alpha=1 / self.divisor)

    def take_in_flight(self) -> list[Tensor]:
        """Wait for the rows in flight and return them."""
        assert self.in_flight is not None
        received, self.in_flight = self.in_flight.take(), None
        return received

    def _send(self, tensors: list[Tensor], route: Route) -> RowExchange:
        assert self.groups.ep_group is not None
        stacks = [[tensor] for tensor in tensors]
        return RowExchange(stacks, route, self.groups.ep_group, STAGING_BYTES, is_taken=True).send()


class _AttachAnchor(torch.autograd.Function):
    """Views of the parameters, and an anchor that makes the backward pass come here after :class:`_ReceiveWeights`."""

    @staticmethod
    def forward(ctx: Any, experts: RedundantExperts, parts: Sequence[slice], *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.experts, ctx.parts = experts, parts
        views = (parameter[part] for part in parts for parameter in parameters)
        return *views, parameters[0].new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        experts: RedundantExperts = ctx.experts
        if experts.check is not None:
            experts.check()
        num_parameters = len(experts.parameters)
        grad_of = {}
        for i in experts.trained:
            parameter, stop = experts.parameters[i], ctx.parts[-1].stop
            if experts.divisor == 1 and len(ctx.parts) == 1 and experts.in_flight is None and stop == len(parameter):
                grad_of[i] = grads[i]
                continue
            grad_of[i] = torch.empty_like(parameter)
            grad_of[i][stop:] = 0
            for number, part in enumerate(ctx.parts):
                grad = grads[number * num_parameters + i]
                torch.div(grad, experts.divisor, out=grad_of[i][part])
        if experts.in_flight is not None:
            experts.add_gradients(grad_of)
        return None, None, *(grad_of.get(i) for i in range(num_parameters))


class _ReceiveWeights(torch.autograd.Function):
    """Weights of the redundant experts, whose gradients are sent before those of the primaries are computed."""

    @staticmethod
    def forward(ctx: Any, experts: RedundantExperts, anchor: Tensor) -> tuple[Tensor, ...]:
        ctx.experts = experts
        received = experts.take_in_flight()
        ctx.mark_non_differentiable(*(rows for i, rows in enumerate(received) if i not in experts.trained))
        return tuple(received)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        experts: RedundantExperts = ctx.experts
        experts.send_gradients([grads[i].contiguous() for i in experts.trained])
        return None, grads[0].new_empty(0)
