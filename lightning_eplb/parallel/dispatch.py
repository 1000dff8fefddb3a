"""Tokens out to the ranks of their experts, and home again.

Shape suffixes: ``N`` token-expert pairs of this rank (tokens times top-k), ``M`` pairs that this rank serves, ``T``
tokens, ``K`` top-k, ``L`` logical experts, ``P`` slots, ``R`` ranks, ``S`` slots of a rank, ``D`` model width.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_eplb.parallel.groups import ExpertGroups
from lightning_eplb.parallel.permute import combine_pairs, copy_to_pairs, put_together, take_apart
from lightning_eplb.parallel.pieces import to_device
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
            flattened, ``[N]`` int64. A pair is sent to the same slot whenever the same counts are dispatched, so that
            recomputation in the backward pass repeats the forward pass.
        sent: How many of them are for each slot of all ranks, ``[P]`` int64, on the host.
        send_counts: Pairs for each rank, ``[R]``.
        recv_counts: Pairs from each rank, ``[R]``.
        by_slot: The received pairs in the order in which they are served: the primaries' by slot, then the redundant
            experts', these in the order in which their weights arrive. Indices ``[M]`` int64.
        served: How many pairs each of these experts serves, in the same order, on the host; and what they add up to
            so far, int32 on the device.
        served_ends: See ``served``.
        num_primary: How many of the received pairs are for primaries.
        tokens: Pairs that each rank serves, ``[R]``.
    """

    pairs: Tensor
    sent: np.ndarray
    send_counts: list[int]
    recv_counts: list[int]
    by_slot: Tensor
    served: np.ndarray
    served_ends: Tensor
    num_primary: int
    tokens: np.ndarray


class TokenDispatcher:
    """The seam for another way to exchange tokens: subclass it, and name it as ``parallelize_experts(dispatcher=...)``.

    A converted layer calls :meth:`dispatch`, computes, and calls :meth:`combine`, on all ranks of its EP group, also
    on those that have no token or serve none; in the backward pass autograd does the same the other way round. Who
    serves which pair is decided before, and is alike on all ranks: ``plan``. ``plan.pairs`` and ``plan.sent`` say
    which slot each pair goes to, ``plan.recv_counts`` and ``plan.by_slot`` what arrives here. Both methods must be
    differentiable in what they are given, the routing weights included, and may not wait for the device.

    This one packs the pairs into one ``all_to_all_single`` out and one home.

    Args:
        groups: The ranks that share the layer's experts; ``groups.exchange`` is their process group.
    """

    def __init__(self, groups: ExpertGroups) -> None:
        self.groups = groups

    def dispatch(self, hidden_TD: Tensor, plan: Dispatch, top_k: int) -> tuple[Tensor, Tensor]:
        """Bring this rank the tokens that it serves.

        Returns:
            Rows for the primaries, in the order of their slots, and for the redundant experts, in the order of
            ``plan.served``; within an expert in any order that is the same whenever the same counts are dispatched.
        """
        sent_ND = copy_to_pairs(hidden_TD, plan.pairs, top_k)
        received_MD = exchange_tokens(sent_ND, plan.send_counts, plan.recv_counts, self.groups)
        return take_apart(received_MD, *plan.by_slot.tensor_split((plan.num_primary,)))

    def combine(self, primaries_MD: Tensor, copies_MD: Tensor, weights_TK: Tensor, plan: Dispatch) -> Tensor:
        """Bring the experts' outputs home, and add up each token's, weighted.

        Args:
            primaries_MD: Outputs, in the order of the rows that :meth:`dispatch` returned first.
            copies_MD: The same for the others.
            weights_TK: The router's, in any floating dtype.
            plan: As in :meth:`dispatch`.

        Returns:
            ``[T, D]``, in the outputs' dtype.
        """
        output_MD = put_together(primaries_MD, copies_MD, *plan.by_slot.tensor_split((plan.num_primary,)))
        home_ND = exchange_tokens(output_MD, plan.recv_counts, plan.send_counts, self.groups)
        return combine_pairs(home_ND, weights_TK, plan.pairs)


def count_tokens(index_TK: Tensor, num_logical_experts: int) -> Tensor:
    """Pairs of each logical expert, ``[L]`` int64, without waiting for a device; ids from ``L`` up are no expert's."""
    experts_N = index_TK.detach().reshape(-1).clamp(max=num_logical_experts)
    counts = torch.zeros(num_logical_experts + 1, dtype=torch.int64, device=experts_N.device)
    return counts.scatter_add_(0, experts_N.to(torch.int64), torch.ones_like(experts_N, dtype=torch.int64))[:-1]


