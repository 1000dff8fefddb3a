"""Choose the redundant experts of a single batch, whose counts are known. Compiled.

Shape suffixes: ``L`` logical experts, ``R`` ranks, ``S`` slots of a rank.
"""

import numpy as np

from lightning_eplb._compiled import compiled
from lightning_eplb.policies.token_split import (
    LEVEL_ENOUGH,
    SWEEPS,
    Replicas,
    copy_slots,
    even_quotas,
    find_replicas,
    heaviest_first,
    level_quotas,
)

LEVEL = 1.0 + 1.0 / 128
"""A fullest rank that is so many times the mean is low enough."""
DEPTH = 0.5
"""Most that a rank gives away below its level, in parts of it, where replicas form a tree."""
MOST_LINKS = 4
"""Further replicas that the best attempt is given at most, one at a time. Without them the fullest of 8 ranks had up to
1.027 of the mean, not 1.008 (lognormal-0.7)."""


def choose_copies(
    load_L: np.ndarray, slots_RS: np.ndarray, num_primaries: int, weight_R: np.ndarray, least: int
) -> np.ndarray:
    """Level the ranks with replicas that each take over enough tokens to pay for the travel of weights and gradient.

    The fullest rank's heaviest expert gets a replica on the emptiest rank, again and again. Where that does not level
    the ranks, other orders are tried, then the tree of :func:`grow_tree`, which needs more replicas, and last the best
    of them is given further ones. Where the ranks are level already there are none. Whole numbers and single IEEE
    operations, ties to the lower index: every rank that is given the same load finds the same replicas.

    Args:
        load_L: Tokens of each logical expert, int64.
        slots_RS: Placement, int64: its primaries count, its redundant slots do not. -1 is a phantom expert.
        num_primaries: The first slots of each rank.
        weight_R: Cost of a token on each rank, float64 above 0; see
            :func:`lightning_eplb.policies.token_split.rank_weights`.
        least: Tokens that a replica must take over, at least 1.

    Returns:
        The slots, int64 ``[R, S]``, with this batch's replicas; -1 where a redundant slot stays empty.
    """
    chosen_RS = slots_RS.copy()
    chosen_RS[:, num_primaries:] = -1
    if chosen_RS.shape[1] > num_primaries:
        level_R = np.ceil(load_L.sum() * (1.0 / weight_R / (1.0 / weight_R).cumsum()[-1])).astype(np.int64)
        _choose_copies(load_L, chosen_RS, num_primaries, weight_R, level_R, max(int(min(least, 2**62)), 1))
    return chosen_RS


@compiled
def _choose_copies(
    load_L: np.ndarray, slots_RS: np.ndarray, num_primaries: int, weight_R: np.ndarray, level_R: np.ndarray, least: int
) -> None:
    total, speed = load_L.sum(), (1.0 / weight_R).sum()
    enough, low_enough = LEVEL_ENOUGH * total / speed, LEVEL * total / speed + 1.0
    trial_RS = slots_RS.copy()
    lowest = np.inf
    for attempt in range(5 + MOST_LINKS):
        copy_slots(slots_RS, trial_RS)
        if attempt < 5:
            trial_RS[:, num_primaries:] = -1
        if attempt < 4:
            spill_greedily(load_L, trial_RS, num_primaries, level_R, least, attempt)
        elif attempt == 4:
            grow_tree(load_L, trial_RS, num_primaries, level_R, least, (0.0, DEPTH))
        else:
            add_link(load_L, trial_RS, num_primaries, weight_R, least, enough)
        peak = divide_batch(load_L, trial_RS, weight_R, enough)[1]
        if peak < lowest:
            lowest = peak
            copy_slots(trial_RS, slots_RS)
        elif attempt > 4:
            return
        if lowest <= low_enough:
            return


@compiled
def divide_batch(
    load_L: np.ndarray, slots_RS: np.ndarray, weight_R: np.ndarray, enough: float
) -> tuple[Replicas, float]:
    """Divide a batch by levelled quotas. Returns them, and the weighted tokens of the fullest rank."""
    replicas = find_replicas(slots_RS, load_L.size, weight_R)
    even_quotas(load_L, replicas)
    return replicas, level_quotas(load_L, replicas, SWEEPS, enough)


