"""Problems of :class:`~lightning_eplb.policies.BalancedPolicy`: what it plans for the layers of a model.

Shape suffixes: ``C`` scenarios, ``Y`` MoE layers, ``L`` logical experts, ``R`` ranks, ``S`` slots on a rank.
"""

from typing import NamedTuple

import numpy as np

from lightning_eplb.placement import EMPTY, ExpertPlacement
from lightning_eplb.policies.base import Outlook, Topology, checked_load
from lightning_eplb.policies.forecast import Forecast
from lightning_eplb.policies.objective import LEAST_GAIN
from lightning_eplb.policies.scenarios import scale_to_parts, scenarios, strength_of

NOISE = 1.0 / 4
"""Standard deviations of a rank's tokens, were they drawn one by one, that a gain must exceed, too."""
ALL_MOVED = 1.0 / 32
"""Gain that moving all primaries must bring beyond its cost, in parts of a mean rank's load; for a part of them it
is as much less. Gains are expected, moves are certain. Estimated, not measured."""
NEVER = 1e9
"""Cost of what shall never be done: infinity times nothing would be no number."""
MOST_MOVES = int(np.iinfo(np.int32).max)
LEAST_CAPACITY = 1.0 / 16
"""Capacity, in parts of the mean, that a rank that should get nothing counts with: to tell how bad its tokens are."""


class LayersProblem(NamedTuple):
    """All layers of some ranks, to plan together.

    Attributes:
        load_CYL: Parts of each expert in each scenario, int64.
        slots_YRS: Present slots, int64; planned in place.
        num_primaries: Primaries of each rank.
        weight_R: Cost of a token on each rank, float64.
        node_R: Node of each rank, int64.
        price_Y2: Cost of a primary's arrival from its node and from another, in mean rank loads of the interval.
        move_gain: Gain that each primary's move must bring beyond its cost.
        copy_Y: Cost of a replica's travel.
        least_gain_Y: Gain below which a layer stays as it is.
        most_moved_Y: Primaries that may change ranks, int64.
        gain_Y: Filled with what a layer's plan gains.
        moved_Y: Filled with the primaries that change ranks.
        worth: Value of a gain of 1, to compare models.
    """

    load_CYL: np.ndarray
    slots_YRS: np.ndarray
    num_primaries: int
    weight_R: np.ndarray
    node_R: np.ndarray
    price_Y2: np.ndarray
    move_gain: float
    copy_Y: np.ndarray
    least_gain_Y: np.ndarray
    most_moved_Y: np.ndarray
    gain_Y: np.ndarray
    moved_Y: np.ndarray
    worth: float


class PlanDraft(NamedTuple):
    """Plan of a model in the making.

    Attributes:
        placement: Present placement.
        slots_YRS: Slots of the plan.
        problems: What is planned: all ranks together, or the ranks of each node.
        parts: Ranks, slots in local numbers and experts of each node, see :func:`localize`. Empty for all together.
        has_tokens_Y: Layers that are planned by node.
    """

    placement: ExpertPlacement
    slots_YRS: np.ndarray
    problems: list[LayersProblem]
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]]
    has_tokens_Y: np.ndarray

    def planned(self) -> ExpertPlacement:
        """Return the placement once the problems are planned."""
        for ranks, local_YRS, expert_YL in self.parts:
            flat_YP = local_YRS.reshape(len(local_YRS), -1)
            global_YP = np.where(flat_YP == EMPTY, EMPTY, np.take_along_axis(expert_YL, np.maximum(flat_YP, 0), axis=1))
            of_layers = global_YP.reshape(local_YRS.shape)[self.has_tokens_Y]
            self.slots_YRS[np.ix_(self.has_tokens_Y, ranks)] = of_layers
        return self.placement.with_slots(self.slots_YRS)


def check_outlook(outlook: Outlook, placement: ExpertPlacement, topology: Topology) -> None:
    """Raise ``ValueError`` unless a forecast, a placement and a topology are of the same experts and ranks."""
    parts = {id(part): part for part in (outlook.forecast.load, outlook.forecast.first, outlook.forecast.spread)}
    for part_YL in parts.values():  # where the first steps are as all are, they are one array
        checked_load(part_YL, placement, topology)


def seconds_of_rank(outlook: Outlook, topology: Topology) -> float:
    """Return the time that a mean rank takes for a layer in a step; its tokens where costs are unknown."""
    layers, _ = outlook.forecast.first.shape
    tokens = float(outlook.forecast.first.sum()) / layers / topology.num_ranks / outlook.num_steps
    return tokens * (outlook.costs.token if outlook.costs is not None else 1.0)


