"""The default policy: start from where the experts are, and change what pays.

Shape suffixes: ``Y`` MoE layers, ``L`` logical experts, ``R`` ranks, ``N`` primaries on a rank, ``S`` slots on a rank.
"""

import warnings
from typing import Literal

import numpy as np

from lightning_eplb.arguments import check_whole_numbers
from lightning_eplb.compiled import compiled
from lightning_eplb.forecast import Forecast, plain_mean
from lightning_eplb.placement import EMPTY, ExpertPlacement
from lightning_eplb.policies.base import Outlook, Policy, Topology, check_groups, checked_load
from lightning_eplb.policies.even import plan_even
from lightning_eplb.policies.level import plan_level
from lightning_eplb.policies.spill import PARTS_BITS, scale_to_parts

ENOUGH = 1.0 + 1.0 / 4096
"""A fullest rank that is so many times the mean need not be improved."""
LASTING_GAIN = 1.0 / 20
"""What a swap gains must be more than so much of the forecast's spread, which may undo it: 0.5 % where loads may change
by 10 %."""
WITH_COPIES = 1.0 / 4
"""So much less is enough where there are copies to make up for it."""
NOISE = 1.0 / 4
"""And it must be more than so many standard deviations of a rank's tokens, were they drawn one by one."""
LEAST_SPREAD = 0.1
"""Copies are placed as if the load could change by that much at least: where it was quiet, it need not stay so."""
MOST_MOVES = int(np.iinfo(np.int32).max)
LEAST_CAPACITY = 1.0 / 16
"""A rank that should get nothing counts as one of so much of the mean capacity, to tell how bad its tokens are."""