@compiled
def add_link(
    load_L: np.ndarray, slots_RS: np.ndarray, num_primaries: int, weight_R: np.ndarray, least: int, enough: float
) -> None:
    """Give one of the emptiest ranks a replica of what the fullest serves, the first that lowers that one, in place.

    It takes a free slot or, on the emptiest rank, that of another replica.
    """
    replicas, before = divide_batch(load_L, slots_RS, weight_R, enough)
    order_R = heaviest_first(replicas.tokens_R * -weight_R)  # the emptiest first
    full = order_R[-1]
    empty = order_R[0]
    gap = replicas.tokens_R[full] * weight_R[full] - replicas.tokens_R[empty] * weight_R[empty]
    if gap < least * (weight_R[full] + weight_R[empty]):
        return  # the emptiest rank could not take over so many
    for rank in order_R[:-1]:
        for slot in range(num_primaries, slots_RS.shape[1]):
            replaced = slots_RS[rank, slot]
            if replaced >= 0 and rank != empty:
                continue
            given, most = np.int64(-1), least - 1
            for place in range(replicas.quota_P.size):
                if replicas.rank_P[place] == full and replicas.quota_P[place] > most:
                    expert = slots_RS[full, replicas.slot_P[place]]
                    if not is_on(slots_RS[rank], expert):
                        given, most = expert, replicas.quota_P[place]
            if given < 0:
                continue
            slots_RS[rank, slot] = given
            if divide_batch(load_L, slots_RS, weight_R, enough)[1] < before:
                return
            slots_RS[rank, slot] = replaced


@compiled
def over_level(load_L: np.ndarray, slots_RS: np.ndarray, num_primaries: int, level_R: np.ndarray) -> np.ndarray:
    """Count the tokens of each rank's primaries above what it should serve."""
    over_R = -level_R
    for rank in range(over_R.size):
        for slot in range(num_primaries):
            if slots_RS[rank, slot] >= 0:
                over_R[rank] += load_L[slots_RS[rank, slot]]
    return over_R


@compiled
def is_on(slots_S: np.ndarray, expert: int) -> bool:
    """Return whether a rank holds the expert."""
    found = False
    for held in slots_S:
        found |= held == expert
    return found


@compiled
def heaviest_missing(
    left_L: np.ndarray, slots_RS: np.ndarray, giver: int, taker: int, num_primaries: int
) -> tuple[np.int64, np.int64]:
    """Find the giver's primary with most tokens left that the taker does not hold, and these tokens; -1, 0 if none."""
    found, most = np.int64(-1), np.int64(0)
    for slot in range(num_primaries):
        mine = slots_RS[giver, slot]
        if mine >= 0 and left_L[mine] > most and not is_on(slots_RS[taker], mine):
            found, most = np.int64(mine), np.int64(left_L[mine])
    return found, most


@compiled
def spill_greedily(
    load_L: np.ndarray, slots_RS: np.ndarray, num_primaries: int, level_R: np.ndarray, least: int, order: int
) -> None:
    """Fill the redundant slots, which are empty, in place, each with the expert that has most to give.

    Args:
        load_L: Tokens of each expert, int64.
        slots_RS: Slots with primaries only; filled in place.
        num_primaries: First slots of each rank.
        level_R: Tokens that each rank should serve, int64.
        least: Tokens that a replica must take over.
        order: 0 to 3. Odd: ranks with the smallest gap are filled up first, not those that can take most. 2 and above:
            the lowest of the ranks that are too full gives first, not the fullest.
    """
    num_ranks, num_slots = slots_RS.shape
    small_first, low_first = order % 2 == 1, order >= 2
    left_L, over_R = load_L.copy(), over_level(load_L, slots_RS, num_primaries, level_R)
    next_R = np.full(num_ranks, num_primaries)
    is_done_R = np.zeros(num_ranks, dtype=np.bool_)
    while True:
        giver = np.int64(-1)
        for rank in range(num_ranks):
            if over_R[rank] < least or is_done_R[rank]:
                continue
            if giver < 0 or (over_R[rank] < over_R[giver] if low_first else over_R[rank] > over_R[giver]):
                giver = np.int64(rank)
        if giver < 0:
            return
        expert, taker, amount = np.int64(-1), np.int64(-1), np.int64(0)
        for rank in range(num_ranks):
            room = min(-over_R[rank], over_R[giver])
            if next_R[rank] == num_slots or room < least:
                continue
            if taker >= 0 and (over_R[rank] <= over_R[taker] if small_first else room <= amount):
                continue
            found, most = heaviest_missing(left_L, slots_RS, giver, rank, num_primaries)
            most = min(most, room)
            if most >= least and (small_first or most > amount):
                expert, taker, amount = found, np.int64(rank), most
        if taker < 0:
            is_done_R[giver] = True
            continue
        slots_RS[taker, next_R[taker]] = expert
        next_R[taker] += 1
        left_L[expert] -= amount
        over_R[giver] -= amount
        over_R[taker] += amount