def problem_of(
    outlook: Outlook, slots_YRS: np.ndarray, num_primaries: int, topology: Topology, worth: float
) -> LayersProblem:
    """Return the problem of all layers of some ranks.

    Args:
        outlook: Forecast and costs.
        slots_YRS: Present slots, which are planned in place.
        num_primaries: Primaries of each rank.
        topology: Nodes and capacities of the ranks.
        worth: See :class:`LayersProblem`.
    """
    layers, num_ranks, _ = slots_YRS.shape
    expected_YL = scale_to_parts(outlook.forecast.first)
    strength_Y = strength_of(outlook.forecast.first, outlook.forecast.spread)
    tokens_Y = np.maximum(outlook.forecast.first.astype(np.float64).cumsum(axis=1)[:, -1] / num_ranks, 1.0)
    price_Y2, copy_Y = np.zeros((layers, 2)), np.zeros(layers)
    if (costs := outlook.costs) is not None:
        rows = np.array([costs.row_within_node, costs.row_between_nodes])
        price_Y2 = np.minimum(rows * (outlook.num_steps / outlook.interval / costs.token) / tokens_Y[:, None], NEVER)
        copy_Y = np.minimum(costs.copy / costs.token * outlook.num_steps / tokens_Y, NEVER)
    capacity_R = np.ones(num_ranks) if topology.capacity is None else np.array(topology.capacity)
    capacity_R = capacity_R / capacity_R.max()
    mean = capacity_R.cumsum()[-1] / num_ranks
    return LayersProblem(
        load_CYL=scenarios(expected_YL, strength_Y, outlook.sub_windows),
        slots_YRS=slots_YRS,
        num_primaries=num_primaries,
        weight_R=mean / np.maximum(capacity_R, LEAST_CAPACITY * mean),
        node_R=np.array(topology.node_of_rank),
        price_Y2=price_Y2,
        move_gain=ALL_MOVED / outlook.forecast.first.shape[1] if outlook.costs is not None else 0.0,
        copy_Y=copy_Y,
        least_gain_Y=np.maximum(LEAST_GAIN, NOISE / np.sqrt(tokens_Y)),
        most_moved_Y=np.full(layers, MOST_MOVES),
        gain_Y=np.zeros(layers),
        moved_Y=np.zeros(layers, dtype=np.int64),
        worth=worth,
    )


def of_experts(outlook: Outlook, expert_YL: np.ndarray) -> Outlook:
    """Return the outlook on some of the experts."""
    first, spread = (
        np.take_along_axis(part, expert_YL, axis=1) for part in (outlook.forecast.first, outlook.forecast.spread)
    )
    windows = outlook.sub_windows
    if windows is not None:
        windows = np.take_along_axis(windows, np.broadcast_to(expert_YL, (len(windows), *expert_YL.shape)), axis=2)
    return Outlook(first, outlook.num_steps, Forecast(first, first, spread), outlook.interval, outlook.costs, windows)


def of_ranks(topology: Topology, ranks: np.ndarray) -> Topology:
    """Return the topology of the ranks of one node."""
    capacity = None if topology.capacity is None else tuple(topology.capacity[rank] for rank in ranks)
    return Topology((0,) * len(ranks), capacity if capacity is not None and any(capacity) else None)


def localize(slots_YRS: np.ndarray, num_primaries: int) -> tuple[np.ndarray, np.ndarray]:
    """Count the experts of some ranks from 0. Replicas of others' experts are dropped.

    Returns:
        The slots in local numbers, and for each local number the expert, ``[Y, ranks * N]``.
    """
    layers, ranks, _ = slots_YRS.shape
    # In C order, also where these are few: in another, all loops would be compiled again.
    primaries_YL = np.ascontiguousarray(slots_YRS[:, :, :num_primaries]).reshape(layers, ranks * num_primaries)
    expert_YL = np.sort(primaries_YL, axis=1)
    local_YRS = np.full(slots_YRS.shape, EMPTY)
    for layer in range(layers):
        place = np.searchsorted(expert_YL[layer], slots_YRS[layer])
        place = np.minimum(place, expert_YL.shape[1] - 1)
        local_YRS[layer] = np.where(expert_YL[layer][place] == slots_YRS[layer], place, EMPTY)
    return local_YRS, expert_YL
