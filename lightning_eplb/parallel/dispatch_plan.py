"""Plan of a dispatch: the slot that computes each token-expert pair, from the counts of all ranks.

Shape suffixes: ``N`` token-expert pairs of this rank (tokens times top-k), ``T`` tokens, ``K`` top-k, ``L`` logical
experts, ``R`` ranks, ``S`` slots of a rank.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from lightning_eplb._compiled import compiled
from lightning_eplb.parallel.groups import ExpertGroups
from lightning_eplb.parallel.packing import to_device
from lightning_eplb.parallel.row_exchange import all_gather_single
from lightning_eplb.policies.token_split import split_tokens

COUNT_BITS = 40
"""Bits of a token count as ranks exchange it. The bits above carry a payload."""


@dataclass(frozen=True, eq=False)
class SlotMap:
    """Slots of one layer, as the dispatcher reads them.

    Attributes:
        slots: Logical expert of each slot, ``[R, S]`` int64, ``-1`` where the slot is empty.
        node_of_rank: Node of each rank, ``[R]`` int64.
        weights: Cost of a token on each rank, ``[R]`` float64, see
            :func:`~lightning_eplb.policies.token_split.rank_weights`.
    """

    slots: np.ndarray
    node_of_rank: np.ndarray
    weights: np.ndarray


@dataclass(frozen=True, eq=False)
class Routing:
    """Number of pairs that each slot computes, in one layer and batch. Every rank derives its own from all counts.

    Attributes:
        counts: Pairs of each rank and logical expert, ``[R, L]`` int64.
        slots: Logical expert of each slot, ``[R, S]`` int64, ``-1`` where the slot is empty.
        sent: Pairs of this rank for each slot, ``[R, S]`` int64. The pairs of an expert go to its replicas in runs, in
            the order of ranks, each run in the order of tokens and choices.
        received: Pairs from each rank for each slot of this rank, ``[R, S]`` int64.
        tokens: Pairs that each rank computes, ``[R]`` int64.
        serving_order: Filled slots of this rank in the order in which they are computed: primaries, then redundant
            experts in the order in which their weights arrive.
        num_primaries: Number of primaries of a rank, ``n``.
        rank: EP rank of this process.
    """

    counts: np.ndarray
    slots: np.ndarray
    sent: np.ndarray
    received: np.ndarray
    tokens: np.ndarray
    serving_order: np.ndarray
    num_primaries: int
    rank: int


@dataclass(frozen=True, eq=False)
class Part:
    """Pairs that travel in one collective: those of some slots of each rank, the same slots on all ranks.

    Attributes:
        primaries: Primaries of each rank that the part is for. The last part is also for the redundant experts.
        sent: Pairs of this rank for each slot, ``[R, ...]`` int64, from slot ``primaries.start`` to the last slot of
            the part. They are contiguous in ``pairs``, ordered by rank and within a rank by slot.
        served: Slots of this rank in the order of ``primary_ends``, then of ``copy_ends``, int64.
        send_counts: Pairs of this rank for each rank, ``[R]``: the sums of ``sent``.
        recv_counts: Pairs that this rank receives from each rank, ``[R]``.
        primary_rows: Indices, int64, of the received pairs that primaries compute, in the order of their slots. The
            pairs arrive ordered by rank and within a rank by slot.
        copy_rows: Indices of the received pairs that redundant experts compute, in the order in which their weights
            arrive.
        primary_ends: Cumulative pairs of the part's primaries; int32, on the device.
        copy_ends: Cumulative pairs of the redundant experts, empty but in the last part; int32, on the device.
    """

    primaries: slice
    sent: np.ndarray
    served: np.ndarray
    send_counts: list[int]
    recv_counts: list[int]
    primary_rows: Tensor
    copy_rows: Tensor
    primary_ends: Tensor
    copy_ends: Tensor


@dataclass(frozen=True, eq=False)
class DispatchPlan:
    """Plan for one batch in one layer. Every rank derives its own from the counts of all ranks.

    Attributes:
        pairs: Token-expert pairs of this rank in the order in which they are sent, part by part: indices into
            ``[T, K]`` flattened, ``[N]`` int64. The same counts send a pair to the same slot, so that recomputation in
            the backward pass repeats the forward pass.
        parts: One or two parts, the same number on all ranks.
    """

    pairs: Tensor
    parts: list[Part]


def count_tokens(index_TK: Tensor, num_logical_experts: int) -> Tensor:
    """Count the pairs of each logical expert, ``[L]`` int64, without a device synchronization.

    Ids outside ``0 ... L-1`` belong to no expert.
    """
    experts_N = _no_expert_last(index_TK, num_logical_experts)
    counts = torch.zeros(num_logical_experts + 1, dtype=torch.int64, device=experts_N.device)
    return counts.scatter_add_(0, experts_N.to(torch.int64), torch.ones_like(experts_N, dtype=torch.int64))[:-1]


def sort_pairs(index_TK: Tensor, num_logical_experts: int) -> tuple[Tensor, Tensor]:
    """Sort the pairs of this rank by logical expert, stable, without a device synchronization.

    Ids are compared as int16 where they fit, since a radix sort makes one pass for each byte of the key.

    Returns:
        Indices into ``[T, K]`` flattened, ``[N]``, and the pairs of each logical expert, ``[L]`` int64.
    """
    experts_N = _no_expert_last(index_TK, num_logical_experts)
    small = torch.int16 if num_logical_experts < 2**15 else torch.int32
    sorted_N, order_N = torch.sort(experts_N.to(small), stable=True)
    experts = torch.arange(num_logical_experts + 1, device=sorted_N.device, dtype=sorted_N.dtype)
    return order_N, torch.searchsorted(sorted_N, experts).diff()


def _no_expert_last(index_TK: Tensor, num_logical_experts: int) -> Tensor:
    """Flatten ids, and replace those that belong to no expert, also negative ones, by ``L``."""
    positive_N = index_TK.detach().reshape(-1) & torch.iinfo(index_TK.dtype).max  # of -1 the largest number
    return positive_N.clamp_(max=num_logical_experts)


def gather_counts(counts_L: Tensor, groups: ExpertGroups, payload: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Gather the counts and payloads of all ranks on the host, in one all-gather. All ranks of the EP group call it.

    Args:
        counts_L: Counts of this rank, int64, below ``2**COUNT_BITS``.
        groups: Process groups of the layer.
        payload: Number that this rank sends in the upper bits of its counts, below ``2**(63 - COUNT_BITS)``. Defaults
            to 0, which costs nothing.

    Returns:
        Counts, ``[R, L]`` int64, and payloads, ``[R]`` int64.
    """
    assert groups.ep_group is not None
    if payload:
        counts_L = counts_L + (payload << COUNT_BITS)
    gathered_RL = counts_L.new_empty(groups.size * len(counts_L))
    all_gather_single(gathered_RL, counts_L.contiguous(), group=groups.ep_group)
    values_RL = gathered_RL.view(groups.size, len(counts_L)).cpu().numpy()
    return values_RL & (2**COUNT_BITS - 1), values_RL[:, 0] >> COUNT_BITS


