"""Which experts get redundant copies for a single batch, whose counts are known.

Shape suffixes: ``L`` logical experts, ``R`` ranks, ``S`` slots on a rank.
"""

import numpy as np

from lightning_eplb._compiled import compiled
from lightning_eplb.policies.split import LEVEL_ENOUGH, SPLIT_SWEEPS, even_quotas, fullest_rank, level_quotas

LEVEL = 1.0 + 1.0 / 128
"""A fullest rank that is so many times the mean is low enough."""
DEPTHS = (0.7, 0.5, 1.0)
"""How much a link of the tree may carry, see :func:`grow_tree`: tried in this order."""
MOST_LINKS = 4
"""Further copies that are added to the best attempt at most, one at a time."""
MOST_TRIES = 8
"""Places that are tried for each of them."""


def choose_copies(
    load_L: np.ndarray, slots_RS: np.ndarray, num_primaries: int, weight_R: np.ndarray, least: int
) -> np.ndarray:
    """Level the ranks with copies that each take over enough tokens to pay for the travel of weights and gradient.

    The fullest rank's heaviest expert gets a copy on the emptiest rank, again and again. Where that does not level the
    ranks, other orders are tried, then the tree of :func:`grow_tree`, which needs more
    copies, and last the best of them is given further links. Where the ranks are level already there are no copies.
    Whole numbers and single IEEE operations, ties to the lower index: every rank that is given the same load finds the
    same copies.

    Args:
        load_L: Tokens of each logical expert, int64.
        slots_RS: The placement: its primaries count, its redundant slots do not. int64.
        num_primaries: The first slots of each rank.
        weight_R: What a token costs on each rank, float64 above 0; see
            :func:`lightning_eplb.policies.split.rank_weights`.
        least: Tokens that a copy must take over, at least 1.

    Returns:
        The slots, int64 ``[R, S]``, with this batch's copies; -1 where a redundant slot stays empty.
    """
    chosen_RS = slots_RS.copy()
    chosen_RS[:, num_primaries:] = -1
    _choose_copies(load_L, chosen_RS, num_primaries, weight_R, max(int(min(least, 2**62)), 1))
    return chosen_RS


@compiled
def _choose_copies(
    load_L: np.ndarray, slots_RS: np.ndarray, num_primaries: int, weight_R: np.ndarray, least: int
) -> None:
    num_ranks, num_slots = slots_RS.shape
    if num_slots == num_primaries:
        return
    level_R = np.empty(num_ranks, dtype=np.int64)
    total, speed = load_L.sum(), 0.0
    for rank in range(num_ranks):
        speed += 1.0 / weight_R[rank]
    for rank in range(num_ranks):
        level_R[rank] = np.int64(np.ceil(total * (1.0 / weight_R[rank] / speed)))
    quota_RS = np.empty_like(slots_RS)
    tokens_R = np.empty(num_ranks, dtype=np.int64)
    trial_RS = slots_RS.copy()
    enough, low_enough = LEVEL_ENOUGH * total / speed, LEVEL * total / speed + 1.0
    lowest = np.inf
    for attempt in range(4 + len(DEPTHS)):
        if attempt < 4:
            spill_greedily(load_L, trial_RS, num_primaries, level_R, least, attempt % 2 == 1, attempt >= 2)
        else:
            grow_tree(load_L, trial_RS, num_primaries, level_R, least, DEPTHS[attempt - 4], 0.0)
        even_quotas(load_L, trial_RS, quota_RS, tokens_R)
        peak = level_quotas(load_L, trial_RS, weight_R, SPLIT_SWEEPS, enough, 0.0, quota_RS, tokens_R)
        if peak < lowest:
            lowest = peak
            slots_RS[:] = trial_RS
        if lowest <= low_enough:
            return
    even_quotas(load_L, slots_RS, quota_RS, tokens_R)
    level_quotas(load_L, slots_RS, weight_R, SPLIT_SWEEPS, enough, 0.0, quota_RS, tokens_R)
    for _ in range(MOST_LINKS):
        if lowest <= low_enough:
            return
        peak = add_link(load_L, slots_RS, num_primaries, weight_R, least, enough, quota_RS, tokens_R)
        if peak >= lowest:
            return
        lowest = peak


