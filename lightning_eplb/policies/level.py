"""Plans one layer for tokens divided by levelled quotas: copies first, then primaries where they do not suffice.

Shape suffixes: ``L`` logical experts, ``R`` ranks, ``N`` primaries on a rank, ``S`` slots on a rank.
"""

import numpy as np

from lightning_eplb.compiled import compiled, inlined
from lightning_eplb.policies.drift import swap_copies
from lightning_eplb.policies.excess import must_exceed
from lightning_eplb.policies.spill import grow_tree, hedge, survey
from lightning_eplb.policies.split import even_quotas, fullest, fullest_rank, level_quotas
from lightning_eplb.policies.swap import PATIENCE, best_swap, keep_slots
from lightning_eplb.policies.toll import LEVEL, busiest, drop_copies, weigh_copies

SWEEPS = np.int64(12)  # as int64, or loops are compiled for each of these numbers
"""Of the quotas, to judge a plan."""
SLOW = 1.0 / 16
"""A sweep that lowers the fullest rank by so little of what is missing is the last one."""
FAST = 1.0 / 4
"""The same where only those that become level matter."""
SWEPT = 2
"""So many of the trees that do not level the ranks, those that come closest, are swept over to find the best; all of
them where copies cost."""
FEW_SWEEPS = np.int64(2)
"""Of the quotas, to see how level a layer is."""
NEARLY_LEVEL = 1.0 + 1.0 / 16
"""A layer whose fullest rank is lower than so many times the mean after a few sweeps may be level after more."""
DEPTHS = (0.4, 0.3, 0.2, 0.5, 0.7)
"""How much a link may carry, in parts of what its rank should serve: tried in this order until the ranks are level.

A rank of many experts gives one of them away at a time, so shallow links level more layers than deep ones, and hold as
much ready for what may come.
"""
FURTHER_DEPTHS = (0.35, 0.45, 0.6)
"""Tried where none of ``DEPTHS`` levels the ranks: a third of the layers that are left become level by one of these,
for a small part of the time that quotas and swaps take."""
DEPTHS_OF_FEW = (0.7, 0.5, 0.6, 0.3, 1.0)
"""The same where ranks hold fewer than ``FEW`` experts, each of which can fill a deep link, and where copies cost: then
no rank should have to send many.

Where ranks hold one expert each, 1 always levels them: that is the alias method. Less leaves more for what may come.
"""
DEPTHS_OF_ONE = (0.6, 0.5, 0.7, 0.3, 1.0)
"""The same where ranks hold one expert each, and have one slot."""
FEW = 4
LOOSE_SPREADS = 2.0
"""Standard deviations of its tokens that a rank should be able to leave to others."""
LEAST_PATIENCE = 4
"""The search does not end after fewer swaps without a gain than these."""


