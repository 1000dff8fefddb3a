"""Redundant experts' weights out, their gradients home to the primary, both behind the primaries' compute.

Forward: :meth:`CopiesUnderway.attach`, the tokens' dispatch, :meth:`CopiesUnderway.send`, the primaries' tokens,
:meth:`CopiesUnderway.receive`, the copies' tokens. Backward, the same the other way round: the copies' tokens, their
gradients are sent home, the primaries' tokens, the tokens' way home, the gradients are waited for and added.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_eplb.parallel.groups import ExpertGroups
from lightning_eplb.parallel.packing import to_device
from lightning_eplb.parallel.row_exchange import Route, RowsUnderway
from lightning_eplb.placement import EMPTY

COPY_STAGING_BYTES = 256 * 2**20
"""What a rank's buffers hold at most while copies travel: what is more is sent when the first of it was received."""


class CopyRoutes:
    """Where one layer's redundant experts get their weights from, and which primaries their gradients go to.

    Args:
        physical_to_logical_RS: The layer's slots by rank, int64.
        primaries_per_rank: How many of a rank's slots are primaries, ``n``.
        rank: This EP rank.
    """

    def __init__(self, physical_to_logical_RS: np.ndarray, primaries_per_rank: int, rank: int) -> None:
        size, n = len(physical_to_logical_RS), primaries_per_rank
        primary_L = np.empty(size * n, dtype=np.int64)
        primary_L[physical_to_logical_RS[:, :n].ravel()] = np.arange(size * n)
        target_rank, slot = np.nonzero(physical_to_logical_RS[:, n:] != EMPTY)
        primary = primary_L[physical_to_logical_RS[target_rank, slot + n]]
        self.num_copies = len(slot)
        """Redundant slots that are filled, over all ranks."""
        self.out = Route.of_moves(primary // n, primary % n, target_rank, slot, rank, size)
        """From primary rows to redundant slots."""
        self.serving_order = np.concatenate((np.arange(n), n + self.out.recv_rows.numpy()))
        """This rank's filled slots: the primaries, then the redundant ones in the order in which weights arrive."""
        self.rounds = [torch.from_numpy(positions) for positions in _rounds_of_unique_rows(self.out.send_rows.numpy())]
        """Positions among the gradients that come home, in rounds that hit every primary once at most."""
        self._device: torch.device | None = None

    def put_on(self, device: torch.device) -> None:
        """Have the indices of rows on ``device``, once: a forward that follows has nothing to bring there."""
        if device != self._device:
            self.out = self.out.to(device)
            self.rounds = [to_device(positions.numpy(), device) for positions in self.rounds]
            self._device = device


def _rounds_of_unique_rows(rows: np.ndarray) -> list[np.ndarray]:
    order = np.argsort(rows, kind="stable")
    places = np.arange(len(rows))
    is_first = np.diff(rows[order], prepend=-1) != 0
    turn = np.empty_like(places)
    turn[order] = places - np.maximum.accumulate(np.where(is_first, places, 0))
    return [np.flatnonzero(turn == t) for t in range(int(turn.max()) + 1 if len(rows) else 0)]


class CopiesUnderway:
    """The redundant experts of one layer in one forward, and in its backward. All EP ranks use it alike.

    In the backward pass the redundant experts' gradients go home and are added to the primary's. Losses are averaged
    over ranks, as under DDP, while a primary gets the gradients of all ranks' tokens: so they are divided by the EP
    size. A copy that got no token counts as a zero gradient; its rank takes part in the collectives as the others do.

    Args:
        parameters: The expert parameters of this rank's primaries, ``[n, ...]`` each.
        routes: Of this forward.
        groups: Of the layer.
        check: Called in the backward pass, before the parameters' gradients are accumulated.
    """

    def __init__(
        self,
        parameters: list[Tensor],
        routes: CopyRoutes,
        groups: ExpertGroups,
        check: Callable[[], None] | None = None,
    ) -> None:
        self.parameters = parameters
        self.routes = routes
        self.groups = groups
        self.check = check
        routes.put_on(parameters[0].device)
        self.trained = [i for i, parameter in enumerate(parameters) if parameter.requires_grad]
        self.underway: RowsUnderway | None = None

    @property
    def num_bytes(self) -> int:
        """What crosses ranks in this forward and its backward, over all ranks."""
        returning = [i for i in self.trained if torch.is_grad_enabled()]
        weights = sum(parameter[0].nbytes for parameter in self.parameters)
        return self.routes.num_copies * (weights + sum(self.parameters[i][0].nbytes for i in returning))

    def attach(self, parts: Sequence[slice]) -> tuple[list[list[Tensor]], Tensor]:
        """The weights that the primaries compute with, views of the parameters; and the ticket for :meth:`receive`.

        Args:
            parts: Primaries that are computed together: together all of them, in order.

        Returns:
            For each part a tensor of each parameter.
        """
        *primaries, ticket = _Attach.apply(self, parts, *self.parameters)
        num_parameters = len(self.parameters)
        return [primaries[i * num_parameters : (i + 1) * num_parameters] for i in range(len(parts))], ticket

    def send(self) -> None:
        """Send the weights off."""
        assert self.groups.ep_group is not None
        self.underway = RowsUnderway(
            [[weights] for weights in self.parameters],
            self.routes.out,
            self.groups.ep_group,
            COPY_STAGING_BYTES,
            is_taken=True,
        ).send()

    def receive(self, ticket: Tensor) -> list[Tensor]:
        """Wait for the weights: for each parameter those of this rank's copies, in the order of arrival."""
        return list(_Receive.apply(self, ticket))

    def send_home(self, grads: list[Tensor]) -> None:
        """Send the copies' gradients off, those of trained parameters, rows in the order of arrival."""
        assert self.groups.ep_group is not None
        home = self.routes.out.arriving_in_order.reverse
        self.underway = RowsUnderway(
            [[grad] for grad in grads], home, self.groups.ep_group, COPY_STAGING_BYTES, is_taken=True
        ).send()

    def add_home(self, grad_of: dict[int, Tensor]) -> None:
        """Wait for the copies' gradients and add each to its primary's, in place."""
        assert self.underway is not None
        arrived, self.underway = self.underway.take(), None
        for i, rows in zip(self.trained, arrived, strict=True):
            for positions in self.routes.rounds:
                primary_rows, added = self.routes.out.send_rows, rows
                if len(self.routes.rounds) > 1:
                    primary_rows, added = primary_rows[positions], rows[positions]
                grad_of[i].index_add_(0, primary_rows, added, alpha=1 / self.groups.size)


class _Attach(torch.autograd.Function):
    """Views of the parameters, and a ticket by which the backward pass comes here after :class:`_Receive`."""

    @staticmethod
    def forward(ctx: Any, copies: CopiesUnderway, parts: Sequence[slice], *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.copies, ctx.parts = copies, parts
        views = (parameter[part] for part in parts for parameter in parameters)
        return *views, parameters[0].new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        copies: CopiesUnderway = ctx.copies
        if copies.check is not None:
            copies.check()
        num_parameters = len(copies.parameters)
        grad_of = {}
        for i in copies.trained:
            grad_of[i] = torch.empty_like(copies.parameters[i])
            for number, part in enumerate(ctx.parts):
                grad = grads[number * num_parameters + i]
                torch.div(grad, copies.groups.size, out=grad_of[i][part])
        if copies.underway is not None:
            copies.add_home(grad_of)
        return None, None, *(grad_of.get(i) for i in range(num_parameters))


class _Receive(torch.autograd.Function):
    """The copies' weights; their gradients are sent home while the primaries' are still being computed."""

    @staticmethod
    def forward(ctx: Any, copies: CopiesUnderway, ticket: Tensor) -> tuple[Tensor, ...]:
        ctx.copies = copies
        assert copies.underway is not None
        arrived, copies.underway = copies.underway.take(), None
        ctx.mark_non_differentiable(*(rows for i, rows in enumerate(arrived) if i not in copies.trained))
        return tuple(arrived)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        copies: CopiesUnderway = ctx.copies
        copies.send_home([grads[i].contiguous() for i in copies.trained])
        return None, grads[0].new_empty(0)
