"""A layer to plan, and the objective of its plans.

Shape suffixes: ``C`` scenarios, ``L`` logical experts, ``R`` ranks, ``S`` slots of a rank.
"""

from typing import NamedTuple

import numpy as np

from lightning_eplb._compiled import compiled
from lightning_eplb.policies.split import even_quotas, level_quotas

SWEEPS = np.int64(12)  # as int64, or loops are compiled for each of these numbers
"""Sweeps over the quotas to judge a plan."""
SLOW = 1.0 / 16
"""A sweep that lowers the fullest rank by less than this part of what is missing is the last one."""


class Layer(NamedTuple):
    """A layer to plan. Costs are in parts of a mean rank's load of the interval.

    Attributes:
        load_CL: Parts of each expert in each scenario, int64; the expected load first.
        share_CL: The same over the parts of a mean rank, float64.
        mean_C: Parts of a mean rank, float64.
        home_L: Present rank of each primary, int64.
        before_RS: Present slots, int64, ``-1`` where one is empty.
        num_primaries: Primaries of each rank, its first slots.
        weight_R: Cost of a token on each rank, float64, 1 on the mean.
        node_R: Node of each rank, int64.
        price_within: Cost of a primary that arrives from its node.
        price_between: Cost of a primary that arrives from another node.
        least_gain: Gain that a primary's move must bring beyond its cost.
        copy: Cost of the travel of one replica's weights and gradient.
        most_moved: Primaries that may change ranks.
    """

    load_CL: np.ndarray
    share_CL: np.ndarray
    mean_C: np.ndarray
    home_L: np.ndarray
    before_RS: np.ndarray
    num_primaries: int
    weight_R: np.ndarray
    node_R: np.ndarray
    price_within: float
    price_between: float
    least_gain: float
    copy: float
    most_moved: int


@compiled
def price_of(layer: Layer, expert: int, rank: int) -> float:
    """Cost of a primary's arrival on a rank; 0 where it is there."""
    home = layer.home_L[expert]
    if home == rank:
        return 0.0
    return layer.price_within if layer.node_R[home] == layer.node_R[rank] else layer.price_between


@compiled
def count_moved(layer: Layer, slots_RS: np.ndarray) -> int:
    """Count the primaries that change ranks."""
    moved = 0
    for rank in range(slots_RS.shape[0]):
        for slot in range(layer.num_primaries):
            moved += int(layer.home_L[slots_RS[rank, slot]] != rank)
    return moved


@compiled
def busiest(layer: Layer, slots_RS: np.ndarray) -> int:
    """Count the replicas that the busiest rank sends or receives: a step waits for these."""
    num_ranks, num_slots = slots_RS.shape
    owner_L = np.empty(layer.home_L.size, dtype=np.int64)
    sent_R = np.zeros(num_ranks, dtype=np.int64)
    most = np.int64(0)
    for rank in range(num_ranks):
        for slot in range(layer.num_primaries):
            owner_L[slots_RS[rank, slot]] = rank
    for rank in range(num_ranks):
        received = np.int64(0)
        for slot in range(layer.num_primaries, num_slots):
            if slots_RS[rank, slot] >= 0:
                received += 1
                sent_R[owner_L[slots_RS[rank, slot]]] += 1
        most = max(most, received)
    return max(most, sent_R.max())


@compiled
def fixed_cost(layer: Layer, slots_RS: np.ndarray) -> float:
    """Cost of a plan whatever the load: moves of primaries, and the travel of replicas.

    The ranks send and receive at once: a rearrangement waits for the rank at which most arrives.
    """
    most = 0.0
    for rank in range(slots_RS.shape[0]):
        arrived = 0.0
        for slot in range(layer.num_primaries):
            arrived += price_of(layer, slots_RS[rank, slot], rank)
        most = max(most, arrived)
    most += layer.least_gain * count_moved(layer, slots_RS)
    return most + (layer.copy * busiest(layer, slots_RS) if layer.copy > 0.0 else 0.0)


@compiled
def fullest_expected(layer: Layer, slots_RS: np.ndarray, quota_RS: np.ndarray, tokens_R: np.ndarray) -> float:
    """Divide the expected load by levelled quotas; the fullest rank over the mean."""
    even_quotas(layer.load_CL[0], slots_RS, quota_RS, tokens_R)
    return (
        level_quotas(layer.load_CL[0], slots_RS, layer.weight_R, SWEEPS, layer.mean_C[0], SLOW, quota_RS, tokens_R)
        / layer.mean_C[0]
    )


@compiled
def judge(layer: Layer, slots_RS: np.ndarray, limit: float, own_weight: float, scenarios: int) -> tuple[float, float]:
    """Judge a plan: the cost of the interval in parts of a mean rank's load, and that if the expected load comes.

    The fullest rank under levelled quotas is averaged over the first ``scenarios``, the expected load counting
    ``own_weight``.
    What exceeds ``limit`` is not judged to its end.
    """
    quota_RS, tokens_R = np.empty_like(slots_RS), np.empty(slots_RS.shape[0], dtype=np.int64)
    cost = fixed_cost(layer, slots_RS)
    full = fullest_expected(layer, slots_RS, quota_RS, tokens_R)
    expected = cost + full
    cost += own_weight * full
    each = (1.0 - own_weight) / max(scenarios - 1, 1)
    for scenario in range(1, scenarios):
        # A rank is never below the mean: what is left adds at least 1 each.
        if cost + each * (scenarios - scenario) >= limit:
            return cost + each * (scenarios - scenario), expected
        mean = layer.mean_C[scenario]
        even_quotas(layer.load_CL[scenario], slots_RS, quota_RS, tokens_R)
        full = level_quotas(
            layer.load_CL[scenario], slots_RS, layer.weight_R, SWEEPS, mean, SLOW, quota_RS, tokens_R
        )  # fmt: skip
        cost += each * full / mean
    return cost, expected


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