@compiled
def plan_level(
    load_L,
    spread_L,
    likely_L,
    slots_RS,
    num_primaries,
    level_R,
    weight_R,
    node_R,
    prices,
    copy,
    gain,
    enough,
    most_swaps,
):
    """Plan a layer. ``slots_RS`` is changed in place, or left alone where nothing pays.

    Three things are compared by their fullest rank: the placement as it is; new copies for the primaries as they are;
    and a series of swaps that relieve the fullest rank, each with new copies, and with what it costs. Where copies
    cost something, each of them goes without those that are not worth it, and what the others cost counts.

    Where copies cost nothing, a layer whose ranks are level is left alone if each of them has tokens that it could
    leave to others, as much as may come in addition.

    Args:
        load_L: Expected parts of each expert.
        spread_L: Standard deviation of each, to choose copies.
        likely_L: The same as it was forecast, to tell what copies are worth.
        slots_RS: What the slots hold.
        num_primaries: The first slots of each rank.
        level_R: What each rank should serve.
        weight_R: What a part costs on each rank, float64.
        node_R: The node of each rank.
        prices: Of a swap within a node and between nodes, in weighted parts.
        copy: Weighted parts that take as long as a copy's travel; it must serve as many.
        gain: Weighted parts by which a plan must be better than none.
        enough: A fullest rank that need not be improved.
        most_swaps: The most that may be made.

    Returns:
        By how much the fullest rank was lowered (at least, where only copies are new), and the swaps made.
    """
    num_ranks, num_slots = slots_RS.shape
    has_copies = num_slots > num_primaries
    has_toll = has_copies and copy > 0
    present, best_peak, peak = np.int64(0), 0.0, np.inf
    trial_RS = slots_RS.copy()
    new_quota_RS, new_tokens_R = np.empty_like(slots_RS), np.empty(num_ranks, dtype=np.int64)
    is_tried = False
    if has_copies and not has_toll and must_exceed(load_L, slots_RS, num_primaries, weight_R, enough + gain):
        is_tried = True  # the usual case, which takes no look at quotas: what is level now pays
        peak = copy_and_level(
            load_L, spread_L, likely_L, trial_RS, num_primaries, level_R, weight_R, node_R, copy, present, best_peak,
            enough, new_quota_RS, new_tokens_R,
        )  # fmt: skip
        if peak <= enough:
            keep_slots(slots_RS[:, num_primaries:], trial_RS[:, num_primaries:], 0)
            slots_RS[:, num_primaries:] = trial_RS[:, num_primaries:]
            return gain, 0
    quota_RS = np.empty((num_ranks, num_slots), dtype=np.int64)
    tokens_R = np.empty(num_ranks, dtype=np.int64)
    even_quotas(load_L, slots_RS, quota_RS, tokens_R)
    before = level_quotas(load_L, slots_RS, weight_R, FEW_SWEEPS, enough, SLOW, quota_RS, tokens_R)
    if before > enough and (
        before <= NEARLY_LEVEL * enough
        or (has_toll and not must_exceed(load_L, slots_RS, num_primaries, weight_R, enough))
    ):
        slow = 0.0 if has_toll else FAST  # copies would come and go in turn if what was planned looked worse than it is
        before = level_quotas(load_L, slots_RS, weight_R, SWEEPS - FEW_SWEEPS, enough, slow, quota_RS, tokens_R)
    stiff = np.int64(0)
    if has_copies and (before <= enough or has_toll):
        stiff = stiff_ranks(load_L, spread_L, slots_RS, quota_RS)
    if before <= enough and stiff == 0 and not has_toll:
        return 0.0, 0
    own_RN = trial_RS[:, :num_primaries]
    best_RS = slots_RS
    best_peak, best_price, best_swaps = before, 0.0, 0
    is_new = False
    if has_toll:
        present = busiest(slots_RS, num_primaries)
        before = weigh_copies(
            load_L, likely_L, slots_RS, num_primaries, weight_R, copy, present, LEVEL, quota_RS, tokens_R
        )
        best_peak = drop_copies(
            load_L, likely_L, trial_RS, num_primaries, weight_R, copy, present, LEVEL, before, enough, quota_RS,
            tokens_R,
        )  # fmt: skip
        if best_peak < before:
            best_RS = trial_RS.copy()
            is_new = True
    lowest = best_peak - gain
    if has_copies:
        if not is_tried:
            peak = copy_and_level(
                load_L, spread_L, likely_L, trial_RS, num_primaries, level_R, weight_R, node_R, copy, present,
                best_peak, enough, new_quota_RS, new_tokens_R,
            )  # fmt: skip
        if peak > enough and before > enough and not has_toll:
            before = level_quotas(load_L, slots_RS, weight_R, SWEEPS - FEW_SWEEPS, enough, SLOW, quota_RS, tokens_R)
            best_peak, lowest = before, before - gain
        is_looser = False
        if lowest <= peak <= max(best_peak, enough):
            if before > enough and not has_toll:
                stiff = stiff_ranks(load_L, spread_L, slots_RS, quota_RS)
            is_looser = stiff > 0 and stiff_ranks(load_L, spread_L, trial_RS, new_quota_RS) < stiff
        quota_RS, tokens_R = new_quota_RS, new_tokens_R
        if peak < lowest or is_looser:
            lowest = best_peak = peak
            best_RS = trial_RS.copy()
            is_new = True
    alone_R = np.empty_like(tokens_R)
    for attempt in range(2 if has_toll else 1):
        with_copies = has_copies and attempt == 0
        price, swaps, stalled, reached = 0.0, 0, 0, best_peak
        floor = copy if has_toll else 0.0  # a plan with copies takes at least the travel of one
        if attempt == 1:  # as if there were no slots for copies
            if load_L.max() * weight_R.min() >= lowest:
                break  # the largest expert alone makes a fuller rank
            trial_RS[:] = slots_RS
            trial_RS[:, num_primaries:] = -1
            even_quotas(load_L, trial_RS, quota_RS, tokens_R)
            reached, floor = np.inf, 0.0
        while swaps < most_swaps and stalled < max(PATIENCE // num_ranks, LEAST_PATIENCE):
            if best_peak <= enough + floor or price + min(prices[0], prices[1]) + enough + floor >= lowest:
                break  # not even a level plan would be worth another swap
            rank = fullest_rank(tokens_R, weight_R)
            partner, mine, theirs = best_swap(rank, tokens_R, weight_R, load_L, own_RN, node_R, prices[0], prices[1])
            if with_copies and (
                partner < 0 or stalled % 2 == 1
            ):  # where copies filled all others: as if there were none
                alone_R[:] = 0
                for other in range(num_ranks):
                    for expert in own_RN[other]:
                        alone_R[other] += load_L[expert]
                rank = fullest_rank(alone_R, weight_R)
                partner, mine, theirs = best_swap(rank, alone_R, weight_R, load_L, own_RN, node_R, prices[0], prices[1])
            if partner < 0:
                break
            given, taken = own_RN[rank, mine], own_RN[partner, theirs]
            own_RN[rank, mine], own_RN[partner, theirs] = taken, given
            price += prices[0] if node_R[rank] == node_R[partner] else prices[1]
            swaps += 1
            if with_copies:
                peak = copy_and_level(
                    load_L, spread_L, likely_L, trial_RS, num_primaries, level_R, weight_R, node_R, copy, present,
                    lowest - price, enough, quota_RS, tokens_R,
                )  # fmt: skip
            elif has_toll:
                even_quotas(load_L, trial_RS, quota_RS, tokens_R)
                peak = weigh_copies(
                    load_L, likely_L, trial_RS, num_primaries, weight_R, copy, present, LEVEL, quota_RS, tokens_R
                )
            else:
                tokens_R[rank] -= load_L[given] - load_L[taken]
                tokens_R[partner] += load_L[given] - load_L[taken]
                peak = fullest(tokens_R, weight_R)
            stalled += 1
            if peak + price < reached:
                reached, stalled = peak + price, 0
            if peak + price < lowest:
                lowest, best_peak, best_price, best_swaps = peak + price, peak, price, swaps
                best_RS = trial_RS.copy()
                is_new = True
    if not is_new:
        return 0.0, 0
    keep_slots(slots_RS, best_RS, num_primaries)
    slots_RS[:] = best_RS
    return before - best_peak - best_price, best_swaps


@compiled
def stiff_ranks(load_L, spread_L, slots_RS, quota_RS):
    """How many ranks could not leave ``LOOSE_SPREADS`` standard deviations of their tokens to other copies.

    Level as they may be now, they stay above the others when their experts get more.
    """
    copies_L = np.zeros(load_L.size, dtype=np.int64)
    for rank in range(slots_RS.shape[0]):
        for expert in slots_RS[rank]:
            if expert >= 0:
                copies_L[expert] += 1
    stiff = 0
    for rank in range(slots_RS.shape[0]):
        variance = 0.0
        loose = np.int64(0)
        for slot in range(slots_RS.shape[1]):
            expert = slots_RS[rank, slot]
            if expert >= 0 and quota_RS[rank, slot] > 0:
                spread = spread_L[expert] * (quota_RS[rank, slot] / load_L[expert])
                variance += spread * spread
                if copies_L[expert] > 1:
                    loose += quota_RS[rank, slot]
        stiff += loose < LOOSE_SPREADS * np.sqrt(variance)
    return stiff


@compiled
def copy_and_level(
    load_L,
    spread_L,
    likely_L,
    slots_RS,
    num_primaries,
    level_R,
    weight_R,
    node_R,
    copy,
    present,
    limit,
    enough,
    quota_RS,
    tokens_R,
):
    """Choose the copies for the primaries of ``slots_RS``, in place, and divide the tokens among them.

    Trees of several depths are grown until one levels the ranks as it is, which costs far less than to sweep over the
    quotas of one that does not. Only where none does, the one is swept of which the first sweeps made most.

    Returns:
        The weighted parts of the fullest rank, with what :func:`weigh_copies` adds where copies cost something.
    """
    num_ranks, num_slots = slots_RS.shape
    least = np.int64(copy)
    own_RN, held_RE = slots_RS[:, :num_primaries], slots_RS[:, num_primaries:]
    left_RN, quota_RE = quota_RS[:, :num_primaries], quota_RS[:, num_primaries:]
    is_one = num_primaries == 1 and num_slots == 2
    is_few = num_primaries < FEW or copy > 0
    depths = DEPTHS_OF_FEW if is_few else DEPTHS
    if is_one:
        depths = DEPTHS_OF_ONE
    lowest = np.inf
    peak_D = np.empty(len(DEPTHS))
    tried_DRE = np.empty((len(DEPTHS), num_ranks, num_slots - num_primaries), dtype=np.int64)
    quota_DRS = np.empty((len(DEPTHS), num_ranks, num_slots), dtype=np.int64)
    seen = survey(load_L, spread_L, own_RN, level_R, node_R, is_one)
    for attempt in range(len(DEPTHS) + (0 if is_few else len(FURTHER_DEPTHS))):
        is_further = attempt >= len(DEPTHS)
        depth = FURTHER_DEPTHS[attempt - len(DEPTHS)] if is_further else depths[attempt]
        grow_tree(seen, own_RN, level_R, node_R, least, depth, is_one, held_RE, left_RN, quota_RE, tokens_R)
        lowest = fullest(tokens_R, weight_R)
        if not is_further:
            peak_D[attempt] = lowest
        if copy > 0:  # deep links make few copies: no other tree where quotas level this one
            hedge(load_L, spread_L, seen, own_RN, least, held_RE)
            lowest = level_quotas(load_L, slots_RS, weight_R, SWEEPS, enough, SLOW, quota_RS, tokens_R)
        if lowest <= enough:
            hedge(load_L, spread_L, seen, own_RN, least, held_RE)
            if is_one and copy == 0:  # the ranks have the tree only, to bring them what may come
                swap_copies(load_L, spread_L, slots_RS, level_R, node_R, quota_RS)
                sum_quotas(quota_RS, tokens_R)
                lowest = fullest(tokens_R, weight_R)
            break
        if not is_further:
            tried_DRE[attempt], quota_DRS[attempt] = held_RE, quota_RS
    if lowest > enough:  # no tree levels the ranks: the one of which quotas make most
        lowest, best = np.inf, 0
        low = np.inf if copy > 0 else np.sort(peak_D)[SWEPT - 1]
        for attempt in range(len(DEPTHS)):
            hedge(load_L, spread_L, seen, own_RN, least, tried_DRE[attempt])
        for attempt in range(len(DEPTHS)):
            is_new = peak_D[attempt] <= low
            for other in range(attempt):
                is_new &= not is_same(tried_DRE[attempt], tried_DRE[other])
            if not is_new:
                continue
            held_RE[:] = tried_DRE[attempt]
            sum_quotas(quota_DRS[attempt], tokens_R)
            peak = level_quotas(load_L, slots_RS, weight_R, FEW_SWEEPS, enough, SLOW, quota_DRS[attempt], tokens_R)
            if peak < lowest:
                lowest, best = peak, attempt
        held_RE[:] = tried_DRE[best]
        quota_RS[:] = quota_DRS[best]
        sum_quotas(quota_RS, tokens_R)
        lowest = level_quotas(load_L, slots_RS, weight_R, SWEEPS - FEW_SWEEPS, enough, SLOW, quota_RS, tokens_R)
    if copy > 0:
        return drop_copies(
            load_L, likely_L, slots_RS, num_primaries, weight_R, copy, present, LEVEL, limit, enough, quota_RS,
            tokens_R,
        )  # fmt: skip
    return lowest


@inlined
def is_same(one_RE, other_RE):
    for rank in range(one_RE.shape[0]):
        for slot in range(one_RE.shape[1]):
            if one_RE[rank, slot] != other_RE[rank, slot]:
                return False
    return True


@inlined
def sum_quotas(quota_RS, tokens_R):
    """Fill in the parts of each rank."""
    for rank in range(quota_RS.shape[0]):
        tokens_R[rank] = 0
        for quota in quota_RS[rank]:
            tokens_R[rank] += quota
