"""The planner: asks the policy on rank 0 and broadcasts its plan, with a forecast of what the plan will achieve."""

import threading
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_eplb._compiled import is_on_disk
from lightning_eplb.balancer.step_stats import RearrangementResult
from lightning_eplb.functional import balancedness, rank_tokens
from lightning_eplb.metrics import ExpertLoad
from lightning_eplb.parallel.consensus import check_successor, decide_on_rank_zero
from lightning_eplb.parallel.expert_layer import ExpertLayer
from lightning_eplb.placement import ExpertPlacement
from lightning_eplb.policies import BalancedPolicy, Costs, Outlook, Policy, Topology
from lightning_eplb.policies.balanced import plan_layer
from lightning_eplb.policies.base import check_groups
from lightning_eplb.policies.batch_redundancy import choose_copies
from lightning_eplb.policies.forecast import Forecast, forecast, sub_windows
from lightning_eplb.policies.token_split import level_tokens, rank_weights


class RearrangementPlan(NamedTuple):
    """Planned rearrangement, the same on all ranks but for ``seconds``.

    Attributes:
        before: Placement that the plan starts from.
        after: Placement that it leads to.
        load: Load of the window, ``[Y, L]`` int64.
        capacity: Share of the work that each EP rank gets from then on; ``None``: equal shares.
        overlap_bytes: Bytes that a rank may send or receive during one step if the transfer overlaps training.
        predicted_balancedness: Balancedness of the steps that follow, according to the forecast; ``None`` without one.
        seconds: Time until this rank knew the plan.
    """

    before: ExpertPlacement
    after: ExpertPlacement
    load: np.ndarray
    capacity: tuple[float, ...] | None
    overlap_bytes: int
    predicted_balancedness: float | None
    seconds: float

    def result(self, after: ExpertPlacement, num_bytes: int, seconds: float) -> RearrangementResult:
        """Return the result of the plan.

        Args:
            after: Placement that was reached; another than the plan's if the rearrangement was stopped.
            num_bytes: Bytes that crossed ranks, over all ranks.
            seconds: Time that training waited for the transfer on this rank.
        """
        return RearrangementResult(
            before=self.before,
            after=after,
            load=self.load,
            num_bytes=num_bytes,
            seconds=self.seconds + seconds,
            plan_seconds=self.seconds,
            exchange_seconds=seconds,
            predicted_balancedness=self.predicted_balancedness,
        )


class PlanningContext(NamedTuple):
    """Inputs of a plan beside the load. Those of rank 0 count.

    Attributes:
        capacity: Share of the work that each EP rank should get; ``None``: equal shares.
        costs: Costs of moves and redundant experts; ``None`` if unknown.
        overlap_bytes: Bytes that a rank can send or receive during one step.
    """

    capacity: tuple[float, ...] | None
    costs: Costs | None
    overlap_bytes: int


