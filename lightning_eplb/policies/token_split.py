"""Divide the tokens of an expert among its replicas. Compiled.

Shape suffixes: ``L`` logical experts, ``P`` replicas, expert by expert, ``R`` ranks, ``S`` slots of a rank, ``Y`` MoE
layers.
"""

from typing import NamedTuple

import numpy as np

from lightning_eplb._compiled import compiled

SWEEPS = np.int64(24)  # as int64, or loops are compiled for each such number
"""Sweeps over the quotas to divide a batch."""
LEVEL_ENOUGH = 1.0 + 1.0 / 1024
"""A batch is divided well enough if its fullest rank is so many times the mean."""


class Replicas(NamedTuple):
    """Replicas by expert, and the tokens that each serves.

    Attributes:
        first_L: First replica of each expert, int64 ``[L + 1]``: expert ``l`` has those from ``first_L[l]`` to
            ``first_L[l + 1]``.
        several_X: Experts that have several, int64.
        rank_P: Rank of each replica, int64.
        slot_P: Its slot there, int64.
        quota_P: Tokens that it serves, int64. Those of an expert sum to its load.
        tokens_R: Tokens that each rank serves, int64.
        weight_R: Cost of a token on each rank, float64 above 0: 1 on all of them, more on slow ones.
    """

    first_L: np.ndarray
    several_X: np.ndarray
    rank_P: np.ndarray
    slot_P: np.ndarray
    quota_P: np.ndarray
    tokens_R: np.ndarray
    weight_R: np.ndarray


@compiled
def copy_slots(from_RS: np.ndarray, to_RS: np.ndarray) -> None:
    """Copy; ``to[:] = from`` takes a second to compile, for the message that the shapes differ."""
    for rank in range(from_RS.shape[0]):
        for slot in range(from_RS.shape[1]):
            to_RS[rank, slot] = from_RS[rank, slot]


@compiled
def find_replicas(slots_RS: np.ndarray, num_experts: int, weight_R: np.ndarray) -> Replicas:
    """List the replicas of each expert, the lowest rank and slot first. No tokens are divided yet.

    Args:
        slots_RS: Expert of each slot, -1 where it is empty, int64; a rank holds an expert once.
        num_experts: Logical experts.
        weight_R: Cost of a token on each rank.
    """
    num_ranks, num_slots = slots_RS.shape
    first_L = np.zeros(num_experts + 1, dtype=np.int64)
    for rank in range(num_ranks):
        for slot in range(num_slots):
            if slots_RS[rank, slot] >= 0:
                first_L[slots_RS[rank, slot] + 1] += 1
    for expert in range(num_experts):
        first_L[expert + 1] += first_L[expert]
    next_L, num_replicas = first_L[:-1].copy(), first_L[-1]
    rank_P, slot_P = np.empty(num_replicas, dtype=np.int64), np.empty(num_replicas, dtype=np.int64)
    for rank in range(num_ranks):
        for slot in range(num_slots):
            expert = slots_RS[rank, slot]
            if expert >= 0:
                rank_P[next_L[expert]], slot_P[next_L[expert]] = rank, slot
                next_L[expert] += 1
    quota_P, tokens_R = np.zeros(num_replicas, dtype=np.int64), np.zeros(num_ranks, dtype=np.int64)
    several_L, num_several = np.empty(num_experts, dtype=np.int64), 0
    for expert in range(num_experts):
        if first_L[expert + 1] - first_L[expert] > 1:
            several_L[num_several] = expert
            num_several += 1
    return Replicas(first_L, several_L[:num_several], rank_P, slot_P, quota_P, tokens_R, weight_R)


@compiled
def even_quotas(load_L: np.ndarray, replicas: Replicas) -> None:
    """Divide each expert's tokens evenly among its replicas, in place; what does not divide goes to the first ones."""
    replicas.tokens_R[:] = 0
    for expert in range(load_L.size):
        start, end = replicas.first_L[expert], replicas.first_L[expert + 1]
        if end - start == 1:
            replicas.quota_P[start] = load_L[expert]
            replicas.tokens_R[replicas.rank_P[start]] += load_L[expert]
            continue
        left = load_L[expert]
        for place in range(start, end):
            quota = (left + end - place - 1) // (end - place)
            replicas.quota_P[place] = quota
            replicas.tokens_R[replicas.rank_P[place]] += quota
            left -= quota