def sort_pairs(index_TK: Tensor, num_logical_experts: int) -> tuple[Tensor, Tensor]:
    """This rank's pairs by logical expert, stable: indices into ``[T, K]`` flattened ``[N]``; and counts ``[L]`` int64.

    Neither waits for a device. Ids are compared as int16 where they fit: a radix sort's passes are the key's bytes.
    """
    experts_N = index_TK.detach().reshape(-1).clamp(max=num_logical_experts)
    small = torch.int16 if num_logical_experts < 2**15 else torch.int32
    sorted_N, order_N = torch.sort(experts_N.to(small), stable=True)
    experts = torch.arange(num_logical_experts + 1, device=sorted_N.device, dtype=sorted_N.dtype)
    return order_N, torch.searchsorted(sorted_N, experts).diff()


def gather_counts(counts_L: Tensor, groups: ExpertGroups) -> np.ndarray:
    """The counts of every rank on the host, ``[R, L]`` int64. All ranks of the EP group call it: one all-gather."""
    assert groups.exchange is not None
    counts_RL = counts_L.new_empty(groups.size * len(counts_L))
    all_gather_single(counts_RL, counts_L.contiguous(), group=groups.exchange)
    return counts_RL.view(groups.size, len(counts_L)).cpu().numpy()


def plan_dispatch(
    order_N: Tensor, counts_RL: np.ndarray, slot_map: SlotMap, rank: int, serving_order: np.ndarray, num_primaries: int
) -> Dispatch:
    """Decide which slot serves which of this rank's pairs, from the counts of all ranks. Needs no communication.

    Args:
        order_N: This rank's pairs sorted by logical expert, stable: indices into ``[T, K]`` flattened.
        counts_RL: Pairs of each rank and logical expert.
        slot_map: What the layer's slots hold.
        rank: This EP rank.
        serving_order: This rank's filled slots in the order in which they are served, primaries first.
        num_primaries: ``n``, how many of these are primaries.
    """
    sent_RS, recv_RS, tokens_R = split_tokens(counts_RL, slot_map.slots, slot_map.node_of_rank, slot_map.weights, rank)
    sent_P = sent_RS.ravel()

    # Sorted by expert, the pairs of a slot are one run: behind those of the expert's earlier slots.
    by_expert_P = np.argsort(slot_map.slots.ravel(), kind="stable")
    first_P = np.empty_like(sent_P)
    first_P[by_expert_P] = np.cumsum(sent_P[by_expert_P]) - sent_P[by_expert_P]
    # Received rank by rank, and within a rank slot by slot, they are served slot by slot.
    first_RS = (np.cumsum(recv_RS.ravel()) - recv_RS.ravel()).reshape(recv_RS.shape)
    first_SR, recv_SR = (array_RS.T[serving_order] for array_RS in (first_RS, recv_RS))
    served = recv_SR.sum(axis=1)

    shifts, lengths, (num_sent, num_served) = _runs((first_P, sent_P), (first_SR.ravel(), recv_SR.ravel()))
    on_device = to_device(np.concatenate((shifts, lengths, np.cumsum(served))), order_N.device)
    shifts, lengths, ends = on_device.split((len(shifts), len(lengths), len(served)))
    index = torch.repeat_interleave(shifts, lengths, output_size=num_sent + num_served)
    index += torch.arange(num_sent + num_served, device=index.device)
    return Dispatch(
        pairs=order_N[index[:num_sent]],
        sent=sent_P,
        send_counts=sent_RS.sum(axis=1).tolist(),
        recv_counts=recv_RS.sum(axis=1).tolist(),
        by_slot=index[num_sent:],
        served=served,
        served_ends=ends.to(torch.int32),
        num_primary=int(served[:num_primaries].sum()),
        tokens=tokens_R,
    )


def _runs(*lists: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Lists of runs as one. Of a run, its first index and its length become a shift from its place, and its length.

    So ``shifts`` repeated ``lengths`` times, plus ``0, 1, 2 ...``, are all lists' indices one after the other.

    Returns:
        Shifts and lengths of all runs, and how many indices each list has.
    """
    lengths = np.concatenate([length for _, length in lists])
    shifts = np.concatenate([first for first, _ in lists]) - (np.cumsum(lengths) - lengths)
    return shifts, lengths, [int(length.sum()) for _, length in lists]


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
