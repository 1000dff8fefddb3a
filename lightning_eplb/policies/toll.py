"""What redundant copies cost a layer, and which of them are worth it: compiled.

Copies cost the time that weights and gradients travel; they save time where the fullest rank would have more to do
without them, now or when the load changes. Both are counted in weighted parts here, as the fullest rank's tokens are.

Shape suffixes: ``L`` logical experts, ``R`` ranks, ``S`` slots on a rank.
"""

import numpy as np

from lightning_eplb.compiled import compiled, inlined
from lightning_eplb.policies.split import even_quotas, fullest, level_quotas

CHANGE = 1.0 / 8
"""A plan that is to pay for more copies or fewer than are paid for now must be better by so much of a copy, or layers
would gain and lose copies in turn where both are as good."""
DROP_SWEEPS = np.int64(12)
"""Of the quotas, to judge what remains when copies are dropped."""
SLOW_DROP = 1.0 / 8
"""A sweep that lowers the fullest rank by so little of what is missing is the last one."""
LEVEL, EVEN = np.bool_(False), np.bool_(True)
"""How tokens are divided among copies. Variables of numpy's: for literals, all loops would be compiled twice."""


@compiled
def find_owners(slots_RS, num_primaries, owner_L):
    """Fill in the place of each primary, ``rank * S + slot``."""
    num_ranks, num_slots = slots_RS.shape
    for rank in range(num_ranks):
        for slot in range(num_primaries):
            owner_L[slots_RS[rank, slot]] = rank * num_slots + slot