@compiled
def add_link(
    load_L: np.ndarray,
    slots_RS: np.ndarray,
    num_primaries: int,
    weight_R: np.ndarray,
    least: int,
    enough: float,
    quota_RS: np.ndarray,
    tokens_R: np.ndarray,
) -> float:
    """Relieve the fullest rank by one more copy of what it serves, in place.

    It goes where a slot is free: to a rank that in turn can leave as much to the emptiest, or to any other; or to the
    emptiest itself, in the place of another copy.

    Returns:
        The weighted tokens of the fullest rank, as they were where none of the first ``MOST_TRIES`` helps.
    """
    num_ranks, num_slots = slots_RS.shape
    full, empty = fullest_rank(tokens_R, weight_R), np.int64(0)
    for rank in range(num_ranks):
        if tokens_R[rank] * weight_R[rank] < tokens_R[empty] * weight_R[empty]:
            empty = np.int64(rank)
    before = float(tokens_R[full] * weight_R[full])
    if tokens_R[full] - tokens_R[empty] < 2 * least:
        return before
    before_quota_RS, before_tokens_R = quota_RS.copy(), tokens_R.copy()
    tries = 0
    for turn in range(3):
        for place in range(num_ranks * (num_slots - num_primaries)):
            rank, slot = place // (num_slots - num_primaries), num_primaries + place % (num_slots - num_primaries)
            replaced = slots_RS[rank, slot]
            is_candidate = rank == empty if turn == 2 else replaced < 0 and rank != full
            if turn == 0 and is_candidate:
                is_candidate = has_to_leave(slots_RS, quota_RS, rank, empty, least)
            if not is_candidate or tries == MOST_TRIES:
                continue
            given, most = np.int64(-1), least - 1
            for mine in range(num_slots):
                if quota_RS[full, mine] > most and not is_on(slots_RS, rank, slots_RS[full, mine]):
                    given, most = slots_RS[full, mine], quota_RS[full, mine]
            if given < 0:
                continue
            tries += 1
            slots_RS[rank, slot] = given
            if replaced >= 0:
                even_quotas(load_L, slots_RS, quota_RS, tokens_R)
            peak = level_quotas(load_L, slots_RS, weight_R, SPLIT_SWEEPS, enough, 0.0, quota_RS, tokens_R)
            if peak < before:
                return peak
            slots_RS[rank, slot] = replaced
            quota_RS[:] = before_quota_RS
            tokens_R[:] = before_tokens_R
    return before


@compiled
def is_on(slots_RS: np.ndarray, rank: int, expert: int) -> bool:
    found = False
    for held in slots_RS[rank]:
        found |= held == expert
    return found


@compiled
def has_to_leave(slots_RS: np.ndarray, quota_RS: np.ndarray, rank: int, other: int, least: int) -> bool:
    """Whether ``rank`` serves at least so many tokens of an expert that ``other`` holds too."""
    for slot in range(slots_RS.shape[1]):
        if quota_RS[rank, slot] >= least and is_on(slots_RS, other, slots_RS[rank, slot]):
            return True
    return False


