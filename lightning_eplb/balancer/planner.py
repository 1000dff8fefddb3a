"""The planner: asks the policy on rank 0 and broadcasts its plan, with a forecast of what the plan will achieve."""

import functools
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_info

from lightning_eplb._compiled import is_on_disk
from lightning_eplb.balancer.models import ModelLayers
from lightning_eplb.balancer.step_stats import PlacementChange, RearrangementOfModels, RearrangementResult
from lightning_eplb.functional import balancedness, rank_tokens
from lightning_eplb.parallel.consensus import check_models, check_successor, decide_on_rank_zero
from lightning_eplb.placement import ExpertPlacement
from lightning_eplb.policies import BalancedPolicy, Costs, Outlook, Policy, Topology
from lightning_eplb.policies.balanced import plan_layer
from lightning_eplb.policies.base import check_groups
from lightning_eplb.policies.batch_redundancy import choose_copies
from lightning_eplb.policies.token_split import level_tokens


class ModelPlan(NamedTuple):
    """Planned change of a model's placement.

    Attributes:
        name: Name of the model.
        before: Placement that the plan starts from.
        after: Placement that it leads to.
        load: Load of the window, ``[Y, L]`` int64.
        predicted_balancedness: Balancedness of the steps that follow, according to the forecast; ``None`` without one.
    """

    name: str
    before: ExpertPlacement
    after: ExpertPlacement
    load: np.ndarray
    predicted_balancedness: float | None

    def reached(self, after: ExpertPlacement) -> dict[str, Any]:
        """Return the fields of a :class:`PlacementChange` to ``after``."""
        return self._asdict() | {"after": after}


class RearrangementPlan(NamedTuple):
    """Planned rearrangement, the same on all ranks but for ``seconds``.

    Attributes:
        models: Planned change of each model's placement.
        capacity: Share of the work that each EP rank gets from then on; ``None``: equal shares.
        overlap_bytes: Bytes that a rank may send or receive during one step if the transfer overlaps training.
        predicted_balancedness: Balancedness of the steps that follow, according to the forecast; ``None`` without one.
        seconds: Time until this rank knew the plan.
    """

    models: tuple[ModelPlan, ...]
    capacity: tuple[float, ...] | None
    overlap_bytes: int
    predicted_balancedness: float | None
    seconds: float

    @property
    def after(self) -> list[ExpertPlacement]:
        """Placements that the plan leads to."""
        return [model.after for model in self.models]

    def result(self, after: Sequence[ExpertPlacement], num_bytes: int, seconds: float) -> RearrangementResult:
        """Return the result of the plan.

        Args:
            after: Placements that were reached; others than the plan's if the rearrangement was stopped.
            num_bytes: Bytes that crossed ranks, over all ranks.
            seconds: Time that training waited for the transfer on this rank.
        """
        totals: dict[str, Any] = {
            "num_bytes": num_bytes,
            "seconds": self.seconds + seconds,
            "plan_seconds": self.seconds,
            "exchange_seconds": seconds,
        }
        reached = [model.reached(placement) for model, placement in zip(self.models, after, strict=True)]
        if len(reached) == 1:
            return RearrangementResult(**reached[0], **totals)
        changes = tuple(PlacementChange(**fields) for fields in reached)
        return RearrangementOfModels(**totals, changes=changes, predicted_balancedness=self.predicted_balancedness)


class PlanningContext(NamedTuple):
    """Inputs of a plan beside the load. Those of rank 0 count.

    Attributes:
        num_steps: Steps of each model's window, counted from its end, that the policy looks at.
        capacity: Share of the work that each EP rank should get; ``None``: equal shares.
        costs: Costs of moves and redundant experts of each model; ``None`` if unknown.
        overlap_bytes: Bytes that a rank can send or receive during one step.
    """

    num_steps: Sequence[int]
    capacity: tuple[float, ...] | None
    costs: Sequence[Costs | None]
    overlap_bytes: int


