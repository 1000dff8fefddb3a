"""Who serves how many: the tokens of an expert, divided among its copies.

Shape suffixes: ``L`` logical experts, ``P`` physical experts (slots), ``R`` ranks.
"""

import numpy as np

from lightning_eplb.compiled import compiled

SLOW = 1.0 / 16
"""A sweep that lowers the fullest rank by so little of what is missing is the last one."""


def split_evenly(
    counts_RL: np.ndarray,
    physical_to_logical_P: np.ndarray,
    copy_of_slot_P: np.ndarray,
    replica_count_L: np.ndarray,
) -> np.ndarray:
    """Divide what each rank sends to each expert evenly among the expert's copies.

    What does not divide goes to one copy more each, and source rank ``r`` starts with copy ``r`` (modulo the
    copies), so that the remainders of many ranks do not all meet at the primary. Whole numbers only: every rank that
    is given the same counts finds the same split.

    Args:
        counts_RL: Tokens that source rank ``r`` routes to logical expert ``l``, int64 ``[R, L]``.
        physical_to_logical_P: The logical expert of each slot, ``-1`` where it is empty, int64 ``[P]``.
        copy_of_slot_P: Which copy of its expert a slot is: 0 the primary, then ``1`` to ``replica_count - 1``, int64
            ``[P]``; anything for an empty slot.
        replica_count_L: Copies of each expert, the primary included, int64 ``[L]``; never below 1.

    Returns:
        Tokens that source rank ``r`` sends to slot ``p``, int64 ``[R, P]``: 0 for an empty slot. In each row, the
        slots of an expert sum to that row's count of the expert.
    """
    copies_P = replica_count_L[physical_to_logical_P]  # an empty slot reads the last expert; it is cleared below
    each_RP, over_RP = np.divmod(counts_RL[:, physical_to_logical_P], copies_P)
    turn_RP = (copy_of_slot_P - np.arange(counts_RL.shape[0])[:, None]) % copies_P
    each_RP += turn_RP < over_RP
    each_RP *= physical_to_logical_P >= 0
    return each_RP


@compiled
def even_quotas(load_L, slots_RS, quota_RS, tokens_R):
    """Divide each expert's tokens evenly among its copies.

    Args:
        load_L: Tokens of each expert, int64.
        slots_RS: The expert of each slot, -1 where it is empty, int64.
        quota_RS: Filled with the tokens of each slot, int64. What does not divide goes to the first slots.
        tokens_R: Filled with the tokens of each rank, int64.
    """
    num_ranks, num_slots = slots_RS.shape
    copies_L = np.zeros(load_L.size, dtype=np.int64)
    for rank in range(num_ranks):
        for slot in range(num_slots):
            if slots_RS[rank, slot] >= 0:
                copies_L[slots_RS[rank, slot]] += 1
    each_L = np.empty(load_L.size, dtype=np.int64)
    over_L = np.empty(load_L.size, dtype=np.int64)
    for expert in range(load_L.size):
        each_L[expert] = load_L[expert] // max(copies_L[expert], 1)
        over_L[expert] = load_L[expert] - each_L[expert] * copies_L[expert]
    for rank in range(num_ranks):
        tokens_R[rank] = 0
        for slot in range(num_slots):
            expert = slots_RS[rank, slot]
            quota_RS[rank, slot] = 0
            if expert >= 0:
                quota_RS[rank, slot] = each_L[expert] + (over_L[expert] > 0)
                over_L[expert] -= 1
                tokens_R[rank] += quota_RS[rank, slot]


