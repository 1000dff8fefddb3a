"""Replicate experts and pack the replicas to ranks, as DeepSeek's published planner does. Compiled.

Source: https://github.com/deepseek-ai/EPLB (2025): replicas by load, heaviest first to the emptiest rank. Here each
rank has room for primaries and for redundant replicas apart, and holds an expert once; then ranks are relabelled.

Shape suffixes: ``L`` logical experts, ``R`` ranks, ``S`` slots of a rank.
"""

import numpy as np

from lightning_eplb._compiled import compiled
from lightning_eplb.policies.objective import Layer
from lightning_eplb.policies.token_split import heaviest_first


@compiled
def replicate(load_L: np.ndarray, num_ranks: int, num_redundant: int, count_L: np.ndarray) -> None:
    """Add replicas in ``count_L``: one more, again and again, for the expert with most load a replica."""
    share_L = load_L / count_L
    for _ in range(num_redundant):
        best = np.int64(-1)
        for expert in range(load_L.size):
            if count_L[expert] < num_ranks and share_L[expert] > 0.0 and (best < 0 or share_L[expert] > share_L[best]):
                best = np.int64(expert)
        if best < 0:
            return
        count_L[best] += 1
        share_L[best] = load_L[best] / count_L[best]


@compiled
def pack(layer: Layer, slots_RS: np.ndarray, num_redundant: int, load_L: np.ndarray) -> None:
    """Fill the empty slots: heaviest replica first, to the emptiest rank with room that does not hold its expert.

    Args:
        layer: To plan.
        slots_RS: Plan; what it holds stays. Filled in place; a replica that finds no room is left out.
        num_redundant: Redundant replicas that it shall hold in all.
        load_L: Load of each expert that is planned for, in parts of a mean rank's, float64.
    """
    num_ranks, num_slots = slots_RS.shape
    n, num_experts = layer.num_primaries, layer.home_L.size
    placed_L, count_L = np.zeros(num_experts, dtype=np.int64), np.ones(num_experts, dtype=np.int64)
    held_RL = np.zeros((num_ranks, num_experts), dtype=np.bool_)
    has_primary_L = np.zeros(num_experts, dtype=np.bool_)
    room_R2 = np.zeros((num_ranks, 2), dtype=np.int64)
    for rank in range(num_ranks):
        for slot in range(num_slots):
            expert = slots_RS[rank, slot]
            if expert < 0:
                room_R2[rank, np.int64(slot >= n)] += 1
                continue
            placed_L[expert] += 1
            held_RL[rank, expert] = True
            if slot < n:
                has_primary_L[expert] = True
            else:
                count_L[expert] += 1
                num_redundant -= 1
    replicate(load_L, num_ranks, num_redundant, count_L)
    share_L = load_L / count_L
    tokens_R = np.zeros(num_ranks)
    for rank in range(num_ranks):
        for slot in range(num_slots):
            if slots_RS[rank, slot] >= 0:
                tokens_R[rank] += share_L[slots_RS[rank, slot]]
    for expert in heaviest_first(share_L):
        for _ in range(count_L[expert] - placed_L[expert]):
            part = np.int64(has_primary_L[expert])
            best = np.int64(-1)
            lowest = np.inf
            for rank in range(num_ranks):
                filled = (tokens_R[rank] + share_L[expert]) * layer.weight_R[rank]
                if room_R2[rank, part] > 0 and not held_RL[rank, expert] and filled < lowest:
                    best, lowest = np.int64(rank), filled
            if best < 0:
                break
            slot = part * n
            while slots_RS[best, slot] >= 0:
                slot += 1
            slots_RS[best, slot] = expert
            room_R2[best, part] -= 1
            has_primary_L[expert] = held_RL[best, expert] = True
            tokens_R[best] += share_L[expert]


@compiled
def relabel_ranks(layer: Layer, slots_RS: np.ndarray) -> None:
    """Permute the ranks of a plan so that many experts find themselves where their primary is now, in place.

    Greedy: the pair of ranks with most experts in common first. Ranks of unequal cost keep their names.
    """
    num_ranks, num_slots = slots_RS.shape
    is_even = True
    for weight in layer.weight_R:
        is_even &= weight == layer.weight_R[0]
    if is_even:
        common_RR = np.zeros((num_ranks, num_ranks), dtype=np.int16)
        for rank in range(num_ranks):
            for slot in range(num_slots):
                if slots_RS[rank, slot] >= 0:
                    common_RR[rank, layer.home_L[slots_RS[rank, slot]]] += 1
        to_R = np.full(num_ranks, -1)
        is_taken_R = np.zeros(num_ranks, dtype=np.bool_)
        for common in range(num_slots, 0, -1):
            for rank in range(num_ranks):
                for slot in range(num_slots):
                    if to_R[rank] < 0 and slots_RS[rank, slot] >= 0:
                        target = layer.home_L[slots_RS[rank, slot]]
                        if common_RR[rank, target] == common and not is_taken_R[target]:
                            to_R[rank], is_taken_R[target] = target, True
        target = np.int64(0)
        for rank in range(num_ranks):
            if to_R[rank] < 0:
                while is_taken_R[target]:
                    target += 1
                to_R[rank], is_taken_R[target] = target, True
        packed_RS = slots_RS.copy()
        for rank in range(num_ranks):
            for slot in range(num_slots):
                slots_RS[to_R[rank], slot] = packed_RS[rank, slot]


@compiled
def keep_rows(before_RS: np.ndarray, after_RS: np.ndarray, num_primaries: int) -> None:
    """Reorder ``after_RS`` in place, primaries and redundant slots apart: what stays on a rank keeps its row."""
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
