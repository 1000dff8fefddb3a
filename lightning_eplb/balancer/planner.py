"""What to do next: the policy is asked on rank 0; all ranks hear what it decided, and what is to be expected of it."""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_eplb._compiled import will_be_kept
from lightning_eplb.balancer.steps import Rearrangement
from lightning_eplb.functional import balancedness, rank_tokens
from lightning_eplb.parallel.consensus import check_successor, decide_on_rank_zero
from lightning_eplb.parallel.experts import ExpertLayer
from lightning_eplb.placement import ExpertPlacement
from lightning_eplb.policies import BalancedPolicy, Costs, Outlook, Policy, Topology
from lightning_eplb.policies.balanced import plan_layer
from lightning_eplb.policies.batch import choose_copies
from lightning_eplb.policies.forecast import Forecast, forecast, sub_windows
from lightning_eplb.policies.split import level_tokens, rank_weights
from lightning_eplb.relocation.plan import plan_relocation


class Decision(NamedTuple):
    """What all ranks have agreed to do.

    Attributes:
        rearrangement: As far as it is known beforehand.
        capacity: How much work each EP rank gets from then on.
        most_bytes: That may travel behind a step.
    """

    rearrangement: Rearrangement
    capacity: tuple[float, ...] | None
    most_bytes: int


class Surroundings(NamedTuple):
    """What a decision depends on, beside the load. Rank 0's counts.

    Attributes:
        capacity: How much work each EP rank should get; ``None``: all the same.
        costs: What moves cost, as far as it is known.
        most_bytes: That can travel behind a step.
    """

    capacity: tuple[float, ...] | None
    costs: Costs | None
    most_bytes: int


