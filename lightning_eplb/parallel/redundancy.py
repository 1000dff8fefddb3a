"""Redundant experts' weights out, their gradients home to the primary: one autograd function."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_eplb.parallel.groups import ExpertGroups
from lightning_eplb.parallel.rows import Route, exchange_rows
from lightning_eplb.placement import EMPTY


class CopyRoutes:
    """Where one layer's redundant experts get their weights from, and which primaries their gradients go to.

    Args:
        physical_to_logical_RS: The layer's slots by rank, int64.
        primaries_per_rank: How many of a rank's slots are primaries, ``n``.
        rank: This EP rank.
    """

    def __init__(self, physical_to_logical_RS: Tensor, primaries_per_rank: int, rank: int) -> None:
        size, slots = physical_to_logical_RS.shape
        n = primaries_per_rank
        primary_L = torch.empty(size * n, dtype=torch.int64)
        primary_L[physical_to_logical_RS[:, :n].reshape(-1)] = torch.arange(size * n)
        target_rank, slot = torch.nonzero(physical_to_logical_RS[:, n:] != EMPTY, as_tuple=True)
        primary = primary_L[physical_to_logical_RS[target_rank, slot + n]]
        self.num_rows = slots - n if len(slot) else 0
        """Redundant slots of this rank, ``e``, filled or empty; 0 where those of all ranks are empty."""
        self.out = Route.of_moves(primary // n, primary % n, target_rank, slot, rank, size)
        """From primary rows to redundant rows."""
        self.rounds = _rounds_of_unique_rows(self.out.send_rows)
        """Positions among the gradients that come home, in rounds that hit every primary once at most."""
        self.fills_every_slot = len(self.out.recv_rows) == self.num_rows


def _rounds_of_unique_rows(rows: Tensor) -> list[Tensor]:
    _, expert, times = torch.unique(rows, return_inverse=True, return_counts=True)
    grouped = torch.argsort(expert, stable=True)
    turn = torch.empty_like(rows)
    turn[grouped] = torch.arange(len(rows)) - torch.repeat_interleave(torch.cumsum(times, 0) - times, times)
    return [torch.nonzero(turn == t).flatten() for t in range(int(times.max()) if len(rows) else 0)]


def with_copies(
    parameters: list[Tensor], routes: CopyRoutes, groups: ExpertGroups
) -> tuple[list[Tensor], list[Tensor]]:
    """The weights that this rank computes with: its primaries' and its redundant experts'. All EP ranks call it.

    In the backward pass the redundant experts' gradients go home and are added to the primary's. Losses are averaged
    over ranks, as under DDP, while a primary gets the gradients of all ranks' tokens: so they are divided by the EP
    size, and averaged over the EP groups that hold the same rows. A slot that got no token counts as a zero gradient;
    its rank takes part in the collectives as the others do.

    Args:
        parameters: The expert parameters of this rank's primaries, ``[n, ...]`` each.

    Returns:
        Views of ``parameters``, and for each of them the redundant experts' rows, ``[e, ...]``.
    """
    weights = _WithCopies.apply(routes, groups, *parameters)
    return list(weights[: len(parameters)]), list(weights[len(parameters) :])


class _WithCopies(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, routes: CopyRoutes, groups: ExpertGroups, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.routes, ctx.groups = routes, groups
        primaries = tuple(parameter.view_as(parameter) for parameter in parameters)
        if routes.num_rows == 0:
            return primaries
        new = torch.Tensor.new_empty if routes.fills_every_slot else torch.Tensor.new_zeros
        copies = tuple(new(parameter, (routes.num_rows, *parameter.shape[1:])) for parameter in parameters)
        assert groups.exchange is not None
        exchange_rows(parameters, copies, routes.out, groups.exchange)
        return primaries + copies

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        routes: CopyRoutes = ctx.routes
        groups: ExpertGroups = ctx.groups
        trained = [i for i, needed in enumerate(ctx.needs_input_grad[2:]) if needed]
        grad_of: dict[int, Tensor] = {i: grads[i] / groups.size for i in trained}
        if routes.num_rows:
            parameters = len(ctx.needs_input_grad) - 2
            sent = [grads[parameters + i].contiguous() for i in trained]
            home = [grad.new_empty(len(routes.out.send_rows), *grad.shape[1:]) for grad in sent]
            arrival = routes.out.reverse.arriving_in_order
            assert groups.exchange is not None
            exchange_rows(sent, home, arrival, groups.exchange)
            for i, rows in zip(trained, home, strict=True):
                for positions in routes.rounds:
                    at = positions.to(rows.device)
                    primary_rows = routes.out.send_rows.to(rows.device)[at]
                    grad_of[i].index_add_(0, primary_rows, rows[at], alpha=1 / groups.size)
        if groups.replicas is not None:
            for i in trained:
                dist.all_reduce(grad_of[i], group=groups.replicas)
                grad_of[i] /= groups.num_replicas
        return None, None, *(grad_of.get(i) for i in range(len(ctx.needs_input_grad) - 2))
