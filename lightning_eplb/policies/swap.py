"""Swaps of two primaries between ranks, whatever copies there are: one layer, compiled.

Shape suffixes: ``L`` logical experts, ``R`` ranks, ``N`` primaries on a rank, ``S`` slots on a rank.
"""

import numpy as np

from lightning_eplb.compiled import compiled

PATIENCE = 32
"""The search ends after so many swaps without a gain, divided by the ranks: among few ranks one swap changes much."""


@compiled
def best_swap(rank, tokens_R, weight_R, share_L, own_RN, node_R, price_within, price_between):
    """The swap of two primaries that relieves ``rank`` the most, its price taken into account.

    Args:
        rank: The rank to relieve.
        tokens_R: Parts that each rank serves.
        weight_R: What a part costs on each rank.
        share_L: Parts that a primary takes with it.
        own_RN: The primaries of each rank.
        node_R: The node of each rank.
        price_within: What a swap costs between ranks of a node, in weighted parts.
        price_between: The same between nodes.

    Returns:
        The other rank and the two positions, of ``rank`` and of the other; -1 three times where no swap helps. Ties
        go to the lower index.
    """
    num_ranks, per_rank = own_RN.shape
    tokens, weight = tokens_R[rank], weight_R[rank]
    before = tokens * weight
    share_NR = np.empty((per_rank, num_ranks), dtype=np.int64)
    lowest_R, price_R = np.empty(num_ranks), np.empty(num_ranks)
    for other in range(num_ranks):
        lowest_R[other] = before
        price_R[other] = price_within if node_R[other] == node_R[rank] else price_between
        for theirs in range(per_rank):
            share_NR[theirs, other] = share_L[own_RN[other, theirs]]
    for mine in range(per_rank):
        load = share_L[own_RN[rank, mine]]
        for theirs in range(per_rank):
            for other in range(num_ranks):  # without branches: several ranks at once
                relief = load - share_NR[theirs, other]
                here, there = (tokens - relief) * weight, (tokens_R[other] + relief) * weight_R[other]
                peak = here if here > there else there
                total = peak + price_R[other] if (relief > 0) & (peak < before) else before
                lowest_R[other] = total if total < lowest_R[other] else lowest_R[other]
    partner = np.int64(-1)
    lowest = before
    for other in range(num_ranks):
        if lowest_R[other] < lowest:
            partner, lowest = np.int64(other), lowest_R[other]
    if partner >= 0:
        for mine in range(per_rank):
            for theirs in range(per_rank):
                relief = share_L[own_RN[rank, mine]] - share_NR[theirs, partner]
                here, there = (tokens - relief) * weight, (tokens_R[partner] + relief) * weight_R[partner]
                peak = max(here, there)
                if relief > 0 and peak < before and peak + price_R[partner] == lowest:
                    return partner, np.int64(mine), np.int64(theirs)
    return np.int64(-1), np.int64(-1), np.int64(-1)


@compiled
def keep_slots(before_RS, after_RS, num_primaries):
    """Reorder ``after_RS`` in place, primaries and redundant slots apart, so that what stays keeps its slot."""
    num_slots = after_RS.shape[1]
    for rank in range(after_RS.shape[0]):
        for slot in range(num_slots):
            expert = before_RS[rank, slot]
            if expert < 0 or after_RS[rank, slot] == expert:
                continue
            start, end = (0, num_primaries) if slot < num_primaries else (num_primaries, num_slots)
            for other in range(start, end):
                if after_RS[rank, other] == expert:
                    after_RS[rank, other] = after_RS[rank, slot]
                    after_RS[rank, slot] = expert
                    break
