"""Plans one layer for tokens that are divided evenly among the copies of an expert.

Shape suffixes: ``L`` logical experts, ``R`` ranks, ``N`` primaries on a rank, ``S`` slots on a rank.
"""

import numpy as np

from lightning_eplb.compiled import compiled
from lightning_eplb.policies.replicate import replicate
from lightning_eplb.policies.split import even_quotas, fullest
from lightning_eplb.policies.swap import PATIENCE, best_swap, keep_slots
from lightning_eplb.policies.toll import EVEN, busiest, drop_copies, weigh_copies
from lightning_eplb.policies.trade import link, recount, sort_ranks, take_stock, trade_copies, unlink

LEAST_PATIENCE = 3
"""The search does not end after fewer swaps without a gain than these."""


@compiled
def plan_even(load_L, likely_L, slots_RS, num_primaries, weight_R, node_R, prices, copy, gain, enough, most_swaps):
    """Plan a layer with redundant slots. ``slots_RS`` is changed in place, or left alone where nothing pays.

    The copies are chosen anew: of the most popular experts first, then improved by single changes, and pairs of
    primaries swapped that relieve the fullest rank, the copies improved after each. The same is tried without copies,
    which are then added where that is the better plan.

    Args and returns: as :func:`lightning_eplb.policies.level.plan_level`.
    """
    tokens_R = np.empty(slots_RS.shape[0], dtype=np.int64)
    quota_RS = np.empty_like(slots_RS)
    even_quotas(load_L, slots_RS, quota_RS, tokens_R)
    before = fullest(tokens_R, weight_R)
    if before <= enough and copy == 0:
        if num_primaries == 1 and slots_RS.shape[1] == 2:
            pair_up(slots_RS, quota_RS, tokens_R, weight_R, before)
        return 0.0, 0
    trial_RS, start_RS, best_RS = slots_RS.copy(), slots_RS.copy(), slots_RS.copy()
    best_peak, present = before, np.int64(0)
    if copy > 0:
        present = busiest(slots_RS, num_primaries)
        before = weigh_copies(
            load_L, likely_L, slots_RS, num_primaries, weight_R, copy, present, EVEN, quota_RS, tokens_R
        )
        best_peak = drop_copies(
            load_L, likely_L, best_RS, num_primaries, weight_R, copy, present, EVEN, before, enough, quota_RS, tokens_R
        )
    best = (best_peak - gain, best_peak, 0.0, np.int64(0))
    for attempt in range(2):
        trial_RS[:] = slots_RS
        if attempt == 0:
            replicate(load_L, trial_RS, num_primaries, weight_R, np.int64(copy))
        elif best[1] <= enough or load_L.max() * weight_R.min() >= best[0]:
            break  # as it is, or the largest expert alone makes a fuller rank
        else:
            trial_RS[:, num_primaries:] = -1
        start_RS[:] = trial_RS
        known = best[0]
        if attempt == 1 or most_swaps > 0:
            best = search(
                load_L, likely_L, trial_RS, num_primaries, weight_R, node_R, prices, copy, present, enough, most_swaps,
                False, 0.0, np.int64(0), best, best_RS,
            )  # fmt: skip
        price, swaps = 0.0, np.int64(0)
        if best[0] < known:
            start_RS[:] = best_RS
            price, swaps = best[2], best[3]
        elif attempt == 1:
            break
        best = search(
            load_L, likely_L, start_RS, num_primaries, weight_R, node_R, prices, copy, present, enough, most_swaps,
            True, price, swaps, best, best_RS,
        )  # fmt: skip
    _, best_peak, price, swaps = best
    if best_peak == before:
        return 0.0, 0
    keep_slots(slots_RS, best_RS, num_primaries)
    slots_RS[:] = best_RS
    return before - best_peak - price, swaps


@compiled
def pair_up(slots_RS, quota_RS, tokens_R, weight_R, peak):
    """Have pairs of ranks hold copies of each other's primary, where ranks hold one primary and one copy. In place.

    Both of a pair then serve the same tokens, whatever comes: of half as many sums, chance makes the largest less high.

    Args:
        slots_RS: What the slots hold, the primary first.
        quota_RS: The parts of each slot, divided evenly.
        tokens_R: The parts of each rank.
        weight_R: What a part costs on each rank.
        peak: Of the fullest rank: no rank becomes fuller.
    """
    num_ranks = slots_RS.shape[0]
    owner_L, holder_L = np.empty(num_ranks, dtype=np.int64), np.full(num_ranks, -1)
    copies_L = np.zeros(num_ranks, dtype=np.int64)
    for rank in range(num_ranks):
        owner_L[slots_RS[rank, 0]] = rank
        if slots_RS[rank, 1] >= 0:
            holder_L[slots_RS[rank, 1]] = rank
            copies_L[slots_RS[rank, 1]] += 1
    for rank in range(num_ranks):
        own, copied = slots_RS[rank]
        if copied < 0 or copies_L[own] != 1 or copies_L[copied] != 1:
            continue
        partner, third = owner_L[copied], holder_L[own]
        other = slots_RS[partner, 1]
        if third == partner or other == slots_RS[third, 0]:
            continue
        fuller = tokens_R[third] - quota_RS[third, 1] + quota_RS[partner, 1]
        both = tokens_R[rank]
        if fuller * weight_R[third] > peak or both * weight_R[partner] > peak:
            continue
        quota_RS[third, 1], quota_RS[partner, 1] = quota_RS[partner, 1], quota_RS[third, 1]
        tokens_R[third], tokens_R[partner] = fuller, both
        slots_RS[third, 1], slots_RS[partner, 1] = other, own
        holder_L[own] = partner
        if other >= 0:
            holder_L[other] = third