@compiled
def level_quotas(load_L: np.ndarray, replicas: Replicas, sweeps: int, enough: float) -> float:
    """Divide each expert's tokens among its replicas so that the ranks are as level as the replicas allow, in place.

    One expert after the other fills its ranks up to a common water line, given what the others leave there; that is
    repeated until nothing moves, no rank is above ``enough``, or ``sweeps`` times. It is block coordinate descent on
    the sum of ``tokens**2 * weight`` over the ranks, whose minimum also has the lowest possible fullest rank.

    Args:
        load_L: Tokens of each expert, int64, their sum below ``2**53``.
        replicas: Their quotas are where it starts, for instance those of :func:`even_quotas`.
        sweeps: How often at most every expert is divided anew.
        enough: A weighted rank's tokens that need not be lowered further; 0 to go on.

    Returns:
        The weighted tokens of the fullest rank.
    """
    first_L, several_X, rank_P, _, quota_P, tokens_R, weight_R = replicas
    peak = fullest(tokens_R, weight_R)
    speed_R = 1.0 / weight_R
    for _ in range(sweeps):
        if peak <= enough:
            break
        moved = np.int64(0)
        for expert in several_X:
            start, end, load = first_L[expert], first_L[expert + 1], load_L[expert]
            if load == 0:
                continue
            if end - start == 2:  # most have two: the water line is known at once
                one, two = start, start + 1
                if speed_R[rank_P[one]] < speed_R[rank_P[two]]:
                    one, two = two, one
                rank, other = rank_P[one], rank_P[two]
                here, there = tokens_R[rank] - quota_P[one], tokens_R[other] - quota_P[two]
                line = (load + here + there) / (speed_R[rank] + speed_R[other])
                quota = min(max(np.int64(line * speed_R[other]) - there, 0), load)
                moved = max(moved, abs(quota - quota_P[two]))
                quota_P[one], quota_P[two] = load - quota, quota  # what rounding leaves, to the faster rank
                tokens_R[rank], tokens_R[other] = here + load - quota, there + quota
                continue
            fastest = start
            for place in range(start, end):
                tokens_R[rank_P[place]] -= quota_P[place]
                if speed_R[rank_P[place]] > speed_R[rank_P[fastest]]:
                    fastest = place
            line, room, used = np.inf, 0.0, np.int64(0)
            while True:  # the line that those below it can be filled up to: lower, once others are left out
                held, speed, below, highest = load, 0.0, np.int64(0), 0.0
                for place in range(start, end):
                    rank = rank_P[place]
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
                rank = rank_P[place]
                quota = min(max(np.int64(line * speed_R[rank]) - tokens_R[rank], 0), rest)
                rest -= quota
                moved = max(moved, abs(quota - quota_P[place]))
                quota_P[place] = quota
            for place in range(start, end):  # what rounding leaves: one token each, but to slow ranks
                rank = rank_P[place]
                if rest > 0 and tokens_R[rank] * weight_R[rank] < line and 2 * used * speed_R[rank] >= room:
                    quota_P[place] += 1
                    rest -= 1
            quota_P[fastest] += rest
            for place in range(start, end):
                tokens_R[rank_P[place]] += quota_P[place]
        peak = fullest(tokens_R, weight_R)
        if moved <= 1:
            break
    return peak


@compiled
def fullest(tokens_R: np.ndarray, weight_R: np.ndarray) -> float:
    """Return the weighted tokens of the fullest rank."""
    peak = 0.0
    for rank in range(tokens_R.size):
        peak = max(peak, tokens_R[rank] * weight_R[rank])
    return peak


@compiled
def heaviest_first(value_X: np.ndarray) -> np.ndarray:
    """Order by value, the largest first; the lower index first where values are equal. A merge sort, bottom up."""
    size = value_X.size
    order, merged = np.arange(size), np.empty(size, dtype=np.int64)
    width = 1
    while width < size:
        for start in range(0, size, 2 * width):
            left, middle, end = start, min(start + width, size), min(start + 2 * width, size)
            right = middle
            for place in range(start, end):
                if left < middle and (right >= end or value_X[order[left]] >= value_X[order[right]]):
                    merged[place] = order[left]
                    left += 1
                else:
                    merged[place] = order[right]
                    right += 1
        order, merged = merged, order
        width *= 2
    return order


