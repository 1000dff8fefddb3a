"""Which experts get redundant copies, and where: one layer at a time, compiled.

Tokens are counted in parts here, see :func:`scale_to_parts`: whole numbers, a layer's total below ``2**31``, so that no
sum, product or square of them leaves int64.

Shape suffixes: ``L`` logical experts, ``R`` ranks, ``N`` primaries on a rank, ``E`` redundant slots on a rank, ``S``
slots on a rank.
"""

from typing import NamedTuple

import numpy as np

from lightning_eplb.compiled import compiled, inlined
from lightning_eplb.policies.bits import find_bit, find_common_bit

PARTS_BITS = 31
"""A layer's tokens are scaled by a power of two to a total below ``2**PARTS_BITS``, and not far below."""

LEAST_LINK = 4
"""A link carries at least the mean divided by this, or half of what the lowest donor has."""
LINK_SPREADS = 2.0
"""In between, it carries so many standard deviations of what lies behind it."""
NEAR = 16
"""A taker on the donor's node is looked for among so many that lack about as much."""
FEW_RANKS = 128
"""So many are put in order by counting those before each: more comparisons than to sort, but without branches."""
MARGIN_SPREADS = 2.5
"""A rank that is less than so many standard deviations below its level has load to give."""
SPREADS_OF_ONE = 3.0
"""Instead of both, where each rank holds one expert and has one slot."""
DEEPER_OF_ONE = 0.55
"""There, a link may carry so many standard deviations of what lies behind it in addition to ``depth``."""


@compiled
def scale_to_parts(load_L, parts_L):
    """Fill ``parts_L`` with the load in parts of a token, or of ``2**n`` tokens.

    Returns the bits that it was shifted by, to the left.
    Any int64 counts will do: the sum need not fit int64.
    """
    high = np.int64(0)
    low = np.int64(0)
    for load in load_L:
        high += load >> 20
        low += load & 0xFFFFF
    high += low >> 20
    bits = 0
    while high >> bits > 0:
        bits += 1
    bits += 20 if bits else 0
    if not bits:
        while low >> bits > 0:
            bits += 1
    shift = PARTS_BITS - 1 - bits
    for expert in range(load_L.size):
        parts_L[expert] = load_L[expert] << shift if shift >= 0 else load_L[expert] >> -shift
    return shift


@inlined
def heaviest(rank, left_RN):
    """Where the rank's expert with the most tokens left is among its primaries, and these tokens."""
    found, most = np.int64(0), left_RN[rank, 0]
    for position in range(1, left_RN.shape[1]):
        left = left_RN[rank, position]
        found = np.int64(position) if left > most else found
        most = left if left > most else most
    return found, most


@inlined
def give(expert_limit, least, giver, taker, position, most, own_RN, held_RE, quota_RE, count_R, left_RN, tokens_R):
    """Copy the giver's expert with the most tokens left to the taker's next slot, with at most ``expert_limit`` tokens.

    ``position`` and ``most`` are what :func:`heaviest` says of the giver. Returns the tokens that changed ranks; 0 if
    the giver has fewer than ``least`` to give, or the taker has a copy of all it has.
    """
    count = count_R[taker]
    is_there = False
    for slot in range(count):
        is_there |= held_RE[taker, slot] == own_RN[giver, position]
    if is_there:
        most = np.int64(0)
        for other in range(left_RN.shape[1]):
            if left_RN[giver, other] > most:
                is_there = False
                for slot in range(count):
                    is_there |= held_RE[taker, slot] == own_RN[giver, other]
                if not is_there:
                    position, most = np.int64(other), left_RN[giver, other]
    amount = min(expert_limit, most)
    if amount < least:
        return np.int64(0)
    left_RN[giver, position] -= amount
    tokens_R[giver] -= amount
    tokens_R[taker] += amount
    held_RE[taker, count] = own_RN[giver, position]
    quota_RE[taker, count] = amount
    count_R[taker] = count + 1
    return amount


@inlined
def order_by(key_R, ranks):
    """Fill in the ranks, the smallest key first; lower rank first."""
    num_ranks = key_R.size
    if num_ranks > FEW_RANKS:
        for rank in range(num_ranks):
            ranks[rank] = key_R[rank] * num_ranks + rank
        ranks.sort()
        for place in range(num_ranks):
            ranks[place] %= num_ranks
        return
    for rank in range(num_ranks):
        key_R[rank] = key_R[rank] * num_ranks + rank
    for rank in range(num_ranks):
        place = np.int64(0)
        for other in range(num_ranks):
            place += key_R[other] < key_R[rank]
        ranks[place] = rank