@compiled
def level_quotas(load_L, slots_RS, weight_R, sweeps, enough, quota_RS, tokens_R):
    """Divide each expert's tokens among its copies so that the ranks are as level as the copies allow.

    One expert after the other fills its ranks up to a common water line, given what the others leave there; that is
    repeated until nothing moves, no rank is above ``enough``, or ``sweeps`` times. It is block coordinate descent on
    the sum of ``tokens**2 * weight`` over the ranks, whose minimum also has the lowest possible fullest rank.

    Args:
        load_L: Tokens of each expert, int64, their sum below ``2**53``.
        slots_RS: The expert of each slot, -1 where it is empty; a rank holds an expert once. int64.
        weight_R: What a token costs on each rank, float64 above 0: 1 on all of them, more on slow ones.
        sweeps: How often at most every expert is divided anew.
        enough: A weighted rank's tokens that need not be lowered further; 0 to go on.
        quota_RS: The tokens of each slot, int64; those of an expert sum to its load. Changed in place.
        tokens_R: The tokens of each rank, their sum, int64. Changed in place.

    Returns:
        The weighted tokens of the fullest rank.
    """
    peak = fullest(tokens_R, weight_R)
    if peak <= enough:
        return peak
    num_ranks, num_slots = slots_RS.shape
    first_L = np.zeros(load_L.size + 1, dtype=np.int64)
    for rank in range(num_ranks):
        for slot in range(num_slots):
            if slots_RS[rank, slot] >= 0:
                first_L[slots_RS[rank, slot] + 1] += 1
    for expert in range(load_L.size):
        first_L[expert + 1] += first_L[expert]
    next_L = first_L[:-1].copy()
    rank_of = np.empty(first_L[-1], dtype=np.int64)  # the copies of each expert, lowest water line first
    slot_of = np.empty(first_L[-1], dtype=np.int64)
    for rank in range(num_ranks):
        for slot in range(num_slots):
            expert = slots_RS[rank, slot]
            if expert >= 0:
                rank_of[next_L[expert]], slot_of[next_L[expert]] = rank, slot
                next_L[expert] += 1
    for _ in range(sweeps):
        moved = np.int64(0)
        for expert in range(load_L.size):
            start, end = first_L[expert], first_L[expert + 1]
            if end - start < 2 or load_L[expert] == 0:
                continue
            for place in range(start, end):
                tokens_R[rank_of[place]] -= quota_RS[rank_of[place], slot_of[place]]
            for place in range(start + 1, end):  # insertion sort: the order hardly changes from sweep to sweep
                rank, slot = rank_of[place], slot_of[place]
                line = tokens_R[rank] * weight_R[rank]
                other = place - 1
                while other >= start and tokens_R[rank_of[other]] * weight_R[rank_of[other]] > line:
                    rank_of[other + 1], slot_of[other + 1] = rank_of[other], slot_of[other]
                    other -= 1
                rank_of[other + 1], slot_of[other + 1] = rank, slot
            held, room = float(load_L[expert]), 0.0
            line = 0.0
            used = start
            while used < end:
                rank = rank_of[used]
                if used > start and line <= tokens_R[rank] * weight_R[rank]:
                    break
                held += tokens_R[rank]
                room += 1.0 / weight_R[rank]
                line = held / room
                used += 1
            rest = load_L[expert]
            for place in range(start, end):
                rank, slot = rank_of[place], slot_of[place]
                quota = np.int64(0)
                if place < used:
                    quota = max(np.int64(line / weight_R[rank]) - tokens_R[rank], 0)
                    quota = min(quota, rest)
                    rest -= quota
                moved = max(moved, abs(quota - quota_RS[rank, slot]))
                quota_RS[rank, slot] = quota
            place = start
            while rest > 0:  # what rounding left, one token each
                quota_RS[rank_of[place], slot_of[place]] += 1
                rest -= 1
                place = place + 1 if place + 1 < used else start
            for place in range(start, end):
                tokens_R[rank_of[place]] += quota_RS[rank_of[place], slot_of[place]]
        before, peak = peak, fullest(tokens_R, weight_R)
        if moved <= 1 or peak <= enough or (enough > 0.0 and before - peak < SLOW * (peak - enough)):
            break
    return peak


@compiled
def fullest(tokens_R, weight_R):
    """The weighted tokens of the fullest rank."""
    peak = 0.0
    for rank in range(tokens_R.size):
        peak = max(peak, tokens_R[rank] * weight_R[rank])
    return peak


@compiled
def fullest_rank(tokens_R, weight_R):
    """The rank with most weighted tokens; the lowest index where several have as many."""
    found = np.int64(0)
    for rank in range(tokens_R.size):
        if tokens_R[rank] * weight_R[rank] > tokens_R[found] * weight_R[found]:
            found = np.int64(rank)
    return found


def level_tokens(
    load_YL: np.ndarray, slots_YRS: np.ndarray, capacity_R: np.ndarray | None = None, sweeps: int = 200
) -> np.ndarray:
    """What each rank serves when quotas level the ranks as far as the copies allow.

    Args:
        load_YL: Tokens of each logical expert, int64 ``[Y, L]``; a layer's sum below ``2**53``.
        slots_YRS: The expert of each slot, -1 where it is empty, int64 ``[Y, R, S]``; no rank holds an expert twice.
        capacity_R: How much work each rank should get; ``None`` for all the same.
        sweeps: How often at most every expert is divided anew; the ranks are level long before, or cannot be.

    Returns:
        Tokens of each rank, int64 ``[Y, R]``.

    Raises:
        ValueError: Load, slots and capacities do not fit each other.
    """
    layers, num_ranks, _ = slots_YRS.shape
    if len(load_YL) != layers or slots_YRS.max(initial=0) >= load_YL.shape[1] or slots_YRS.min(initial=0) < -1:
        raise ValueError(
            f"load_YL has shape {list(load_YL.shape)}; slots_YRS holds {layers} layers of experts from"
            f" {slots_YRS.min(initial=0)} to {slots_YRS.max(initial=0)}"
        )
    capacity_R = np.ones(num_ranks) if capacity_R is None else np.asarray(capacity_R, dtype=np.float64)
    if capacity_R.shape != (num_ranks,) or not (capacity_R >= 0).all() or not capacity_R.any():
        raise ValueError(f"capacity_R={capacity_R} must have {num_ranks} numbers from zero up, one of them above")
    weight_R = capacity_R.mean() / np.maximum(capacity_R, 1e-6 * capacity_R.mean())
    tokens_YR = np.empty((layers, num_ranks), dtype=np.int64)
    _level_layers(np.ascontiguousarray(load_YL, dtype=np.int64), slots_YRS, weight_R, sweeps, tokens_YR)
    return tokens_YR


@compiled
def _level_layers(load_YL, slots_YRS, weight_R, sweeps, tokens_YR):
    quota_RS = np.empty(slots_YRS.shape[1:], dtype=np.int64)
    for layer in range(load_YL.shape[0]):
        even_quotas(load_YL[layer], slots_YRS[layer], quota_RS, tokens_YR[layer])
        level_quotas(load_YL[layer], slots_YRS[layer], weight_R, sweeps, 0.0, quota_RS, tokens_YR[layer])