def split_tokens(
    counts_RL: np.ndarray, slots_RS: np.ndarray, node_R: np.ndarray, weight_R: np.ndarray, rank: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Divide what the ranks send to each expert among its replicas so that the ranks get equal work.

    Each replica gets a quota first (:func:`level_quotas`). Then the tokens of the source ranks are laid to the quotas:
    to the replica on the rank itself as far as its quota goes, then to replicas on its node, then to the others; lower
    ranks first. Whole numbers and single IEEE operations only: every rank that is given the same counts finds the same
    split.

    Args:
        counts_RL: Tokens that source rank ``r`` routes to logical expert ``l``, int64 ``[R, L]``.
        slots_RS: Expert of each slot, -1 where it is empty, int64 ``[R, S]``; no rank holds an expert twice.
        node_R: Node of each rank, int64 ``[R]``.
        weight_R: Cost of a token on each rank, float64 ``[R]`` above 0: 1 on all of them, more on slow ones.
        rank: The rank that is to send and to receive.

    Returns:
        The tokens that ``rank`` sends to each slot, int64 ``[R, S]``; those that its own slots receive from each rank,
        int64 ``[R, S]``; and the tokens that each rank serves in all, int64 ``[R]``.
    """
    sent_RS, received_RS = np.zeros_like(slots_RS), np.zeros_like(slots_RS)
    replicas = _split_tokens(counts_RL, slots_RS, weight_R)
    _lay_to_quotas(counts_RL, replicas, node_R, rank, sent_RS, received_RS)
    return sent_RS, received_RS, replicas.tokens_R


@compiled
def _split_tokens(counts_RL: np.ndarray, slots_RS: np.ndarray, weight_R: np.ndarray) -> Replicas:
    load_L = np.zeros(counts_RL.shape[1], dtype=np.int64)
    for source in range(counts_RL.shape[0]):
        load_L += counts_RL[source]
    replicas = find_replicas(slots_RS, load_L.size, weight_R)
    even_quotas(load_L, replicas)
    level_quotas(load_L, replicas, SWEEPS, LEVEL_ENOUGH * load_L.sum() / (1.0 / weight_R).sum())
    return replicas


@compiled
def _lay_to_quotas(
    counts_RL: np.ndarray,
    replicas: Replicas,
    node_R: np.ndarray,
    rank: int,
    sent_RS: np.ndarray,
    received_RS: np.ndarray,
) -> None:
    """Fill in what ``rank`` sends and receives, near replicas first. The quotas are used up."""
    first_L, _, rank_P, slot_P, quota_P, _, _ = replicas
    num_ranks, num_experts = counts_RL.shape
    left_R = np.empty(num_ranks, dtype=np.int64)
    for expert in range(num_experts):
        start, end = first_L[expert], first_L[expert + 1]
        if end - start == 1:
            target, slot = rank_P[start], slot_P[start]
            sent_RS[target, slot] = counts_RL[rank, expert]
            if target == rank:
                received_RS[:, slot] = counts_RL[:, expert]
            continue
        left_R[:] = counts_RL[:, expert]
        for distance in range(3):  # on the rank itself, on its node, anywhere
            for place in range(start, end):
                target, slot = rank_P[place], slot_P[place]
                first, last = (target, target + 1) if distance == 0 else (0, num_ranks)
                for source in range(first, last):
                    given = min(left_R[source], quota_P[place])
                    if given == 0 or (distance == 1 and node_R[source] != node_R[target]):
                        continue
                    left_R[source] -= given
                    quota_P[place] -= given
                    if source == rank:
                        sent_RS[target, slot] += given
                    if target == rank:
                        received_RS[source, slot] += given


def rank_weights(capacity_R: np.ndarray) -> np.ndarray:
    """Return the cost of a token on ranks of these capacities, 1 on the mean; a million times that where it is 0.

    Raises:
        ValueError: A capacity is negative, or all are 0.
    """
    capacity_R = np.asarray(capacity_R, dtype=np.float64)
    if not (capacity_R >= 0).all() or not capacity_R.any():
        raise ValueError(f"capacity_R={capacity_R} must hold numbers from zero up, one of them above")
    capacity_R = capacity_R / capacity_R.max()
    return capacity_R.mean() / np.maximum(capacity_R, 1e-6 * capacity_R.mean())


def level_tokens(
    load_YL: np.ndarray, slots_YRS: np.ndarray, capacity_R: np.ndarray | None = None, sweeps: int = 200
) -> np.ndarray:
    """Count what each rank serves when quotas level the ranks as far as the replicas allow.

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
    for layer in range(load_YL.shape[0]):
        replicas = find_replicas(slots_YRS[layer], load_YL.shape[1], weight_R)
        even_quotas(load_YL[layer], replicas)
        level_quotas(load_YL[layer], replicas, sweeps, 0.0)
        tokens_YR[layer] = replicas.tokens_R