class RearrangementPlanner:
    """Plans rearrangements and measures how good their forecasts were. All ranks use it alike.

    Args:
        policy: Policy that chooses placements.
        layers: Expert layers of the model.
        step_interval: Optimizer steps that a plan is made for.
    """

    def __init__(self, policy: Policy, layers: Sequence[ExpertLayer], step_interval: int) -> None:
        self.policy = policy
        self._layers = layers
        self._groups = layers[0].groups
        self._chooses_by_batch = layers[0].chooses_by_batch
        self._step_interval = step_interval
        self._forecast: Forecast | None = None
        self._compilation: threading.Thread | None = None
        self._load_since_forecast = torch.zeros(len(layers), layers[0].num_logical_experts, dtype=torch.int64)
        self.forecast_error: float | None = None
        """Relative error of the forecast of the last complete interval; 0 is exact."""

    def warm_up(self, placement: ExpertPlacement) -> None:
        """Compile what every step needs, and start to compile what the first plan needs. Every rank calls it.

        The loops of :class:`~lightning_eplb.policies.BalancedPolicy` take a processor about 20 seconds the first time.
        Rank 0, which plans, compiles them in a thread behind the first steps.

        Args:
            placement: Current placement.
        """
        if self._chooses_by_batch:
            choose_copies(np.ones(2, dtype=np.int64), np.array([[0, -1], [1, -1]]), 1, np.ones(2), 1)
        load_YL = np.ones((placement.num_layers, placement.num_logical_experts), dtype=np.int64)
        rank_tokens(load_YL, placement)
        balancedness(level_tokens(load_YL, placement.by_rank))
        if self._groups.size == 1:
            return
        if not isinstance(self.policy, BalancedPolicy):
            self.policy.warm_up(placement)
            return
        check_groups(self.policy.num_groups, placement)
        if dist.get_rank() > 0:
            return
        if is_on_disk(plan_layer):
            self.policy.warm_up(placement)
            return
        rank_zero_info("compiling the planner behind the first steps; a decision that comes before waits for it")
        self._compilation = threading.Thread(target=self.policy.warm_up, args=(placement,), name="compile the planner")
        self._compilation.start()

    def observe(self, load_YL: Tensor) -> None:
        """Add the load of a step to the load that the latest forecast is compared with."""
        self._load_since_forecast += load_YL

    def plan(
        self,
        before: ExpertPlacement,
        window: ExpertLoad,
        num_steps: int,
        context: PlanningContext,
        target: ExpertPlacement | None = None,
    ) -> RearrangementPlan:
        """Ask the policy on rank 0 and return its plan on every rank. Every rank of the default group must call it.

        Args:
            before: Current placement.
            window: Load of the latest steps.
            num_steps: Steps of the window, counted from its end, that the policy looks at.
            context: Further inputs on this rank.
            target: Placement to plan for instead of the policy's; ``None`` to ask the policy.

        Raises:
            ValueError: On every rank, if the policy raised one or returned no placement of the same shape.
            RuntimeError: On the other ranks, if the policy raised anything else, which rank 0 raises itself.
        """
        start = time.perf_counter()
        steps_WYL = window.steps().cpu().numpy()
        load_YL = steps_WYL.sum(axis=0)
        if self._forecast is not None:
            self.forecast_error = self._forecast.error(self._load_since_forecast.numpy())
        outlook = None
        if target is None:
            steps_WYL = steps_WYL[-num_steps:] if len(steps_WYL) else np.zeros_like(load_YL)[None]
            outlook = self._look_ahead(steps_WYL, context.costs)

        def plan_on_rank_zero() -> tuple[np.ndarray, tuple[float, ...] | None, int]:
            if self._compilation is not None:
                self._compilation.join()
                self._compilation = None
            topology = Topology(self._groups.node_of_rank, context.capacity)
            chosen = target if outlook is None else self.policy.look_ahead(outlook, before, topology)
            after = check_successor(chosen, before)
            if self._chooses_by_batch:
                after = after.without_copies()  # redundant experts are chosen for each batch
            return after.physical_to_logical, topology.capacity, context.overlap_bytes

        source = "rearrange()" if outlook is None else f"{type(self.policy).__name__}.rearrange()"
        slots_YP, capacity, overlap_bytes = decide_on_rank_zero(plan_on_rank_zero, source, self._groups)
        after = ExpertPlacement(slots_YP, before.num_logical_experts, before.num_ranks)
        predicted = self._predict(outlook, after, capacity) if outlook is not None else None
        return RearrangementPlan(
            before, after, load_YL, capacity, overlap_bytes, predicted, time.perf_counter() - start
        )

    def _look_ahead(self, steps_WYL: np.ndarray, costs: Costs | None) -> Outlook:
        """Forecast the load on every rank, so that each rank can measure the error later."""
        self._forecast = forecast(steps_WYL)
        self._load_since_forecast.zero_()
        return Outlook(
            steps_WYL.sum(axis=0), len(steps_WYL), self._forecast, self._step_interval, costs, sub_windows(steps_WYL)
        )

    def _predict(self, outlook: Outlook, after: ExpertPlacement, capacity: tuple[float, ...] | None) -> float:
        """Return the balancedness of a step that gets the forecast load."""
        load_YL, slots_YRS = outlook.forecast.first // outlook.num_steps, after.by_rank
        weight_R = rank_weights(np.ones(after.num_ranks) if capacity is None else np.array(capacity))
        if self._chooses_by_batch:
            slots_YRS = np.stack(
                [
                    choose_copies(load_L, slots_RS, after.primaries_per_rank, weight_R, layer.min_tokens_per_copy)
                    for load_L, slots_RS, layer in zip(load_YL, slots_YRS, self._layers, strict=True)
                ]
            )
        return balancedness(level_tokens(load_YL, slots_YRS, 1.0 / weight_R))