class Survey(NamedTuple):
    """Who gives, from the lowest to the hottest, and who takes, from the largest gap to the smallest."""

    loads: np.ndarray
    """The parts of each primary, by rank."""
    tokens: np.ndarray
    """Their sum for each rank."""
    variances: np.ndarray
    """The sum of their variances for each rank."""
    donors: np.ndarray
    """The ranks that give."""
    claims: np.ndarray
    """In proportion to these, donors collect others."""
    takers: np.ndarray
    """The ranks that take."""
    gaps: np.ndarray
    """What each taker lacks; then -1, once at least, to a multiple of 64."""
    near: np.ndarray
    """For each node the takers that are there: a bit for each, in words of 64."""
    num_donors: np.int64
    num_takers: np.int64
    link: np.int64
    """What a link should carry at least."""


@compiled
def survey(load_L, spread_L, own_RN, level_R, node_R, is_one):
    """See who gives and who takes. Args: as for :func:`spill`, and whether a rank has one expert and one slot."""
    num_ranks, num_primaries = own_RN.shape
    load_RN = np.empty((num_ranks, num_primaries), dtype=np.int64)
    tokens_R, variance_R = np.empty(num_ranks, dtype=np.int64), np.empty(num_ranks)
    key_R = np.empty(num_ranks, dtype=np.int64)
    total = np.int64(0)
    for rank in range(num_ranks):
        tokens, variance = np.int64(0), 0.0
        for position in range(num_primaries):
            expert = own_RN[rank, position]
            load, spread = load_L[expert], float(spread_L[expert])
            load_RN[rank, position] = load
            tokens += load
            variance += spread * spread
        tokens_R[rank], variance_R[rank] = tokens, variance
        key_R[rank] = tokens - level_R[rank] + (np.int64(1) << 32)
        total += level_R[rank]
    mean = max(total // num_ranks, np.int64(1))
    ranks = np.empty(num_ranks, dtype=np.int64)
    order_by(key_R, ranks)
    num_nodes = np.int64(0)
    for node in node_R:
        num_nodes = max(num_nodes, node + 1)
    donors, claims = np.empty(num_ranks, dtype=np.int64), np.empty(num_ranks, dtype=np.int64)
    takers, gaps = np.empty(num_ranks, dtype=np.int64), np.full(64 * (num_ranks // 64 + 1), -1)
    near = np.zeros((num_nodes, num_ranks // 64 + 1), dtype=np.uint64)
    num_donors = num_takers = np.int64(0)
    least_offer = mean
    margin_spreads = SPREADS_OF_ONE if is_one else MARGIN_SPREADS
    for rank in ranks:
        below = level_R[rank] - tokens_R[rank]
        if below <= np.int64(margin_spreads * np.sqrt(variance_R[rank])):
            donors[num_donors] = rank
            claims[num_donors] = tokens_R[rank] * tokens_R[rank] // mean if is_one else tokens_R[rank]
            num_donors += 1
            least_offer = min(least_offer, heaviest(rank, load_RN)[1])
        else:
            takers[num_takers], gaps[num_takers] = rank, below
            near[node_R[rank], num_takers >> 6] |= np.uint64(1) << np.uint64(num_takers & 63)
            num_takers += 1
    link = min(mean // LEAST_LINK, least_offer // 2)
    return Survey(load_RN, tokens_R, variance_R, donors, claims, takers, gaps, near, num_donors, num_takers, link)


@compiled
def spill(load_L, spread_L, own_RN, level_R, node_R, least, depth, held_RE, left_RN, quota_RE, tokens_R):
    """Level the ranks with redundant copies that also take what the next batches may bring.

    The copies form a tree over the ranks. It is built from its leaves. A rank with few tokens waits to be filled up by
    one copy. A rank with many (a donor) fills such ranks, and earlier donors, until it is itself *below* its level, by
    what may have to flow through its link later; then it waits to be filled up by a copy of a later donor. So every
    rank is level, and each copy serves tokens that it could also leave to others: when a load drifts, the quotas shift
    along the tree. Donors are taken from the lowest to the hottest, and a donor collects others in proportion to its
    tokens, as the hottest ranks may drift the most. That is Walker's and Vose's alias method (1974, 1991) with a
    reserve, and the long chain of Jordan and Graves (1995): with one slot a rank, ``R - 1`` copies connect all ranks.

    With one expert and one slot a rank, the tree is all that ranks have in common. Donors then collect others in
    proportion to the square of their tokens, so that the branches of the hottest are large enough for much of a drift
    to cancel out.

    What the tree cannot level is then spilled greedily, the fullest rank to the emptiest with a free slot. Slots that
    are still free hedge: they hold the largest experts of the ranks that have most to give.

    Args:
        load_L: Expected parts of each expert, int64.
        spread_L: Standard deviation of each, int64.
        own_RN: The primaries of each rank, int64.
        level_R: What each rank should serve, int64; they sum to the load, or a little above.
        node_R: The node of each rank, int64. A taker on the giver's node is preferred among those that fit.
        least: Parts that a copy must serve to be worth its weights, int64.
        depth: The most that a link may carry, in parts of what its rank should serve: 0 to 1. With one expert and one
            slot a rank, that and ``DEEPER_OF_ONE``.
        held_RE: Filled with the experts of the redundant slots, -1 where one stays empty; int64.
        quota_RE: Filled with the parts that each of them serves, int64.
        left_RN: Filled with the parts that each primary serves, int64.
        tokens_R: Filled with the parts that each rank serves, int64.
    """
    is_one = held_RE.shape[1] == 1 and own_RN.shape[1] == 1
    seen = survey(load_L, spread_L, own_RN, level_R, node_R, is_one)
    grow_tree(seen, own_RN, level_R, node_R, least, depth, is_one, held_RE, left_RN, quota_RE, tokens_R)
    hedge(load_L, spread_L, seen, own_RN, least, held_RE)


@compiled
def grow_tree(seen, own_RN, level_R, node_R, least, depth, is_one, held_RE, left_RN, quota_RE, tokens_R):
    """Grow the tree, and spill what it leaves. Args: as for :func:`spill`, and what :func:`survey` saw."""
    num_ranks, num_slots = held_RE.shape
    held_RE[:] = -1
    quota_RE[:] = 0
    left_RN[:] = seen.loads
    tokens_R[:] = seen.tokens
    if num_slots == 0:
        return
    variance_R = seen.variances.copy()
    count_R = np.zeros(num_ranks, dtype=np.int64)
    least = max(least, np.int64(1))
    link_spreads = SPREADS_OF_ONE if is_one else LINK_SPREADS
    deeper = DEEPER_OF_ONE if is_one else 0.0
    donors, claims_R, gaps, link = seen.donors, seen.claims, seen.gaps, seen.link
    num_donors, num_takers = seen.num_donors, seen.num_takers
    claims = np.int64(0)
    for index in range(num_donors):
        claims += claims_R[index]
    unused = np.zeros(num_ranks // 64 + 1, dtype=np.uint64)  # takers that have no copy yet, a bit for each
    for word in range(num_takers >> 6):
        unused[word] = ~np.uint64(0)
    unused[num_takers >> 6] |= (np.uint64(1) << np.uint64(num_takers & 63)) - np.uint64(1)

    waiting = np.empty(num_ranks, dtype=np.int64)  # donors below their level, first in, first out
    first = last = 0
    due = np.int64(0)
    if num_donors > max(num_takers, 1) and link >= least:  # a ring: what the last donor gets here travels around it
        position, most = heaviest(donors[0], left_RN)
        give(
            link, least, donors[0], donors[num_donors - 1], position, most, own_RN, held_RE, quota_RE, count_R,
            left_RN, tokens_R,
        )  # fmt: skip
    for index in range(num_donors):
        donor = donors[index]
        tokens, variance, level = tokens_R[donor], variance_R[donor], level_R[donor]
        is_root = index == num_donors - 1
        spread = np.sqrt(variance)
        deepest = max(link, min(np.int64(depth * level + deeper * spread), level))
        goal = level - (0 if is_root else min(deepest, max(link, np.int64(link_spreads * spread))))
        floor = level - deepest
        due += num_donors * claims_R[index]
        position, most = heaviest(donor, left_RN)
        while first < last and tokens > goal and (due >= claims or is_root):
            taker = waiting[first]
            missing = level_R[taker] - tokens_R[taker]
            if not is_root and (missing > most or tokens - missing < floor):
                break
            first += 1
            due -= claims
            if min(missing, most) >= least:
                tokens -= give(
                    missing, least, donor, taker, position, most, own_RN, held_RE, quota_RE, count_R, left_RN, tokens_R
                )
                position, most = heaviest(donor, left_RN)
                variance += variance_R[taker]
                spread = np.sqrt(variance)
                deepest = max(link, min(np.int64(depth * level + deeper * spread), level))
                goal = level - (0 if is_root else min(deepest, max(link, np.int64(link_spreads * spread))))
                floor = level - deepest
        while tokens > goal:
            limit = min(most, tokens - floor)
            fits, step = np.int64(0), 32  # the first gap that is not too large
            while gaps[fits + 63] > limit:
                fits += 64
            while step > 0:
                fits += step if gaps[fits + step - 1] > limit else 0
                step >>= 1
            choice = find_bit(unused, fits)
            if choice >= num_takers or gaps[choice] < least:
                break
            near = find_common_bit(unused, seen.near[node_R[donor]], choice, NEAR)
            if near >= 0 and 8 * gaps[near] >= 7 * gaps[choice]:
                choice = near
            unused[choice >> 6] &= ~(np.uint64(1) << np.uint64(choice & 63))
            taker = seen.takers[choice]
            tokens -= give(
                gaps[choice], least, donor, taker, position, most, own_RN, held_RE, quota_RE, count_R, left_RN, tokens_R
            )
            position, most = heaviest(donor, left_RN)
            variance += variance_R[taker]
        while first < last and tokens > (goal if is_one else level):
            taker = waiting[first]
            missing = level_R[taker] - tokens_R[taker]
            if tokens <= level and tokens - missing < floor:
                break
            first += 1
            if min(missing, most) >= least:
                tokens -= give(
                    missing, least, donor, taker, position, most, own_RN, held_RE, quota_RE, count_R, left_RN, tokens_R
                )
                position, most = heaviest(donor, left_RN)
        if tokens < level:
            waiting[last] = donor
            last += 1
        variance_R[donor] = variance

    # What the tree left: the fullest rank to the emptiest with a free slot, as long as there is one.
    free, num_free = waiting, 0
    for rank in range(num_ranks):
        free[num_free] = rank
        num_free += count_R[rank] < num_slots
    for index in range(num_donors - 1, -1, -1):
        donor = donors[index]
        while num_free > 0 and tokens_R[donor] - level_R[donor] >= least:
            taker = np.int64(-1)
            most = least - 1
            for rank in free[:num_free]:
                missing = level_R[rank] - tokens_R[rank]
                if missing > most and count_R[rank] < num_slots and rank != donor:
                    taker, most = rank, missing
            if taker < 0:
                break
            amount = min(most, tokens_R[donor] - level_R[donor])
            position, most = heaviest(donor, left_RN)
            given = give(
                amount, least, donor, taker, position, most, own_RN, held_RE, quota_RE, count_R, left_RN, tokens_R
            )
            if given < least:
                break


@compiled
def hedge(load_L, spread_L, seen, own_RN, least, held_RE):
    """Have each slot that is still free hold the expert with most tokens a copy among those of the next few donors."""
    num_ranks, num_slots = held_RE.shape
    least = max(least, np.int64(1))
    count_R, free = np.empty(num_ranks, dtype=np.int64), np.empty(num_ranks, dtype=np.int64)
    num_free = 0
    for rank in range(num_ranks):
        count_R[rank] = 0
        for slot in range(num_slots):
            count_R[rank] += held_RE[rank, slot] >= 0
        free[num_free] = rank
        num_free += count_R[rank] < num_slots
    if num_free == 0:
        return
    copies_L = np.ones(load_L.size, dtype=np.int64)
    for rank in range(num_ranks):
        for slot in range(count_R[rank]):
            copies_L[held_RE[rank, slot]] += 1
    turn = seen.num_donors - 1
    for slot in range(num_slots):
        for rank in free[:num_free]:
            if count_R[rank] > slot:
                continue
            best = np.int64(-1)
            most = least - 1
            for _ in range(min(8, seen.num_donors)):
                donor = seen.donors[turn]
                turn = turn - 1 if turn > 0 else seen.num_donors - 1
                for expert in own_RN[donor]:
                    if load_L[expert] >= (most + 1) * (copies_L[expert] + 1) and donor != rank and spread_L[expert] > 0:
                        is_there = False
                        for other in range(count_R[rank]):
                            is_there |= held_RE[rank, other] == expert
                        if not is_there:
                            best, most = expert, load_L[expert] // (copies_L[expert] + 1)
            if best >= 0:
                held_RE[rank, count_R[rank]] = best
                count_R[rank] += 1
                copies_L[best] += 1