class RearrangementPlanner:
    """Plans rearrangements of all models together. All ranks use it alike.

    Args:
        policy: Policy that chooses placements.
        models: Layers of the models, on the same process groups.
        step_interval: Optimizer steps that a plan is made for.
    """

    def __init__(self, policy: Policy, models: Sequence[ModelLayers], step_interval: int) -> None:
        self.policy = policy
        self._models = models
        self._groups = models[0].groups
        self._chooses_by_batch = models[0].modules[0].layer.chooses_by_batch
        self._step_interval = step_interval
        self._compilation: threading.Thread | None = None

    def warm_up(self) -> None:
        """Compile what every step needs, and start to compile what the first plan needs. Every rank calls it.

        The loops of :class:`~lightning_eplb.policies.BalancedPolicy` take a processor about 20 seconds the first time.
        Rank 0, which plans, compiles them in a thread behind the first steps.
        """
        placements = [model.placement for model in self._models]
        if self._chooses_by_batch:
            choose_copies(np.ones(2, dtype=np.int64), np.array([[0, -1], [1, -1]]), 1, np.ones(2), 1)
        for placement in placements:
            load_YL = np.ones((placement.num_layers, placement.num_logical_experts), dtype=np.int64)
            rank_tokens(load_YL, placement)
            balancedness(level_tokens(load_YL, placement.by_rank))
        if self._groups.size == 1:
            return
        if not isinstance(self.policy, BalancedPolicy):
            for placement in placements:
                self.policy.warm_up(placement)
            return
        for placement in placements:
            check_groups(self.policy.num_groups, placement)
        if dist.get_rank() > 0:
            return
        if is_on_disk(plan_layer):
            self.policy.warm_up(placements[0])
            return
        rank_zero_info("compiling the planner behind the first steps; a decision that comes before waits for it")
        compile_plan = functools.partial(self.policy.warm_up, placements[0])
        self._compilation = threading.Thread(target=compile_plan, name="compile the planner")
        self._compilation.start()

    def plan(
        self,
        context: PlanningContext,
        targets: Mapping[str, ExpertPlacement] | None = None,
        loads: Mapping[str, np.ndarray] | None = None,
    ) -> RearrangementPlan:
        """Ask the policy on rank 0 and return its plan on every rank. Every rank of the default group must call it.

        Args:
            context: Further inputs on this rank.
            targets: Placements to plan for instead of the policy's, by model. Other models stay as they are. ``None``
                to ask the policy.
            loads: Loads to plan by instead of the windows', int64 ``[W, Y, L]`` by model. No forecast is kept.

        Raises:
            ValueError: On every rank, if the policy raised one or returned no placement of the same shape.
            RuntimeError: On the other ranks, if the policy raised anything else, which rank 0 raises itself.
        """
        start = time.perf_counter()
        before = {model.name: model.placement for model in self._models}
        windows = [model.load.steps().cpu().numpy() if loads is None else loads[model.name] for model in self._models]
        for model in self._models:
            model.measure_forecast()
        outlooks: dict[str, Outlook] | None = None
        if targets is None:
            outlooks = {
                model.name: model.look_ahead(steps_WYL[-num_steps:], self._step_interval, costs)
                for model, steps_WYL, num_steps, costs in zip(
                    self._models, windows, context.num_steps, context.costs, strict=True
                )
            }

        def plan_on_rank_zero() -> tuple[list[np.ndarray], tuple[float, ...] | None, int]:
            if self._compilation is not None:
                self._compilation.join()
                self._compilation = None
            topology = Topology(self._groups.node_of_rank, context.capacity)
            if outlooks is None:
                chosen = {**before, **(targets or {})}
            else:
                chosen = check_models(self.policy.rearrange_models(outlooks, before, topology), before)
            slots = []
            for name, placement in before.items():
                after = check_successor(chosen[name], placement)
                if self._chooses_by_batch:
                    after = after.without_copies()  # redundant experts are chosen for each batch
                slots.append(after.physical_to_logical)
            return slots, topology.capacity, context.overlap_bytes

        source = "rearrange()" if outlooks is None else f"{type(self.policy).__name__}.rearrange()"
        slots, capacity, overlap_bytes = decide_on_rank_zero(plan_on_rank_zero, source, self._groups)
        plans, tokens = [], []
        for model, steps_WYL, slots_YP in zip(self._models, windows, slots, strict=True):
            after = ExpertPlacement(slots_YP, model.placement.num_logical_experts, model.placement.num_ranks)
            predicted = None
            if outlooks is not None:
                tokens.append(model.predict(outlooks[model.name], after, capacity))
                predicted = balancedness(tokens[-1])
            plans.append(ModelPlan(model.name, model.placement, after, steps_WYL.sum(axis=0), predicted))
            if loads is not None:
                model.forget_forecast()
        total = balancedness(np.concatenate(tokens)) if tokens else None
        return RearrangementPlan(tuple(plans), capacity, overlap_bytes, total, time.perf_counter() - start)