class DecisionMaker:
    """Asks the policy, and keeps account of its forecasts. All ranks use it alike.

    Args:
        policy: Who is asked.
        layers: Of the model.
        step_interval: Optimizer steps that a decision is made for.
    """

    def __init__(self, policy: Policy, layers: Sequence[ExpertLayer], step_interval: int) -> None:
        self.policy = policy
        self._layers = layers
        self._groups = layers[0].groups
        self._copies_by_batch = layers[0].chooses_by_batch
        self._step_interval = step_interval
        self._forecast: Forecast | None = None
        self._load_since_forecast = torch.zeros(len(layers), layers[0].num_logical_experts, dtype=torch.int64)
        self.forecast_error: float | None = None
        """How far off the forecast of the last whole interval was; 0 is exact."""

    def warm_up(self, placement: ExpertPlacement) -> None:
        """Compile now what would otherwise be compiled in the first decision. On every rank; no rank waits for another.

        Args:
            placement: Where experts are.
        """
        forecast(np.ones((8, 1, 2), dtype=np.int64))
        choose_copies(np.ones(2, dtype=np.int64), np.array([[0, -1], [1, -1]]), 1, np.ones(2), 1)
        load_YL = np.ones((placement.num_layers, placement.num_logical_experts), dtype=np.int64)
        rank_tokens(load_YL, placement)
        balancedness(level_tokens(load_YL, placement.by_rank))
        if self._groups.size > 1:
            if isinstance(self.policy, BalancedPolicy) and will_be_kept(plan_layer):
                rank_zero_info("the planner is compiled now, in about half a minute; the next run finds it compiled")
            self.policy.warm_up(placement)

    def note(self, load_YL: Tensor) -> None:
        """Compare the latest forecast with this load of a step, too."""
        self._load_since_forecast += load_YL

    def decide(
        self,
        before: ExpertPlacement,
        goal: ExpertPlacement | None,
        steps_WYL: np.ndarray,
        load_YL: np.ndarray,
        surroundings: Surroundings,
        begun_at: float,
    ) -> Decision:
        """Ask the policy. Every rank of the default group must call it.

        Args:
            before: Where experts are.
            goal: Where they are to go without asking; ``None`` to ask.
            steps_WYL: The load of each step that the policy is to look back on, at least one.
            load_YL: That of the whole window.
            surroundings: Of this rank.
            begun_at: When the window began to be read, by ``time.perf_counter()``.

        Raises:
            ValueError, RuntimeError: As :meth:`agree` does.
        """
        if self._forecast is not None:
            self.forecast_error = self._forecast.error(self._load_since_forecast.numpy())
        outlook = self._look_ahead(steps_WYL, surroundings.costs) if goal is None else None
        after, capacity, most_bytes = self.agree(before, goal, outlook, surroundings)
        begun = Rearrangement(
            before=before,
            load=load_YL,
            **extent(before, after),
            plan_seconds=time.perf_counter() - begun_at,
            predicted_balancedness=self._predict(outlook, after, capacity) if outlook is not None else None,
        )
        return Decision(begun, capacity, most_bytes)

    def agree(
        self,
        before: ExpertPlacement,
        goal: ExpertPlacement | None,
        outlook: Outlook | None,
        surroundings: Surroundings,
    ) -> tuple[ExpertPlacement, tuple[float, ...] | None, int]:
        """Rank 0's ``goal`` or its policy's, its capacities and the bytes that may travel behind a step, on every rank.

        Raises:
            ValueError: On every rank, if the policy raised one or no placement came out that can follow.
            RuntimeError: On the other ranks, if the policy raised anything else, which rank 0 raises itself.
        """

        def decide() -> tuple[np.ndarray, tuple[float, ...] | None, int]:
            topology = Topology(self._groups.node_of_rank, surroundings.capacity)
            decided = self.policy.look_ahead(outlook, before, topology) if outlook is not None else goal
            decided = check_successor(decided, before)
            if self._copies_by_batch:
                decided = decided.without_copies()  # a plan's are those of a mean batch
            return decided.physical_to_logical, topology.capacity, surroundings.most_bytes

        source = "rearrange()" if outlook is None else f"{type(self.policy).__name__}.rearrange()"
        slots_YP, capacity, most_bytes = decide_on_rank_zero(decide, source, self._groups)
        return ExpertPlacement(slots_YP, before.num_logical_experts, before.num_ranks), capacity, most_bytes

    def _look_ahead(self, steps_WYL: np.ndarray, costs: Costs | None) -> Outlook:
        """What the policy is told. Every rank forecasts, so that each can tell later how good the forecast was."""
        self._forecast = forecast(steps_WYL)
        self._load_since_forecast.zero_()
        return Outlook(
            steps_WYL.sum(axis=0), len(steps_WYL), self._forecast, self._step_interval, costs, sub_windows(steps_WYL)
        )

    def _predict(self, outlook: Outlook, after: ExpertPlacement, capacity: tuple[float, ...] | None) -> float:
        """Balancedness of a step that gets what is forecast."""
        load_YL, slots_YRS = outlook.forecast.first // outlook.num_steps, after.by_rank
        weight_R = rank_weights(np.ones(after.num_ranks) if capacity is None else np.array(capacity))
        if self._copies_by_batch:
            slots_YRS = np.stack(
                [
                    choose_copies(load_L, slots_RS, after.primaries_per_rank, weight_R, layer.min_tokens_per_copy)
                    for load_L, slots_RS, layer in zip(load_YL, slots_YRS, self._layers, strict=True)
                ]
            )
        return balancedness(level_tokens(load_YL, slots_YRS, 1.0 / weight_R))


def extent(before: ExpertPlacement, after: ExpertPlacement) -> dict[str, Any]:
    """How far a rearrangement goes, by the names of :class:`~lightning_eplb.balancer.steps.Rearrangement`."""
    plan, n = plan_relocation(before, after), before.primaries_per_rank
    return {
        "after": after,
        "num_layers": len(plan),
        "num_rows": sum(moves.num_rows_between_ranks for moves in plan),
        "num_copies": int((before.by_rank[:, :, n:] != after.by_rank[:, :, n:]).sum()),
    }