class BalancedPolicy(Policy):
    """Levels the ranks for the next interval with few moves.

    Each layer is planned from the placement as it is. First the redundant copies are chosen anew, which costs nothing
    between steps. If the ranks are not level then, pairs of primaries are swapped between the fullest rank and
    another, as long as the tokens that the fullest rank is relieved of over the next interval are worth the time that
    the move takes. A layer that does not pay is left alone: so is one that is level already, or differs from level by
    sampling noise only, and one without tokens.

    What is planned for is a forecast and its spread. Copies are placed so that they connect the ranks and can take
    what may come; see :func:`lightning_eplb.policies.spill.spill`.

    Where it is known what a copy's travel takes, a layer has as many copies as save more time than they take: also the
    copies that training starts with are dropped where the ranks are level without them. A step waits for the rank that
    sends or receives most; a fuller rank is what the forecast expects and makes likely. Plans with copies are compared
    with plans that move primaries instead; see :func:`lightning_eplb.policies.toll.weigh_copies`.

    All decisions are made in whole numbers or in single IEEE operations, and ties go to the lower index, so the plan
    is the same on every machine.

    Example::

        EPLBCallback(num_redundant_experts=8, policy=BalancedPolicy(max_moves=64))

    Args:
        max_moves: The most primaries that one rearrangement may move, over all layers. ``None``: as many as pay.
        num_groups: Groups of experts that the router picks from first (node-limited routing). Where each group's
            experts are on one node, as they are at the start when the groups divide over nodes of equal size, they
            stay on it, their copies too (but for layers without tokens). 1: experts may go anywhere.
        split: How tokens are divided among the copies of an expert: ``"level"`` by quotas that level the ranks, as the
            layers do it; ``"even"`` for systems that give each copy as many.

    Raises:
        ValueError: ``max_moves`` is no whole number from zero up, ``num_groups`` is below 1 or does not divide the
            experts, or ``split`` is neither.
    """

    def __init__(
        self, max_moves: int | None = None, num_groups: int = 1, split: Literal["even", "level"] = "level"
    ) -> None:
        check_whole_numbers(num_groups=num_groups, **({} if max_moves is None else {"max_moves": max_moves}))
        if max_moves is not None and (max_moves < 0 or max_moves != int(min(max_moves, MOST_MOVES))):
            raise ValueError(
                f"max_moves={max_moves} must be a whole number from 0 to {MOST_MOVES}; None for as many as pay"
            )
        if num_groups < 1:
            raise ValueError(f"num_groups={num_groups} must be 1 or more; 1 for a model without expert groups")
        if split not in ("even", "level"):
            raise ValueError(f"split={split!r} must be 'even' or 'level'")
        self.max_moves = max_moves
        self.num_groups = num_groups
        self.split: Literal["even", "level"] = split
        self._has_warned = False

    def rearrange(self, load_YL: np.ndarray, placement: ExpertPlacement, topology: Topology) -> ExpertPlacement:
        """Plan for the same load again, with moves that cost next to nothing; see :meth:`Policy.rearrange`."""
        return self._plan(plain_mean(checked_load(load_YL, placement, topology)), placement, topology)

    def look_ahead(self, outlook: Outlook, placement: ExpertPlacement, topology: Topology) -> ExpertPlacement:
        """Plan for the forecast, and move what pays within the interval; see :meth:`Policy.look_ahead`."""
        parts = {id(part): part for part in (outlook.forecast.load, outlook.forecast.first, outlook.forecast.spread)}
        for part_YL in parts.values():  # where the first steps are as all are, they are one array
            checked_load(part_YL, placement, topology)
        prices, copy = (0.0, 0.0), 0.0
        if (costs := outlook.costs) is not None:
            per_window = outlook.num_steps / outlook.interval / costs.token
            prices = (costs.row_within_node * per_window, costs.row_between_nodes * per_window)
            copy = costs.copy / costs.token * outlook.num_steps
        return self._plan(outlook.forecast, placement, topology, prices, copy)

    def warm_up(self, placement: ExpertPlacement) -> None:
        """Compile what a plan needs, by planning for a small layer."""
        check_groups(self.num_groups, placement)
        small = ExpertPlacement.initial(1, 4, 2, 2)
        BalancedPolicy(split=self.split)._plan(plain_mean(np.array([[8, 4, 2, 1]]) << 20), small, Topology.even(2))

    def _plan(
        self,
        ahead: Forecast,
        placement: ExpertPlacement,
        topology: Topology,
        prices: tuple[float, float] = (0.0, 0.0),
        copy: float = 0.0,
    ) -> ExpertPlacement:
        capacity_R = np.ones(topology.num_ranks) if topology.capacity is None else np.array(topology.capacity)
        capacity_R /= capacity_R.max()
        node_R = np.array(topology.node_of_rank)
        slots_YRS = placement.by_rank.copy()
        domains = self._domains(placement, topology)
        if domains is None:
            parts = [(ahead.first, ahead.spread, slots_YRS, capacity_R, node_R)]
            self._plan_parts(parts, placement.primaries_per_rank, prices, copy)
        else:
            parts, experts = [], []
            for ranks in domains:
                local_YRS, expert_YL = _localize(slots_YRS[:, ranks], placement.primaries_per_rank)
                load_YL, spread_YL = (
                    np.take_along_axis(part, expert_YL, axis=1) for part in (ahead.first, ahead.spread)
                )
                here = capacity_R[ranks] if capacity_R[ranks].any() else np.ones(len(ranks))
                parts.append((load_YL, spread_YL, local_YRS, here, node_R[ranks]))
                experts.append(expert_YL)
            self._plan_parts(parts, placement.primaries_per_rank, prices, copy)
            has_tokens_Y = ahead.first.any(axis=1)
            for ranks, (_, _, local_YRS, _, _), expert_YL in zip(domains, parts, experts, strict=True):
                flat_YP = local_YRS.reshape(len(local_YRS), -1)
                global_YP = np.where(
                    flat_YP == EMPTY, EMPTY, np.take_along_axis(expert_YL, np.maximum(flat_YP, 0), axis=1)
                )
                slots_YRS[np.ix_(has_tokens_Y, ranks)] = global_YP.reshape(local_YRS.shape)[has_tokens_Y]
        return placement.with_slots(slots_YRS)

    def _plan_parts(
        self, parts: list[tuple[np.ndarray, ...]], num_primaries: int, prices: tuple[float, float], copy: float
    ) -> None:
        """Plan all layers, in place, and see to it that no more is moved than may be.

        Args:
            parts: For ranks that are planned by themselves: load, spread, slots, capacities, nodes.
        """
        before = [] if self.max_moves is None else [slots_YRS.copy() for _, _, slots_YRS, _, _ in parts]
        most = MOST_MOVES if self.max_moves is None else int(self.max_moves) // 2
        most_DY = np.full((len(parts), len(parts[0][0])), most)
        gain_DY, swaps_DY = np.zeros(most_DY.shape), np.zeros(most_DY.shape, dtype=np.int64)

        def plan() -> None:
            for part, most_Y, gain_Y, swaps_Y in zip(parts, most_DY, gain_DY, swaps_DY, strict=True):
                load_YL, spread_YL, slots_YRS, capacity_R, node_R = part
                plan_layers(
                    load_YL, spread_YL, slots_YRS, num_primaries, capacity_R, node_R, prices, copy,
                    self.split == "even", most_Y, gain_Y, swaps_Y,
                )  # fmt: skip

        plan()
        if self.max_moves is None or 2 * swaps_DY.sum() <= self.max_moves:
            return
        # The layers that gain most by a swap may make theirs; the others get what is left, and then copies only.
        budget = self.max_moves // 2
        for place in np.argsort(-gain_DY.ravel() / np.maximum(swaps_DY.ravel(), 1), kind="stable"):
            most_DY.flat[place] = min(budget, swaps_DY.flat[place])
            budget -= most_DY.flat[place]
        for part, slots_YRS in zip(parts, before, strict=True):
            part[2][:] = slots_YRS
        plan()

    def _domains(self, placement: ExpertPlacement, topology: Topology) -> list[np.ndarray] | None:
        """The ranks of each node where groups must stay on their node; None where experts may go anywhere."""
        if self.num_groups == 1:
            return None
        check_groups(self.num_groups, placement)
        if topology.num_nodes == 1:
            return None
        node_R = np.array(topology.node_of_rank)
        node_YGL = node_R[placement.primary_rank].reshape(
            placement.num_layers, self.num_groups, placement.num_logical_experts // self.num_groups
        )
        if (node_YGL == node_YGL[:, :, :1]).all():
            return [np.flatnonzero(node_R == node) for node in range(topology.num_nodes)]
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"BalancedPolicy plans over all ranks at once: num_groups={self.num_groups} and the nodes, of"
                f" {np.bincount(node_R).tolist()} ranks, are such that the experts of a group are on several nodes",
                stacklevel=4,
            )
        return None


