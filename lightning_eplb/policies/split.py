"""Who serves how many: the tokens of an expert, divided among its copies.

Shape suffixes: ``L`` logical experts, ``P`` physical experts (slots), ``R`` ranks.
"""

import numpy as np

from lightning_eplb._compiled import compiled, inlined

SPLIT_SWEEPS = np.int64(24)  # as int64, or loops are compiled for each such number
"""Of the quotas, to divide a batch."""
LEVEL_ENOUGH = 1.0 + 1.0 / 1024
"""A batch is divided well enough if its fullest rank is so many times the mean."""


def split_tokens(
    counts_RL: np.ndarray, slots_RS: np.ndarray, node_R: np.ndarray, weight_R: np.ndarray, rank: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Divide what the ranks send to each expert among its copies so that the ranks get equal work.

    Each copy gets a quota first (:func:`level_quotas`). Then the tokens of the source ranks are laid to the quotas: to
    the copy on the rank itself as far as its quota goes, then to copies on its node, then to the others; lower ranks
    first. Whole numbers and single IEEE operations only: every rank that is given the same counts finds the same split.

    Args:
        counts_RL: Tokens that source rank ``r`` routes to logical expert ``l``, int64 ``[R, L]``.
        slots_RS: The expert of each slot, -1 where it is empty, int64 ``[R, S]``; no rank holds an expert twice.
        node_R: The node of each rank, int64 ``[R]``.
        weight_R: What a token costs on each rank, float64 ``[R]`` above 0: 1 on all of them, more on slow ones.
        rank: The rank that is to send and to receive.

    Returns:
        The tokens that ``rank`` sends to each slot, int64 ``[R, S]``; those that its own slots receive from each rank,
        int64 ``[R, S]``; and the tokens that each rank serves in all, int64 ``[R]``.
    """
    sent_RS, received_RS = np.zeros_like(slots_RS), np.zeros_like(slots_RS)
    tokens_R = np.empty(len(slots_RS), dtype=np.int64)
    _split_tokens(counts_RL, slots_RS, node_R, weight_R, rank, sent_RS, received_RS, tokens_R)
    return sent_RS, received_RS, tokens_R


@compiled
def _split_tokens(
    counts_RL: np.ndarray,
    slots_RS: np.ndarray,
    node_R: np.ndarray,
    weight_R: np.ndarray,
    rank: int,
    sent_RS: np.ndarray,
    received_RS: np.ndarray,
    tokens_R: np.ndarray,
) -> None:
    load_L = np.zeros(counts_RL.shape[1], dtype=np.int64)
    for source in range(counts_RL.shape[0]):
        for expert in range(load_L.size):
            load_L[expert] += counts_RL[source, expert]
    quota_RS = np.empty_like(slots_RS)
    even_quotas(load_L, slots_RS, quota_RS, tokens_R)
    speed = 0.0
    for weight in weight_R:
        speed += 1.0 / weight
    enough = LEVEL_ENOUGH * load_L.sum() / speed
    level_quotas(load_L, slots_RS, weight_R, SPLIT_SWEEPS, enough, 0.0, quota_RS, tokens_R)
    lay_to_quotas(counts_RL, slots_RS, node_R, quota_RS, rank, sent_RS, received_RS)


@compiled
def lay_to_quotas(
    counts_RL: np.ndarray,
    slots_RS: np.ndarray,
    node_R: np.ndarray,
    quota_RS: np.ndarray,
    rank: int,
    sent_RS: np.ndarray,
    received_RS: np.ndarray,
) -> None:
    """Fill in what ``rank`` sends and receives, near copies first. ``quota_RS`` is used up."""
    num_ranks, num_slots = slots_RS.shape
    experts = counts_RL.shape[1]
    first_L = np.zeros(experts + 1, dtype=np.int64)
    for place in range(num_ranks * num_slots):
        expert = slots_RS[place // num_slots, place % num_slots]
        if expert >= 0:
            first_L[expert + 1] += 1
    for expert in range(experts):
        first_L[expert + 1] += first_L[expert]
    next_L = first_L[:-1].copy()
    place_of = np.empty(first_L[-1], dtype=np.int64)  # the slots of each expert, lowest first
    for place in range(num_ranks * num_slots):
        expert = slots_RS[place // num_slots, place % num_slots]
        if expert >= 0:
            place_of[next_L[expert]] = place
            next_L[expert] += 1
    left_R = np.empty(num_ranks, dtype=np.int64)
    for expert in range(experts):
        if first_L[expert + 1] - first_L[expert] == 1:
            target, slot = place_of[first_L[expert]] // num_slots, place_of[first_L[expert]] % num_slots
            sent_RS[target, slot] = counts_RL[rank, expert]
            if target == rank:
                received_RS[:, slot] = counts_RL[:, expert]
            continue
        for source in range(num_ranks):
            left_R[source] = counts_RL[source, expert]
        for distance in range(3):  # on the rank itself, on its node, anywhere
            for index in range(first_L[expert], first_L[expert + 1]):
                target, slot = place_of[index] // num_slots, place_of[index] % num_slots
                start, end = (target, target + 1) if distance == 0 else (0, num_ranks)
                for source in range(start, end):
                    given = min(left_R[source], quota_RS[target, slot])
                    if given == 0 or (distance == 1 and node_R[source] != node_R[target]):
                        continue
                    left_R[source] -= given
                    quota_RS[target, slot] -= given
                    if source == rank:
                        sent_RS[target, slot] += given
                    if target == rank:
                        received_RS[source, slot] += given


def rank_weights(capacity_R: np.ndarray) -> np.ndarray:
    """What a token costs on ranks of these capacities, 1 on the mean; a million times as much where it is 0.

    Raises:
        ValueError: A capacity is negative, or all are 0.
    """
    capacity_R = np.asarray(capacity_R, dtype=np.float64)
    if not (capacity_R >= 0).all() or not capacity_R.any():
        raise ValueError(f"capacity_R={capacity_R} must hold numbers from zero up, one of them above")
    capacity_R = capacity_R / capacity_R.max()
    return capacity_R.mean() / np.maximum(capacity_R, 1e-6 * capacity_R.mean())


@compiled
def even_quotas(load_L: np.ndarray, slots_RS: np.ndarray, quota_RS: np.ndarray, tokens_R: np.ndarray) -> None:
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
        each_L[expert], over_L[expert] = load_L[expert], 0
        if copies_L[expert] > 1:
            each_L[expert] = load_L[expert] // copies_L[expert]
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
def level_quotas(
    load_L: np.ndarray,
    slots_RS: np.ndarray,
    weight_R: np.ndarray,
    sweeps: int,
    enough: float,
    slow: float,
    quota_RS: np.ndarray,
    tokens_R: np.ndarray,
) -> float:
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
        slow: A sweep that lowers the fullest rank by less than so much of what is missing to ``enough`` is the last;
            0 to go on.
        quota_RS: The tokens of each slot, int64; those of an expert sum to its load. Changed in place.
        tokens_R: The tokens of each rank, their sum, int64. Changed in place.

    Returns:
        The weighted tokens of the fullest rank.
    """
    peak = fullest(tokens_R, weight_R)
    if peak <= enough:
        return peak
    num_ranks, num_slots = slots_RS.shape
    next_L = np.zeros(load_L.size, dtype=np.int64)
    for rank in range(num_ranks):
        for slot in range(num_slots):
            if slots_RS[rank, slot] >= 0:
                next_L[slots_RS[rank, slot]] += 1
    divided = np.empty(load_L.size + 1, dtype=np.int64)  # the experts that have tokens and several copies
    end_of = np.empty(load_L.size + 1, dtype=np.int64)
    num_divided = num_places = np.int64(0)
    for expert in range(load_L.size):  # here and below what is not wanted is written, too, and then overwritten
        copies = next_L[expert]
        is_divided = (copies > 1) & (load_L[expert] > 0)
        next_L[expert] = num_places if is_divided else -1
        num_places += copies if is_divided else 0
        divided[num_divided], end_of[num_divided] = expert, num_places
        num_divided += is_divided
    rank_of = np.empty(num_places + 1, dtype=np.int64)  # the copies of each of these
    slot_of, quota_of = np.empty_like(rank_of), np.empty_like(rank_of)
    for rank in range(num_ranks):
        for slot in range(num_slots):
            expert = max(slots_RS[rank, slot], 0)
            place = next_L[expert]
            is_divided = (slots_RS[rank, slot] >= 0) & (place >= 0)
            next_L[expert] = place + is_divided
            place = place if is_divided else num_places
            rank_of[place], slot_of[place], quota_of[place] = rank, slot, quota_RS[rank, slot]
    speed_R = np.empty(num_ranks)
    for rank in range(num_ranks):
        speed_R[rank] = 1.0 / weight_R[rank]
    for _ in range(sweeps):
        moved = np.int64(0)
        end = np.int64(0)
        for index in range(num_divided):
            start, end = end, end_of[index]
            load = load_L[divided[index]]
            if end - start == 2:  # most have two copies
                one, two = start, start + 1
                if speed_R[rank_of[one]] < speed_R[rank_of[two]]:
                    one, two = two, one
                rank, other = rank_of[one], rank_of[two]
                here, there = tokens_R[rank] - quota_of[one], tokens_R[other] - quota_of[two]
                line = (load + here + there) / (speed_R[rank] + speed_R[other])
                quota = min(max(np.int64(line * speed_R[other]) - there, 0), load)
                moved = max(moved, abs(quota - quota_of[two]))
                quota_of[one], quota_of[two] = load - quota, quota  # what rounding leaves, to the faster rank
                tokens_R[rank], tokens_R[other] = here + load - quota, there + quota
                continue
            fastest = start
            for place in range(start, end):
                tokens_R[rank_of[place]] -= quota_of[place]
                if speed_R[rank_of[place]] > speed_R[rank_of[fastest]]:
                    fastest = place
            line, room, used = np.inf, 0.0, np.int64(0)
            while True:  # the line that those below it can be filled up to: lower, once others are left out
                held, speed, below, highest = load, 0.0, np.int64(0), 0.0
                for place in range(start, end):
                    rank = rank_of[place]
                    filled = tokens_R[rank] * weight_R[rank]
                    if filled < line:
                        held += tokens_R[rank]
                        speed += speed_R[rank]
                        below += 1
                        highest = max(highest, filled)
                if below == used or below == 0:
                    break
                line, room, used = held / speed, speed, below
                if highest < line:
                    break
            rest = load
            for place in range(start, end):
                rank = rank_of[place]
                quota = min(max(np.int64(line * speed_R[rank]) - tokens_R[rank], 0), rest)
                rest -= quota
                moved = max(moved, abs(quota - quota_of[place]))
                quota_of[place] = quota
            for place in range(start, end):  # what rounding leaves: one token each, but to slow ranks
                rank = rank_of[place]
                if rest > 0 and tokens_R[rank] * weight_R[rank] < line and 2 * used * speed_R[rank] >= room:
                    quota_of[place] += 1
                    rest -= 1
            quota_of[fastest] += rest
            for place in range(start, end):
                tokens_R[rank_of[place]] += quota_of[place]
        before, peak = peak, fullest(tokens_R, weight_R)
        if moved <= 1 or peak <= enough or before - peak < slow * (peak - enough):
            break
    for place in range(num_places):
        quota_RS[rank_of[place], slot_of[place]] = quota_of[place]
    return peak


@inlined
def fullest(tokens_R: np.ndarray, weight_R: np.ndarray) -> float:
    """The weighted tokens of the fullest rank."""
    peak = 0.0
    for rank in range(tokens_R.size):
        peak = max(peak, tokens_R[rank] * weight_R[rank])
    return peak


@inlined
def fullest_rank(tokens_R: np.ndarray, weight_R: np.ndarray) -> np.int64:
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
    weight_R = rank_weights(np.ones(num_ranks) if capacity_R is None else capacity_R)
    if len(weight_R) != num_ranks:
        raise ValueError(f"capacity_R={capacity_R} must hold {num_ranks} numbers, one for each rank")
    tokens_YR = np.empty((layers, num_ranks), dtype=np.int64)
    load_YL, slots_YRS = (np.array(given, dtype=np.int64) for given in (load_YL, slots_YRS))
    _level_layers(load_YL, slots_YRS, weight_R, sweeps, tokens_YR)  # of copies: loops compile anew for read-only arrays
    return tokens_YR


@compiled
def _level_layers(
    load_YL: np.ndarray, slots_YRS: np.ndarray, weight_R: np.ndarray, sweeps: int, tokens_YR: np.ndarray
) -> None:
    quota_RS = np.empty(slots_YRS.shape[1:], dtype=np.int64)
    for layer in range(load_YL.shape[0]):
        even_quotas(load_YL[layer], slots_YRS[layer], quota_RS, tokens_YR[layer])
        level_quotas(load_YL[layer], slots_YRS[layer], weight_R, sweeps, 0.0, 0.0, quota_RS, tokens_YR[layer])