@compiled
def grow_tree(
    load_L: np.ndarray,
    slots_RS: np.ndarray,
    num_primaries: int,
    level_R: np.ndarray,
    least: int,
    below: tuple[float, float],
) -> None:
    """Fill the redundant slots, which are empty, in place, so that the replicas form a tree over the ranks.

    From the lowest to the fullest, a rank above its level fills up others by one replica each until it is at its level,
    or below; then it waits to be filled up by a fuller one. With one slot a rank, ``R - 1`` replicas level any load of
    one expert a rank: the alias method (Walker 1974; Vose 1991).

    Args:
        load_L: Tokens of each expert, int64.
        slots_RS: Slots with primaries only; filled in place.
        num_primaries: First slots of each rank.
        level_R: Tokens that each rank should serve, int64.
        least: Tokens that a replica must take over.
        below: Least and most that a rank gives away below its level, in parts of it. The least, up to half of its
            heaviest expert, can flow back when the load changes: so ranks that are level are connected, too.
    """
    num_ranks, num_slots = slots_RS.shape
    left_L, over_R = load_L.copy(), over_level(load_L, slots_RS, num_primaries, level_R)
    goal_R = np.empty(num_ranks, dtype=np.int64)
    is_done_R = np.empty(num_ranks, dtype=np.bool_)  # has given, or has nothing to give
    for rank in range(num_ranks):
        most = np.int64(0)
        for slot in range(num_primaries):
            if slots_RS[rank, slot] >= 0:
                most = max(most, load_L[slots_RS[rank, slot]])
        goal_R[rank] = -min(np.int64(below[0] * level_R[rank]), most // 2)
        is_done_R[rank] = over_R[rank] < goal_R[rank]
    next_R = np.full(num_ranks, num_primaries)
    for turn in range(num_ranks):
        giver, fullest = np.int64(-1), np.int64(0)
        for rank in range(num_ranks):
            if not is_done_R[rank] and (giver < 0 or over_R[rank] < over_R[giver]):
                giver = np.int64(rank)
            if over_R[rank] >= over_R[fullest]:
                fullest = np.int64(rank)
        if giver < 0:
            return
        is_done_R[giver] = True
        lowest = -np.int64(below[1] * level_R[giver])
        while over_R[giver] > goal_R[giver]:
            expert, taker, amount = np.int64(-1), np.int64(-1), least - 1
            for rank in range(num_ranks):
                gap = -over_R[rank]
                if rank == giver or not is_done_R[rank] or next_R[rank] == num_slots:
                    continue
                if gap <= amount or over_R[giver] - gap < lowest:
                    continue
                found, most = heaviest_missing(left_L, slots_RS, giver, rank, num_primaries)
                if most >= gap:  # one replica fills it
                    expert, taker, amount = found, np.int64(rank), gap
            if taker < 0 and turn == 0 and goal_R[giver] < 0 and fullest != giver and next_R[fullest] < num_slots:
                taker, amount = fullest, over_R[giver] - goal_R[giver]  # closes a ring
                expert, most = heaviest_missing(left_L, slots_RS, giver, taker, num_primaries)
                amount = min(amount, most)
            if taker < 0 or expert < 0:
                break
            slots_RS[taker, next_R[taker]] = expert
            next_R[taker] += 1
            left_L[expert] -= amount
            over_R[giver] -= amount
            over_R[taker] += amount