@compiled
def search(
    load_L, likely_L, slots_RS, num_primaries, weight_R, node_R, prices, copy, present, enough, most_swaps,
    with_copies, price, swaps, best, best_RS,
):  # fmt: skip
    """Improve the copies, swap a pair of primaries, and so on, in place, until swaps no longer help.

    Args:
        with_copies: Whether redundant slots are used.
        price: What the swaps up to here cost.
        swaps: How many they are.
        best: Of the best plan known: its price and fullest rank together, the latter, the former, its swaps.
        best_RS: That plan; overwritten by a better one.

    Returns:
        As ``best``.
    """
    num_ranks, num_slots = slots_RS.shape
    lowest, best_peak, best_price, best_swaps = best
    copies_L, head_L, share_L = np.empty_like(load_L), np.empty_like(load_L), np.empty_like(load_L)
    fewer_L, more_L = np.empty_like(load_L), np.empty_like(load_L)
    next_P = np.empty(num_ranks * num_slots, dtype=np.int64)
    tokens_R, order = np.empty(num_ranks, dtype=np.int64), np.empty(num_ranks, dtype=np.int64)
    line_R = np.empty(num_ranks)
    quota_RS = np.empty_like(slots_RS) if copy > 0 else slots_RS
    own_RN = slots_RS[:, :num_primaries]
    most_changes = num_ranks * (num_slots - num_primaries)
    reached, stalled = np.inf, 0
    is_known = False
    while True:
        if not is_known:
            take_stock(
                load_L, slots_RS, weight_R, copies_L, head_L, next_P, share_L, fewer_L, more_L, tokens_R, line_R, order
            )
            is_known = True
        if with_copies:
            trade_copies(
                load_L, slots_RS, num_primaries, weight_R, np.int64(copy), most_changes, copies_L, head_L, next_P,
                share_L, fewer_L, more_L, tokens_R, line_R, order,
            )  # fmt: skip
        peak = line_R[order[num_ranks - 1]]
        if copy > 0:
            even_quotas(load_L, slots_RS, quota_RS, tokens_R)
            peak = drop_copies(
                load_L, likely_L, slots_RS, num_primaries, weight_R, copy, present, EVEN, lowest - price, enough,
                quota_RS, tokens_R,
            )  # fmt: skip
            take_stock(
                load_L, slots_RS, weight_R, copies_L, head_L, next_P, share_L, fewer_L, more_L, tokens_R, line_R, order
            )
        if peak + price < lowest:
            lowest, best_peak, best_price, best_swaps = peak + price, peak, price, swaps
            best_RS[:] = slots_RS
        if peak + price < reached:
            reached, stalled = peak + price, 0
        stalled += 1
        if peak <= enough or swaps >= most_swaps or stalled > max(PATIENCE // num_ranks, LEAST_PATIENCE):
            break
        rank = order[num_ranks - 1]
        partner, mine, theirs = best_swap(rank, tokens_R, weight_R, share_L, own_RN, node_R, prices[0], prices[1])
        if partner < 0:
            break
        given, taken = own_RN[rank, mine], own_RN[partner, theirs]
        for taker, expert in ((partner, given), (rank, taken)):  # a copy goes where the primary comes
            for slot in range(num_primaries, num_slots):
                if slots_RS[taker, slot] == expert:
                    slots_RS[taker, slot] = -1
                    tokens_R[taker] -= share_L[expert]
                    unlink(head_L, next_P, expert, taker * num_slots + slot)
                    recount(
                        load_L, expert, np.int64(-1), num_slots, weight_R, copies_L, head_L, next_P, share_L, fewer_L,
                        more_L, tokens_R, line_R,
                    )  # fmt: skip
        own_RN[rank, mine], own_RN[partner, theirs] = taken, given
        place, other_place = rank * num_slots + mine, partner * num_slots + theirs
        unlink(head_L, next_P, given, place)
        unlink(head_L, next_P, taken, other_place)
        link(head_L, next_P, given, other_place)
        link(head_L, next_P, taken, place)
        tokens_R[rank] += share_L[taken] - share_L[given]
        tokens_R[partner] += share_L[given] - share_L[taken]
        line_R[rank], line_R[partner] = tokens_R[rank] * weight_R[rank], tokens_R[partner] * weight_R[partner]
        sort_ranks(order, line_R)
        price += prices[0] if node_R[rank] == node_R[partner] else prices[1]
        swaps += 1
    return lowest, best_peak, best_price, best_swaps
