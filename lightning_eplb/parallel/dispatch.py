"""Tokens out to the ranks of their experts, and home again.

Shape suffixes: ``N`` token-expert pairs of this rank (tokens times top-k), ``M`` pairs that this rank serves, ``L``
logical experts, ``P`` slots, ``R`` ranks, ``S`` slots of a rank, ``D`` model width.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_eplb.parallel.groups import ExpertGroups
from lightning_eplb.parallel.rows import all_gather_single
from lightning_eplb.policies.split import split_tokens


@dataclass(frozen=True, eq=False)
class SlotMap:
    """What one layer's slots hold, as the dispatcher reads it.

    Attributes:
        slots: The logical expert of each slot, ``[R, S]`` int64, ``-1`` empty.
        node_of_rank: ``[R]`` int64.
        weights: What a token costs on each rank, ``[R]`` float64: :func:`~lightning_eplb.policies.split.rank_weights`.
    """

    slots: np.ndarray
    node_of_rank: np.ndarray
    weights: np.ndarray


@dataclass(frozen=True, eq=False)
class Dispatch:
    """How one batch's tokens travel in one layer. Every rank derives its own from the counts of all ranks.

    Attributes:
        pairs: This rank's token-expert pairs in the order in which they are sent, by slot: indices into ``[T, K]``
            flattened, ``[N]``. A pair is sent to the same slot whenever the same counts are dispatched, so that
            recomputation in the backward pass repeats the forward pass.
        send_counts: Pairs for each rank, ``[R]``.
        recv_counts: Pairs from each rank, ``[R]``.
        slots: The slot on this rank that each received pair is for, ``[M]`` int64.
        tokens: Pairs that each rank serves, ``[R]``.
        by_slot: The received pairs in the order of their slots, primaries first, indices ``[M]``.
        num_primary: How many of the received pairs are for primaries.
    """

    pairs: Tensor
    send_counts: list[int]
    recv_counts: list[int]
    slots: Tensor
    tokens: np.ndarray
    by_slot: Tensor
    num_primary: int


def count_tokens(sorted_experts_N: Tensor, num_logical_experts: int) -> Tensor:
    """Pairs of each logical expert, ``[L]`` int64, without waiting for a device; ids from ``L`` up are no expert's."""
    experts = torch.arange(num_logical_experts + 1, device=sorted_experts_N.device, dtype=sorted_experts_N.dtype)
    return torch.searchsorted(sorted_experts_N, experts).diff()


def gather_counts(counts_L: Tensor, groups: ExpertGroups) -> np.ndarray:
    """The counts of every rank on the host, ``[R, L]`` int64. All ranks of the EP group call it: one all-gather."""
    assert groups.exchange is not None
    counts_RL = counts_L.new_empty(groups.size * len(counts_L))
    all_gather_single(counts_RL, counts_L.contiguous(), group=groups.exchange)
    return counts_RL.view(groups.size, len(counts_L)).cpu().numpy()


def plan_dispatch(
    order_N: Tensor, counts_RL: np.ndarray, slot_map: SlotMap, rank: int, num_primary_slots: int
) -> Dispatch:
    """Decide which slot serves which of this rank's pairs, from the counts of all ranks. Needs no communication.

    Args:
        order_N: This rank's pairs sorted by logical expert, stable: indices into ``[T, K]`` flattened.
        counts_RL: Pairs of each rank and logical expert.
        slot_map: What the layer's slots hold.
        rank: This EP rank.
        num_primary_slots: ``n``, the primaries of a rank.
    """
    size, device = len(counts_RL), order_N.device
    sent_RS, recv_RS, tokens_R = split_tokens(counts_RL, slot_map.slots, slot_map.node_of_rank, slot_map.weights, rank)
    sent_P = sent_RS.ravel()

    # Sorted by expert, the pairs of a slot are one run: behind those of the expert's earlier slots.
    by_expert_P = np.argsort(slot_map.slots.ravel(), kind="stable")
    first_P = np.empty_like(sent_P)
    first_P[by_expert_P] = np.cumsum(sent_P[by_expert_P]) - sent_P[by_expert_P]
    pairs = order_N[_runs(first_P, sent_P, device)]

    recv_counts = recv_RS.sum(axis=1)
    slot_ids = np.tile(np.arange(recv_RS.shape[1]), size)
    total = int(recv_counts.sum())
    slots = torch.repeat_interleave(_tensor(slot_ids, device), _tensor(recv_RS.ravel(), device), output_size=total)
    first_RS = (np.cumsum(recv_RS.ravel()) - recv_RS.ravel()).reshape(recv_RS.shape)
    return Dispatch(
        pairs=pairs,
        send_counts=sent_RS.sum(axis=1).tolist(),
        recv_counts=recv_counts.tolist(),
        slots=slots,
        tokens=tokens_R,
        by_slot=_runs(first_RS.T.ravel(), recv_RS.T.ravel(), device),
        num_primary=int(recv_RS[:, :num_primary_slots].sum()),
    )


def exchange_tokens(rows: Tensor, send_counts: list[int], recv_counts: list[int], groups: ExpertGroups) -> Tensor:
    """Send rows to the ranks they are for and return those for this rank, in the order of their source ranks.

    Differentiable: the backward pass sends gradients the other way, in which all ranks of the EP group take part.

    Args:
        rows: ``[N, D]`` in the order of destination ranks.
        send_counts: Rows for each rank.
        recv_counts: Rows from each rank.
    """
    return _AllToAll.apply(rows, send_counts, recv_counts, groups.exchange)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, send_counts: list[int], recv_counts: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.send_counts, ctx.recv_counts, ctx.group = send_counts, recv_counts, group
        received = rows.new_empty(sum(recv_counts), *rows.shape[1:])
        dist.all_to_all_single(received, rows.contiguous(), recv_counts, send_counts, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        home = grad.new_empty(sum(ctx.send_counts), *grad.shape[1:])
        dist.all_to_all_single(home, grad.contiguous(), ctx.send_counts, ctx.recv_counts, group=ctx.group)
        return home, None, None, None


def take_apart(rows: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """The rows at the indices ``first`` and those at ``second``, which together are all rows, each once."""
    return _TakeApart.apply(rows, first, second)


def put_together(first_rows: Tensor, second_rows: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Undo :func:`take_apart`."""
    return _PutTogether.apply(first_rows, second_rows, first, second)


class _TakeApart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(first, second)
        return rows.index_select(0, first), rows.index_select(0, second)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _interleaved(*grads, *ctx.saved_tensors), None, None


class _PutTogether(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, first_rows: Tensor, second_rows: Tensor, first: Tensor, second: Tensor) -> Tensor:
        ctx.save_for_backward(first, second)
        return _interleaved(first_rows, second_rows, first, second)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (first, second) = grads, ctx.saved_tensors
        return grad.index_select(0, first), grad.index_select(0, second), None, None


def _interleaved(first_rows: Tensor, second_rows: Tensor, first: Tensor, second: Tensor) -> Tensor:
    rows = first_rows.new_empty(len(first) + len(second), *first_rows.shape[1:])
    return rows.index_copy_(0, first, first_rows).index_copy_(0, second, second_rows)


def _runs(first: np.ndarray, length: np.ndarray, device: torch.device) -> Tensor:
    """The indices of runs, one run after the other: ``first[i], first[i] + 1, ... first[i] + length[i] - 1``."""
    total = int(length.sum())
    shift = first - (np.cumsum(length) - length)
    shifts = torch.repeat_interleave(_tensor(shift, device), _tensor(length, device), output_size=total)
    return shifts + torch.arange(total, device=device)


def _tensor(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)