def route(
    counts_RL: np.ndarray, slot_map: SlotMap, rank: int, serving_order: np.ndarray, num_primaries: int
) -> Routing:
    """Divide the pairs of each expert among its replicas, from the counts of all ranks. Needs no communication.

    Args:
        counts_RL: Pairs of each rank and logical expert.
        slot_map: Slots of the layer.
        rank: EP rank of this process.
        serving_order: Filled slots of this rank in the order in which they are computed, primaries first.
        num_primaries: Number of primaries among them, ``n``.
    """
    sent_RS, received_RS, tokens_R = split_tokens(
        counts_RL, slot_map.slots, slot_map.node_of_rank, slot_map.weights, rank
    )
    return Routing(counts_RL, slot_map.slots, sent_RS, received_RS, tokens_R, serving_order, num_primaries, rank)


def assign_slots(routing: Routing, order_N: Tensor, shape: torch.Size) -> Tensor:
    """Assign each pair of this rank to its slot, on the device and without a synchronization.

    Args:
        routing: Routing of the batch.
        order_N: Pairs of this rank sorted by logical expert, stable, as :func:`sort_pairs` returns them.
        shape: ``[T, K]``.

    Returns:
        Slots, ``0 ... P-1``, ``[T, K]`` int32: rank times slots of a rank plus slot. ``P`` for ids of no expert.
    """
    slots_P, sent_P = routing.slots.ravel(), routing.sent.ravel()
    by_expert = np.argsort(slots_P, kind="stable")  # empty slots first, which get no pair
    num_pairs = int(sent_P.sum())
    table = np.concatenate(
        (np.append(by_expert, slots_P.size), np.append(sent_P[by_expert], order_N.numel() - num_pairs))
    )
    slots, lengths = to_device(table, order_N.device).view(2, -1)
    sorted_N = torch.repeat_interleave(slots.to(torch.int32), lengths, output_size=order_N.numel())
    return torch.empty_like(sorted_N).scatter_(0, order_N, sorted_N).view(shape)


