"""Tokens out to the ranks of their experts, and home again.

Shape suffixes: ``N`` token-expert pairs of this rank (tokens times top-k), ``M`` pairs that this rank serves, ``T``
tokens, ``K`` top-k, ``L`` logical experts, ``P`` slots, ``R`` ranks, ``S`` slots of a rank, ``D`` model width.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_eplb.parallel.groups import ExpertGroups
from lightning_eplb.parallel.layout import lay_out
from lightning_eplb.parallel.packing import to_device
from lightning_eplb.parallel.permute import combine_pairs, copy_to_pairs, put_together, take_apart
from lightning_eplb.parallel.row_exchange import all_gather_single
from lightning_eplb.parallel.token_exchange import PartsUnderway, receive_back, receive_part, send_out, send_part_back
from lightning_eplb.policies.split import split_tokens

COUNT_BITS = 40
"""Of a count of tokens as it travels: the bits above it are for a word."""

BYTES_IN_PARTS_WITHIN_NODE = 384 * 2**20
"""Between four H200 with NVLink one layer, forward and backward, took 1.22 times as long in two parts with 96 MiB, 1.08
with 192 (the hosts had more to launch), 0.98 with 384 and 0.99 with 768. Between quarters of an H100, whose exchanges
are slower, it was 0.95 with 96."""

BYTES_IN_PARTS_BETWEEN_NODES = 64 * 2**20
"""Reckoned, not seen: networks between nodes carry about an eighth of what NVLink does."""


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
        primaries: Which of a rank's primaries are served in it; in the last part also its redundant experts.
        sent: This rank's pairs for each slot, ``[R, ...]`` int64: from slot ``primaries.start`` on to the last that the
            part has. They lie in ``pairs`` by rank, and within a rank by slot.
        served: This rank's slots in the order of ``primary_ends``, then of ``copy_ends``, int64.
        send_counts: This rank's pairs for each rank, ``[R]``: those of ``sent``, summed.
        recv_counts: Pairs that this rank receives from each rank, ``[R]``.
        primary_rows: The received pairs that primaries serve, in the order of their slots: indices, int64, into the
            pairs as they arrive by rank, and within a rank by slot.
        copy_rows: Those that redundant experts serve, in the order in which their weights arrive.
        primary_ends: How many pairs the part's primaries serve, added up one after the other; int32, on the device.
        copy_ends: The same of the redundant experts, which the last part has.
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
    is alike on all ranks: ``plan``; ``sent`` of its parts says which slot each pair goes to. What :meth:`dispatch`
    returns is handed to the others as ``trip``: it can be anything. All must be differentiable in what they are given,
    the routing weights included, and may not wait for the device.

    This one packs the pairs into one ``all_to_all_single`` out and one home. Where they are many, half of the experts'
    travel while the other half's are computed.

    Args:
        groups: The ranks that share the layer's experts; ``groups.ep_group`` is their process group.
    """

    def __init__(self, groups: ExpertGroups) -> None:
        self.groups = groups

    @property
    def bytes_in_parts(self) -> float:
        """Where the fullest rank serves as many bytes of tokens, they travel in two parts; ``math.inf``: never.

        Fewer are there so soon that two collectives, and two products, in place of one take more than they hide. The
        same on all ranks: else they wait for each other's parts.
        """
        is_within_node = len(set(self.groups.node_of_rank)) == 1
        return BYTES_IN_PARTS_WITHIN_NODE if is_within_node else BYTES_IN_PARTS_BETWEEN_NODES

    def dispatch(self, hidden_TD: Tensor, plan: Dispatch, top_k: int) -> Any:
        """Send this rank's tokens off, all parts. Returns the trip.

        Further arguments of the experts' call that have a row for each token make a trip of their own each, of any
        width, in a floating dtype or as uint8. It ends with :meth:`receive`, in the same order as the tokens.
        """
        assert self.groups.ep_group is not None
        counts = [part.send_counts for part in plan.parts], [part.recv_counts for part in plan.parts]
        out, home = PartsUnderway(*counts, self.groups.ep_group), PartsUnderway(*counts, self.groups.ep_group)
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
    """Pairs of each logical expert, ``[L]`` int64, without waiting for a device; other ids are no expert's."""
    experts_N = _no_expert_last(index_TK, num_logical_experts)
    counts = torch.zeros(num_logical_experts + 1, dtype=torch.int64, device=experts_N.device)
    return counts.scatter_add_(0, experts_N.to(torch.int64), torch.ones_like(experts_N, dtype=torch.int64))[:-1]


def sort_pairs(index_TK: Tensor, num_logical_experts: int) -> tuple[Tensor, Tensor]:
    """This rank's pairs by logical expert, stable: indices into ``[T, K]`` flattened ``[N]``; and counts ``[L]`` int64.

    Neither waits for a device. Ids are compared as int16 where they fit: a radix sort's passes are the key's bytes.
    """
    experts_N = _no_expert_last(index_TK, num_logical_experts)
    small = torch.int16 if num_logical_experts < 2**15 else torch.int32
    sorted_N, order_N = torch.sort(experts_N.to(small), stable=True)
    experts = torch.arange(num_logical_experts + 1, device=sorted_N.device, dtype=sorted_N.dtype)
    return order_N, torch.searchsorted(sorted_N, experts).diff()


def _no_expert_last(index_TK: Tensor, num_logical_experts: int) -> Tensor:
    """Ids, flattened: those that are no expert's, negative ones too, are ``L``."""
    positive_N = index_TK.detach().reshape(-1) & torch.iinfo(index_TK.dtype).max  # of -1 the largest number
    return positive_N.clamp_(max=num_logical_experts)


def gather_counts(counts_L: Tensor, groups: ExpertGroups, word: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The counts of every rank on the host, and their words. All ranks of the EP group call it: one all-gather.

    Args:
        counts_L: This rank's, int64, below ``2**COUNT_BITS``.
        groups: The ranks.
        word: What this rank has to say besides, below ``2**(63 - COUNT_BITS)``. It travels in the upper bits of the
            counts, and 0 takes no time.

    Returns:
        ``[R, L]`` int64, and ``[R]`` int64.
    """
    assert groups.ep_group is not None
    if word:
        counts_L = counts_L + (word << COUNT_BITS)
    counts_RL = counts_L.new_empty(groups.size * len(counts_L))
    all_gather_single(counts_RL, counts_L.contiguous(), group=groups.ep_group)
    said_RL = counts_RL.view(groups.size, len(counts_L)).cpu().numpy()
    return said_RL & (2**COUNT_BITS - 1), said_RL[:, 0] >> COUNT_BITS


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
    is_whole = num_primaries == 1 or tokens_R.max() < pairs_in_parts
    starts = [0] if is_whole else [0, (num_primaries + 1) // 2]
    table, counts = lay_out(
        counts_RL[rank], slot_map.slots, sent_RS, recv_RS, serving_order, num_primaries, np.array(starts)
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
    return Dispatch(pairs=order_N[sent], parts=parts, tokens=tokens_R)


def warm_up() -> None:
    """Compile now what would otherwise be compiled in the first forward."""
    slot_map = SlotMap(np.array([[0, 1], [1, 0]]), np.zeros(2, dtype=np.int64), np.ones(2))
    plan_dispatch(torch.arange(2), np.ones((2, 2), dtype=np.int64), slot_map, 0, np.arange(2), 1, math.inf)