@compiled
def count_copies(slots_RS, num_primaries, owner_L, sent_R, received_R):
    """Fill in the copies that each rank sends and receives. Returns the most of either: the ranks wait for those."""
    num_ranks, num_slots = slots_RS.shape
    sent_R[:] = 0
    received_R[:] = 0
    for rank in range(num_ranks):
        for slot in range(num_primaries, num_slots):
            if slots_RS[rank, slot] >= 0:
                received_R[rank] += 1
                sent_R[owner_L[slots_RS[rank, slot]] // num_slots] += 1
    return max(sent_R.max(), received_R.max())


@compiled
def busiest(slots_RS, num_primaries):
    """The copies that the busiest rank sends, or receives."""
    owner_L = np.empty(slots_RS.shape[0] * num_primaries, dtype=np.int64)
    find_owners(slots_RS, num_primaries, owner_L)
    sent_R, received_R = np.empty(slots_RS.shape[0], dtype=np.int64), np.empty(slots_RS.shape[0], dtype=np.int64)
    return count_copies(slots_RS, num_primaries, owner_L, sent_R, received_R)


@compiled
def likely_peak(load_L, likely_L, slots_RS, weight_R, is_even, quota_RS, tokens_R):
    """The fullest rank when loads change as is likely, in weighted parts.

    The largest of ``R`` draws lies about ``sqrt(log2(R))`` standard deviations out. So much may come to a rank in
    addition; what quotas can leave to other copies of its experts does not count, as far as that goes.
    """
    num_ranks, num_slots = slots_RS.shape
    doublings = 0
    while 1 << doublings < num_ranks:
        doublings += 1
    reach = np.sqrt(float(doublings))
    copies_L = np.zeros(load_L.size, dtype=np.int64)
    for rank in range(num_ranks):
        for expert in slots_RS[rank]:
            if expert >= 0:
                copies_L[expert] += 1
    spread_L = np.empty(load_L.size)  # in parts of the load
    for expert in range(load_L.size):
        spread_L[expert] = likely_L[expert] / max(load_L[expert], 1)
    peak = 0.0
    for rank in range(num_ranks):
        variance, loose = 0.0, np.int64(0)
        for slot in range(num_slots):
            expert = slots_RS[rank, slot]
            if expert >= 0 and quota_RS[rank, slot] > 0:
                spread = spread_L[expert] * quota_RS[rank, slot]
                variance += spread * spread
                if copies_L[expert] > 1 and not is_even:
                    loose += quota_RS[rank, slot]
        peak = max(peak, tokens_R[rank] * weight_R[rank])
        growth = peak / weight_R[rank] - tokens_R[rank] + loose  # as much would make it the fullest
        if reach * reach * variance > growth * growth:
            growth = reach * np.sqrt(variance) - loose
            peak = max(peak, (tokens_R[rank] + growth) * weight_R[rank])
    return peak


@compiled
def weigh_copies(load_L, likely_L, slots_RS, num_primaries, weight_R, copy, present, is_even, quota_RS, tokens_R):
    """What a step takes: the fullest rank when loads change as is likely, and the copies that it waits for.

    The ranks send and receive at once, so a step waits for the rank that sends or receives most copies.

    Args:
        load_L: Expected parts of each expert.
        likely_L: Standard deviation of each, as it was forecast.
        slots_RS: What the slots hold.
        num_primaries: The first slots of each rank.
        weight_R: What a part costs on each rank.
        copy: Weighted parts that take as long as a copy's travel.
        present: Copies that the busiest rank sends or receives as the placement is.
        is_even: Whether tokens are divided evenly among copies, so that none can be left to others.
        quota_RS: Parts of each slot.
        tokens_R: Their sum.

    Returns:
        Weighted parts.
    """
    most = busiest(slots_RS, num_primaries)
    travel = copy * (most + (CHANGE if most != present else 0.0))
    return travel + likely_peak(load_L, likely_L, slots_RS, weight_R, is_even, quota_RS, tokens_R)


@compiled
def drop_copies(
    load_L, likely_L, slots_RS, num_primaries, weight_R, copy, present, is_even, limit, enough, quota_RS, tokens_R
):
    """Drop the copies without which a step takes less time, in place.

    The busiest ranks go without the copies that serve least, until they send and receive one copy less, and so on
    as long as that takes less time; with quotas, none at all are the last to be tried. What takes least time is kept.
    Copies that nobody waits for stay: they cost nothing.

    Args: as for :func:`weigh_copies`, and
        limit: What takes as long is of no use: so many copies that their travel alone takes too long are not tried.
        enough: A fullest rank that need not be lowered further.
        quota_RS: Parts of each slot; those of an expert sum to its load. Changed in place.
        tokens_R: Their sum. Changed in place.

    Returns:
        As :func:`weigh_copies`, of what is left.
    """
    owner_L = np.empty_like(load_L)
    find_owners(slots_RS, num_primaries, owner_L)
    sent_R, received_R = np.empty_like(tokens_R), np.empty_like(tokens_R)
    trial_RS, trial_quota_RS, trial_tokens_R = slots_RS.copy(), quota_RS.copy(), tokens_R.copy()
    lowest = weigh_copies(
        load_L, likely_L, slots_RS, num_primaries, weight_R, copy, present, is_even, quota_RS, tokens_R
    )  # fmt: skip
    most = count_copies(slots_RS, num_primaries, owner_L, sent_R, received_R)
    while most > 0:
        most -= max(most // 5, 1)  # by so much at once, or a thousand copies would have to be judged one by one
        affordable = max(min(limit, lowest) - enough, 0.0) / copy  # may be more than int64 holds
        most = np.int64(min(np.float64(most), affordable))
        if most == 0 and fullest_alone(load_L, slots_RS, num_primaries, weight_R) >= lowest:
            break
        thin_out(trial_RS, num_primaries, owner_L, most, sent_R, received_R, trial_quota_RS, trial_tokens_R)
        if is_even:
            even_quotas(load_L, trial_RS, trial_quota_RS, trial_tokens_R)
            peak = fullest(trial_tokens_R, weight_R)
        elif most == 0:
            peak = fullest(trial_tokens_R, weight_R)
        else:
            peak = level_quotas(
                load_L, trial_RS, weight_R, DROP_SWEEPS, enough, SLOW_DROP, trial_quota_RS, trial_tokens_R
            )
        if peak >= lowest and not is_even:  # as it is with fewer still
            break
        busy = max(sent_R.max(), received_R.max())
        time = copy * (busy + (CHANGE if busy != present else 0.0))
        if time + peak < lowest:
            time += likely_peak(load_L, likely_L, trial_RS, weight_R, is_even, trial_quota_RS, trial_tokens_R)
        else:
            time = lowest
        if time < lowest:
            lowest = time
            slots_RS[:] = trial_RS
            quota_RS[:] = trial_quota_RS
            tokens_R[:] = trial_tokens_R
        elif not is_even:
            most = min(most, np.int64(1))  # fewer still would take longer, but for none at all
    return lowest


@compiled
def fullest_alone(load_L, slots_RS, num_primaries, weight_R):
    """The weighted parts of the fullest rank without any copies."""
    peak = 0.0
    for rank in range(slots_RS.shape[0]):
        tokens = np.int64(0)
        for slot in range(num_primaries):
            tokens += load_L[slots_RS[rank, slot]]
        peak = max(peak, tokens * weight_R[rank])
    return peak


@compiled
def thin_out(slots_RS, num_primaries, owner_L, most, sent_R, received_R, quota_RS, tokens_R):
    """Drop copies, those that serve least first, until no rank sends or receives more than ``most``. In place.

    Their tokens go back to the primary.

    Args:
        sent_R, received_R: Copies that each rank sends and receives; kept up to date.
    """
    num_ranks, num_slots = slots_RS.shape
    busy_L = np.full(owner_L.size, -1)  # of the experts of ranks that send too many, the rank
    for rank in range(num_ranks):
        if sent_R[rank] > most:
            for expert in slots_RS[rank, :num_primaries]:
                busy_L[expert] = rank
    head_R, next_P = np.full(num_ranks, -1), np.empty(num_ranks * num_slots, dtype=np.int64)  # lists of what they send
    for target in range(num_ranks - 1, -1, -1):
        for slot in range(num_slots - 1, num_primaries - 1, -1):
            expert = slots_RS[target, slot]
            if expert >= 0 and busy_L[expert] >= 0:
                place = target * num_slots + slot
                next_P[place], head_R[busy_L[expert]] = head_R[busy_L[expert]], place
    for rank in range(num_ranks):
        while received_R[rank] > most:
            least_slot = np.int64(-1)
            for slot in range(num_primaries, num_slots):
                if slots_RS[rank, slot] >= 0 and (least_slot < 0 or quota_RS[rank, slot] < quota_RS[rank, least_slot]):
                    least_slot = np.int64(slot)
            drop_copy(slots_RS, owner_L, sent_R, received_R, quota_RS, tokens_R, rank, least_slot)
        while sent_R[rank] > most:
            least_place = np.int64(-1)
            place = head_R[rank]
            while place >= 0:
                target, slot = place // num_slots, place % num_slots
                if slots_RS[target, slot] >= 0 and (
                    least_place < 0
                    or quota_RS[target, slot] < quota_RS[least_place // num_slots, least_place % num_slots]
                ):
                    least_place = place
                place = next_P[place]
            target, slot = least_place // num_slots, least_place % num_slots
            drop_copy(slots_RS, owner_L, sent_R, received_R, quota_RS, tokens_R, target, slot)


@inlined
def drop_copy(slots_RS, owner_L, sent_R, received_R, quota_RS, tokens_R, target, slot):
    """Empty a redundant slot. Its tokens go back to the primary."""
    num_slots = slots_RS.shape[1]
    place = owner_L[slots_RS[target, slot]]
    owner, own_slot = place // num_slots, place % num_slots
    slots_RS[target, slot] = -1
    received_R[target] -= 1
    sent_R[owner] -= 1
    quota_RS[owner, own_slot] += quota_RS[target, slot]
    tokens_R[owner] += quota_RS[target, slot]
    tokens_R[target] -= quota_RS[target, slot]
    quota_RS[target, slot] = 0