def split_in_parts(routing: Routing, pairs_in_parts: float) -> list[slice]:
    """Return the primaries of each part: one part, or two if the fullest rank computes ``pairs_in_parts`` or more."""
    n = routing.num_primaries
    if n == 1 or routing.tokens.max() < pairs_in_parts:
        return [slice(0, n)]
    return [slice(0, (n + 1) // 2), slice((n + 1) // 2, n)]


def plan_dispatch(order_N: Tensor, routing: Routing, pairs_in_parts: float) -> DispatchPlan:
    """Lay out the pairs of this rank for packed collectives, from a routing. Needs no communication.

    Args:
        order_N: Pairs of this rank sorted by logical expert, stable: indices into ``[T, K]`` flattened.
        routing: Routing of the batch.
        pairs_in_parts: Pairs of the fullest rank from which on the plan has two parts. The same on all ranks.
    """
    serving_order, num_primaries = routing.serving_order, routing.num_primaries
    slices = split_in_parts(routing, pairs_in_parts)
    starts = [part.start for part in slices]
    sent_RS = routing.sent
    table, counts = lay_out_pairs(
        routing.counts[routing.rank],
        routing.slots,
        sent_RS,
        routing.received,
        serving_order,
        num_primaries,
        np.array(starts),
    )
    num_runs, num_served = (len(table) - len(serving_order)) // 2, len(serving_order)
    shifts, lengths, ends_S = to_device(table, order_N.device).split((num_runs, num_runs, num_served))
    num_sent, *num_received = int(counts[0].sum()), *counts[1].sum(axis=1).tolist()
    index = torch.repeat_interleave(shifts, lengths, output_size=num_sent + sum(num_received))
    index += torch.arange(len(index), device=index.device)
    sent, *received = index.split((num_sent, *num_received))
    ends_S = ends_S.to(torch.int32)
    parts = []
    for i, (start, stop) in enumerate(pairwise([*starts, num_primaries])):
        num_own = int(table[2 * num_runs + stop - 1])
        parts.append(
            Part(
                primaries=slice(start, stop),
                sent=sent_RS[:, start : None if stop == num_primaries else stop],
                served=serving_order[start : None if stop == num_primaries else stop],
                send_counts=counts[0, i].tolist(),
                recv_counts=counts[1, i].tolist(),
                primary_rows=received[i][:num_own],
                copy_rows=received[i][num_own:],
                primary_ends=ends_S[start:stop],
                copy_ends=ends_S[num_primaries:] if stop == num_primaries else ends_S[:0],
            )
        )
    return DispatchPlan(pairs=order_N[sent], parts=parts)


def warm_up() -> None:
    """Compile the planning loops before the first forward."""
    slot_map = SlotMap(np.array([[0, 1], [1, 0]]), np.zeros(2, dtype=np.int64), np.ones(2))
    routing = route(np.ones((2, 2), dtype=np.int64), slot_map, 0, np.arange(2), 1)
    plan_dispatch(torch.arange(2), routing, math.inf)


@compiled
def lay_out_pairs(counts_L, slots_RS, sent_RS, received_RS, serving_order, num_primaries, starts):
    """Lay out this rank's pairs part by part: what it sends, by rank and slot; then what it computes, by slot and rank.

    Compiled, since the device waits for it. The pairs that a rank sends to a slot are one run: they are contiguous
    among its pairs sorted by expert, and also on arrival, ordered by rank and within a rank by slot.

    Args:
        counts_L: Pairs of this rank for each logical expert. All arrays are int64.
        slots_RS: Logical expert of each slot, -1 where the slot is empty.
        sent_RS: Pairs that this rank sends to each slot.
        received_RS: Pairs that the slots of this rank receive from each rank.
        serving_order: Filled slots of this rank in the order in which they are computed, primaries first.
        num_primaries: Number of primaries among them.
        starts: First slot of each part.

    Returns:
        ``shifts``, ``lengths`` and ``ends`` in one array, and ``counts``. Shifts, each repeated ``lengths`` times, plus
        ``0, 1, 2 ...`` are indices: of the sent pairs into the pairs sorted by expert; then, part by part, of the
        computed pairs into the pairs of the part as they arrive. ``ends`` are cumulative pairs of the slots, which
        start anew in each part and at the first redundant expert. ``counts[0]`` are the pairs of each part for each
        rank, ``counts[1]`` those from each rank.
    """
    num_ranks, num_slots = slots_RS.shape
    num_parts, num_served = starts.size, serving_order.size
    num_runs = num_ranks * (num_slots + num_served)
    table = np.empty(2 * num_runs + num_served, dtype=np.int64)
    shifts, lengths, ends = table[:num_runs], table[num_runs : 2 * num_runs], table[2 * num_runs :]
    counts = np.zeros((2, num_parts, num_ranks), dtype=np.int64)
    next_L = np.empty_like(counts_L)
    total = 0
    for expert in range(counts_L.size):
        next_L[expert] = total
        total += counts_L[expert]
    first_RS = np.zeros_like(slots_RS)
    for rank in range(num_ranks):
        for slot in range(num_slots):
            if slots_RS[rank, slot] >= 0:
                first_RS[rank, slot] = next_L[slots_RS[rank, slot]]
                next_L[slots_RS[rank, slot]] += sent_RS[rank, slot]
    run, place = 0, 0
    for part in range(num_parts):
        stop = starts[part + 1] if part + 1 < num_parts else num_slots
        for rank in range(num_ranks):
            for slot in range(starts[part], stop):
                shifts[run], lengths[run] = first_RS[rank, slot] - place, sent_RS[rank, slot]
                place += lengths[run]
                counts[0, part, rank] += lengths[run]
                run += 1
    for part in range(num_parts):
        stop = starts[part + 1] if part + 1 < num_parts else num_slots
        arrived = 0
        for rank in range(num_ranks):
            for slot in range(starts[part], stop):
                first_RS[rank, slot] = arrived
                arrived += received_RS[rank, slot]
                counts[1, part, rank] += received_RS[rank, slot]
        total = 0
        for turn in range(starts[part], min(stop, num_served)):
            slot = serving_order[turn]
            if turn == num_primaries:
                total = 0
            for rank in range(num_ranks):
                shifts[run], lengths[run] = first_RS[rank, slot] - place, received_RS[rank, slot]
                place += lengths[run]
                total += lengths[run]
                run += 1
            ends[turn] = total
    return table, counts