def _localize(slots_YRS: np.ndarray, num_primaries: int) -> tuple[np.ndarray, np.ndarray]:
    """Count the experts of some ranks from 0. Copies of others' experts are dropped.

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


@compiled
def plan_layers(
    load_YL, spread_YL, slots_YRS, num_primaries, capacity_R, node_R, prices, copy, is_even, most_Y, gain_Y, swaps_Y
):
    """Plan layer after layer, in place.

    Args:
        load_YL: Expected tokens, int64.
        spread_YL: Their standard deviations, int64.
        slots_YRS: What the slots hold, int64; changed where it pays.
        num_primaries: The first slots of each rank.
        capacity_R: How much work a rank should get, float64.
        node_R: The node of each rank.
        prices: Of a swap within a node and between nodes, in tokens.
        copy: Tokens that take as long as a copy's travel, all those of the window.
        is_even: Whether tokens are divided evenly among copies.
        most_Y: Swaps that each layer may make.
        gain_Y: Filled with the tokens by which the fullest rank is lowered, less the price.
        swaps_Y: Filled with the swaps made.
    """
    layers, num_ranks, _ = slots_YRS.shape
    parts_L = np.empty(load_YL.shape[1], dtype=np.int64)
    spread_L, likely_L = np.empty_like(parts_L), np.empty_like(parts_L)
    level_R = np.empty(num_ranks, dtype=np.int64)
    weight_R = np.empty(num_ranks)
    speed = 0.0
    for rank in range(num_ranks):
        speed += capacity_R[rank]
    mean_speed = speed / num_ranks
    for rank in range(num_ranks):
        weight_R[rank] = mean_speed / max(capacity_R[rank], LEAST_CAPACITY * mean_speed)
    # Between ranks of one primary each, all alike, a swap changes names only.
    has_swaps = num_primaries > 1 or weight_R.min() < weight_R.max()
    for layer in range(layers):
        gain_Y[layer], swaps_Y[layer] = 0.0, 0
        most_swaps = most_Y[layer] if has_swaps else np.int64(0)
        shift = scale_to_parts(load_YL[layer], parts_L)
        total = spreads = np.int64(0)
        for expert in range(parts_L.size):
            total += parts_L[expert]
            spread = spread_YL[layer, expert]
            likely_L[expert] = spread << shift if shift >= 0 else spread >> -shift
            spreads += likely_L[expert]
            spread_L[expert] = max(likely_L[expert], np.int64(LEAST_SPREAD * parts_L[expert]))
        if total == 0:
            continue
        for rank in range(num_ranks):
            level_R[rank] = np.int64(np.ceil(total * (capacity_R[rank] / speed)))
        mean = total / num_ranks
        token = 2.0**shift
        noise = np.sqrt(mean / token) * token  # the standard deviation of a rank's tokens, drawn one by one
        has_copies = slots_YRS.shape[2] > num_primaries
        undone = LASTING_GAIN * spreads / num_ranks * (WITH_COPIES if has_copies else 1.0)
        least_gain = max(undone, NOISE * noise)
        costs = (max(prices[0] * token, least_gain), max(prices[1] * token, least_gain))
        copy_parts = min(copy * token, 2.0**PARTS_BITS)
        if is_even and has_copies:
            gain, swaps = plan_even(
                parts_L, likely_L, slots_YRS[layer], num_primaries, weight_R, node_R, costs, copy_parts,
                least_gain, ENOUGH * mean, most_swaps,
            )  # fmt: skip
        else:
            gain, swaps = plan_level(
                parts_L, spread_L, likely_L, slots_YRS[layer], num_primaries, level_R, weight_R, node_R, costs,
                copy_parts, least_gain, ENOUGH * mean, most_swaps,
            )  # fmt: skip
        gain_Y[layer], swaps_Y[layer] = gain / token, swaps
