"""Tokens out to the ranks of their experts, and home again.

Shape suffixes: ``N`` token-expert pairs of this rank (tokens times top-k), ``M`` pairs that this rank serves, ``T``
tokens, ``K`` top-k, ``L`` logical experts, ``P`` slots, ``R`` ranks, ``S`` slots of a rank, ``D`` model width.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_eplb.parallel.groups import ExpertGroups
from lightning_eplb.parallel.permute import combine_pairs, copy_to_pairs, put_together, take_apart
from lightning_eplb.parallel.pieces import to_device
from lightning_eplb.parallel.rows import all_gather_single
from lightning_eplb.parallel.tokens import PartsUnderway, receive_back, receive_part, send_out, send_part_back
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
class Part:
    """What travels together: the pairs of some of a rank's slots, the same slots on all ranks.

    Attributes:
        primaries: Which of a rank's primaries are served in it.
        send_counts: This rank's pairs for each rank, ``[R]``. They are sent by rank, and within a rank by slot.
        recv_counts: Pairs that this rank receives from each rank, ``[R]``.
        primary_rows: The received pairs that primaries serve, in the order of their slots: indices, int64.
        copy_rows: Those that redundant experts serve, in the order in which their weights arrive: indices, int64.
        primary_ends: How many pairs the part's primaries serve, added up one after the other; int32, on the device.
        copy_ends: The same of the redundant experts, which the last part has.
    """

    primaries: slice
    send_counts: list[int]
    recv_counts: list[int]
    primary_rows: Tensor
    copy_rows: Tensor
    primary_ends: Tensor
    copy_ends: Tensor


@dataclass(frozen=True, eq=False)
class Dispatch:
    """How one batch's tokens travel in one layer. Every rank derives its own from the counts of all ranks.

    Attributes:
        pairs: This rank's token-expert pairs in the order in which they are sent, part by part: indices into
            ``[T, K]`` flattened, ``[N]`` int64. A pair is sent to the same slot whenever the same counts are
            dispatched, so that recomputation in the backward pass repeats the forward pass.
        parts: One or two, as many on all ranks.
        tokens: Pairs that each rank serves, ``[R]``.
    """

    pairs: Tensor
    parts: list[Part]
    tokens: np.ndarray


@dataclass(eq=False)
class Trip:
    """One batch's tokens on their way through one layer.

    Attributes:
        plan: How they travel.
        out: Their journey to the experts.
        home: That of the experts' outputs.
        tickets: For each part, of the journey that it is on.
    """

    plan: Dispatch
    out: PartsUnderway
    home: PartsUnderway
    tickets: list[Tensor]


class TokenDispatcher:
    """The seam for another way to exchange tokens: subclass it, and name it as ``parallelize_experts(dispatcher=...)``.

    A converted layer calls :meth:`dispatch`, then for each of ``plan.parts`` :meth:`receive`, its experts and
    :meth:`send_home`, then :meth:`combine`; on all ranks of its EP group, also on those that have no token or serve
    none. In the backward pass autograd does the same the other way round. Who serves which pair is decided before, and
    is alike on all ranks: ``plan``. What :meth:`dispatch` returns is handed to the others as ``trip``: it can be
    anything. All must be differentiable in what they are given, the routing weights included, and may not wait for
    the device.

    This one packs the pairs into one ``all_to_all_single`` out and one home. Where they are many, half of the experts'
    travel while the other half's are computed.

    Args:
        groups: The ranks that share the layer's experts; ``groups.exchange`` is their process group.
    """

    bytes_in_parts: float = 64 * 2**20
    """Where the fullest rank receives as many bytes of tokens, they travel in two parts; ``math.inf``: never. Fewer are
    there so soon that nothing is gained by two collectives, and two products, in place of one."""

    def __init__(self, groups: ExpertGroups) -> None:
        self.groups = groups

    def dispatch(self, hidden_TD: Tensor, plan: Dispatch, top_k: int) -> Any:
        """Send this rank's tokens off, all parts. Returns the trip."""
        assert self.groups.exchange is not None
        counts = [part.send_counts for part in plan.parts], [part.recv_counts for part in plan.parts]
        out, home = PartsUnderway(*counts, self.groups.exchange), PartsUnderway(*counts, self.groups.exchange)
        return Trip(plan, out, home, send_out(out, copy_to_pairs(hidden_TD, plan.pairs, top_k)))

    def receive(self, trip: Any, part: int) -> tuple[Tensor, Tensor]:
        """Wait for the tokens of a part that this rank serves.

        Returns:
            Rows for the primaries, and for the redundant experts, in the order of the part's ``primary_ends`` and
            ``copy_ends``; within an expert in any order that is the same whenever the same counts are dispatched.
        """
        received_MD, plan = receive_part(trip.out, part, trip.tickets[part]), trip.plan.parts[part]
        return take_apart(received_MD, plan.primary_rows, plan.copy_rows)

    def send_home(self, trip: Any, part: int, primaries_MD: Tensor, copies_MD: Tensor) -> None:
        """Send the outputs off of what :meth:`receive` returned, in the same order."""
        plan = trip.plan.parts[part]
        output_MD = put_together(primaries_MD, copies_MD, plan.primary_rows, plan.copy_rows)
        trip.tickets[part] = send_part_back(trip.home, part, output_MD)

    def combine(self, trip: Any, weights_TK: Tensor) -> Tensor:
        """Wait for the outputs of all parts, and add up each token's, weighted.

        Args:
            trip: As in the other methods.
            weights_TK: The router's, in any floating dtype.

        Returns:
            ``[T, D]``, in the outputs' dtype.
        """
        return combine_pairs(receive_back(trip.home, trip.tickets), weights_TK, trip.plan.pairs)


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
    order_N: Tensor,
    counts_RL: np.ndarray,
    slot_map: SlotMap,
    rank: int,
    serving_order: np.ndarray,
    num_primaries: int,
    pairs_in_parts: float,
) -> Dispatch:
    """Decide which slot serves which of this rank's pairs, from the counts of all ranks. Needs no communication.

    Args:
        order_N: This rank's pairs sorted by logical expert, stable: indices into ``[T, K]`` flattened.
        counts_RL: Pairs of each rank and logical expert.
        slot_map: What the layer's slots hold.
        rank: This EP rank.
        serving_order: This rank's filled slots in the order in which they are served, primaries first.
        num_primaries: ``n``, how many of these are primaries.
        pairs_in_parts: Where the fullest rank serves as many pairs, there are two parts. The same on all ranks.
    """
    sent_RS, recv_RS, tokens_R = split_tokens(counts_RL, slot_map.slots, slot_map.node_of_rank, slot_map.weights, rank)
    middle = (num_primaries + 1) // 2
    is_whole = num_primaries == 1 or tokens_R.max() < pairs_in_parts
    slots_of = [slice(0, None)] if is_whole else [slice(0, middle), slice(middle, None)]

    # Sorted by expert, the pairs of a slot are one run: behind those of the expert's earlier slots.
    by_expert_P, sent_P = np.argsort(slot_map.slots.ravel(), kind="stable"), sent_RS.ravel()
    first_P = np.empty_like(sent_P)
    first_P[by_expert_P] = _firsts(sent_P[by_expert_P])
    first_RS = first_P.reshape(sent_RS.shape)
    runs = [(first_RS[:, slots].ravel(), sent_RS[:, slots].ravel()) for slots in slots_of]
    # Received rank by rank, and within a rank slot by slot, they are served slot by slot.
    ends = []
    for slots in slots_of:
        order, own = serving_order[slots] - slots.start, num_primaries - slots.start
        recv_SR, first_SR = recv_RS[:, slots].T[order], _firsts(recv_RS[:, slots]).T[order]
        runs.append((first_SR.ravel(), recv_SR.ravel()))
        served = recv_SR.sum(axis=1)
        ends += [np.cumsum(served[:own]), np.cumsum(served[own:])]

    shifts, lengths, sizes = _runs(runs)
    on_device = to_device(np.concatenate((shifts, lengths, *ends)), order_N.device)
    shifts, lengths, ends_S = on_device.split((len(shifts), len(lengths), sum(map(len, ends))))
    index = torch.repeat_interleave(shifts, lengths, output_size=sum(sizes))
    index += torch.arange(sum(sizes), device=index.device)
    *indices, ends_S = *index.split(sizes), ends_S.to(torch.int32)
    ends_of = ends_S.split([len(array) for array in ends])
    parts = []
    for i, slots in enumerate(slots_of):
        num_primary = int(ends[2 * i][-1])
        parts.append(
            Part(
                primaries=slice(slots.start, min(num_primaries, slots.stop or num_primaries)),
                send_counts=sent_RS[:, slots].sum(axis=1).tolist(),
                recv_counts=recv_RS[:, slots].sum(axis=1).tolist(),
                primary_rows=indices[len(slots_of) + i][:num_primary],
                copy_rows=indices[len(slots_of) + i][num_primary:],
                primary_ends=ends_of[2 * i],
                copy_ends=ends_of[2 * i + 1],
            )
        )
    return Dispatch(pairs=order_N[index[: sum(sizes[: len(slots_of)])]], parts=parts, tokens=tokens_R)


def _firsts(lengths: np.ndarray) -> np.ndarray:
    """Where each run begins, of runs that lie one behind the other."""
    return (np.cumsum(lengths) - lengths.ravel()).reshape(lengths.shape)


def _runs(runs: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Lists of runs as one. Of a run, its first index and its length become a shift from its place, and its length.

    So ``shifts`` repeated ``lengths`` times, plus ``0, 1, 2 ...``, are all lists' indices one after the other.

    Returns:
        Shifts and lengths of all runs, and how many indices each list has.
    """
    lengths = np.concatenate([length for _, length in runs])
    shifts = np.concatenate([first for first, _ in runs]) - _firsts(lengths)
    return shifts, lengths, [int(length.sum()) for _, length in runs]