@compiled
def spill_greedily(
    load_L: np.ndarray,
    slots_RS: np.ndarray,
    num_primaries: int,
    level_R: np.ndarray,
    least: int,
    small_first: bool,
    low_first: bool,
) -> None:
    """Fill the redundant slots, in place, each with the expert that has most to give.

    Args:
        small_first: Fill up the ranks with the smallest gap first, not those that can take most.
        low_first: The lowest of the ranks that are too full gives first, not the fullest.
    """
    num_ranks, num_slots = slots_RS.shape
    slots_RS[:, num_primaries:] = -1
    left_L = load_L.copy()
    over_R = -level_R  # tokens above what the rank should serve
    for rank in range(num_ranks):
        for slot in range(num_primaries):
            over_R[rank] += load_L[slots_RS[rank, slot]]
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
            room = -over_R[rank]
            if next_R[rank] == num_slots or room < least:
                continue
            if taker >= 0 and (room >= -over_R[taker] if small_first else min(room, over_R[giver]) <= amount):
                continue
            found, most = np.int64(-1), np.int64(least - 1)
            for slot in range(num_primaries):
                mine = slots_RS[giver, slot]
                given = min(left_L[mine], min(room, over_R[giver]))
                if given <= most:
                    continue
                is_there = False
                for other in range(num_primaries, next_R[rank]):
                    is_there |= slots_RS[rank, other] == mine
                if not is_there:
                    found, most = mine, given
            if found >= 0 and (small_first or most > amount):
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
    depth: float,
    reserve: float,
) -> None:
    """Fill the redundant slots, in place, so that the replicas form a tree over the ranks.

    From the lowest to the fullest, a rank above its level fills up others by one replica each until it is at its level,
    or below; then it waits to be filled up by a fuller one. With one slot a rank, ``R - 1`` replicas level any load of
    one expert a rank: the alias method (Walker 1974; Vose 1991).

    Args:
        depth: Most that a rank gives away below its level, in parts of it.
        reserve: Least that it gives away below its level, in parts of it and up to half of its heaviest expert: that
            can flow back when the load changes. So ranks that are level are connected, too.
    """
    num_ranks, num_slots = slots_RS.shape
    slots_RS[:, num_primaries:] = -1
    left_L = load_L.copy()
    over_R = -level_R  # tokens above what the rank should serve
    goal_R = np.empty(num_ranks, dtype=np.int64)
    is_done_R = np.empty(num_ranks, dtype=np.bool_)  # has given, or has nothing to give
    for rank in range(num_ranks):
        most = np.int64(0)
        for slot in range(num_primaries):
            over_R[rank] += load_L[slots_RS[rank, slot]]
            most = max(most, load_L[slots_RS[rank, slot]])
        goal_R[rank] = -min(np.int64(reserve * level_R[rank]), most // 2)
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
        lowest = -np.int64(depth * level_R[giver])
        while over_R[giver] > goal_R[giver]:
            expert, taker, amount = np.int64(-1), np.int64(-1), least - 1
            for rank in range(num_ranks):
                gap = -over_R[rank]
                if (
                    rank == giver
                    or not is_done_R[rank]
                    or gap <= amount
                    or next_R[rank] == num_slots
                    or over_R[giver] - gap < lowest
                ):
                    continue
                found, most = heaviest_missing(left_L, slots_RS, giver, rank, num_primaries, next_R[rank])
                if most >= gap:  # one replica fills it
                    expert, taker, amount = found, np.int64(rank), gap
            if taker < 0 and turn == 0 and goal_R[giver] < 0 and fullest != giver and next_R[fullest] < num_slots:
                taker, amount = fullest, over_R[giver] - goal_R[giver]  # closes a ring
                expert, most = heaviest_missing(left_L, slots_RS, giver, taker, num_primaries, next_R[taker])
                amount = min(amount, most)
            if taker < 0 or expert < 0:
                break
            slots_RS[taker, next_R[taker]] = expert
            next_R[taker] += 1
            left_L[expert] -= amount
            over_R[giver] -= amount
            over_R[taker] += amount


@compiled
def heaviest_missing(
    left_L: np.ndarray, slots_RS: np.ndarray, giver: int, taker: int, num_primaries: int, num_held: int
) -> tuple[np.int64, np.int64]:
    """Find the giver's primary with most tokens left that the taker does not hold, and these tokens; -1, 0 if none."""
    found, most = np.int64(-1), np.int64(0)
    for slot in range(num_primaries):
        mine = slots_RS[giver, slot]
        if left_L[mine] > most:
            is_there = False
            for other in range(num_primaries, num_held):
                is_there |= slots_RS[taker, other] == mine
            if not is_there:
                found, most = np.int64(mine), np.int64(left_L[mine])
    return found, most
