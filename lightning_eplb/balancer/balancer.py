"""The balancer: records the load, asks for a plan when one is due, and rearranges the experts."""

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Literal

import numpy as np
from torch import nn
from torch.optim import Optimizer

from lightning_eplb.balancer.checks import check_arguments, check_targets
from lightning_eplb.balancer.cost_model import CostModel
from lightning_eplb.balancer.models import find_models
from lightning_eplb.balancer.optimizers import expert_parameters, prepare_optimizers, updates_experts
from lightning_eplb.balancer.planner import PlanningContext, RearrangementPlan, RearrangementPlanner
from lightning_eplb.balancer.profile_run import ProfileRun
from lightning_eplb.balancer.resize import ResizableBalancer
from lightning_eplb.balancer.resumption import ResumableRun
from lightning_eplb.balancer.schedule import RearrangementState, Schedule
from lightning_eplb.balancer.step_stats import RearrangementResult, StepStats, collect_step_stats
from lightning_eplb.balancer.warm_start import Load, check_loads
from lightning_eplb.integrations.ddp import warn_if_out_of_sync
from lightning_eplb.parallel import dispatch_plan
from lightning_eplb.parallel.barrier import monitored_barrier
from lightning_eplb.parallel.parallelize import expert_layers
from lightning_eplb.placement import ExpertPlacement
from lightning_eplb.policies import BalancedPolicy, Costs, Policy
from lightning_eplb.relocation.mover import ExpertMover
from lightning_eplb.relocation.optimizer_check import check_state


class ExpertLoadBalancer(ResizableBalancer, ResumableRun):
    """Counts the tokens of every expert and moves experts between ranks so that all ranks get equal work.

    ``EPLBCallback`` drives it under Lightning. In another loop call :meth:`step` after every optimizer step. Every rank
    makes one with the same arguments, and calls its methods together with the others.

    Example::

        parallelize_experts(model, num_redundant_experts=8)
        leave_experts_out_of_ddp(model)
        model = DistributedDataParallel(model)
        optimizer = torch.optim.AdamW(model.parameters())
        balancer = ExpertLoadBalancer(model, [optimizer], step_interval=100)
        for batch in batches:
            model(batch).loss.backward()
            clip_grad_norm_(model, 1.0)  # lightning_eplb's: by the norm of all ranks' experts
            optimizer.step()
            balancer.step()
            optimizer.zero_grad()

    From then on ``model.state_dict()`` and ``optimizer.state_dict()`` are those of the unmodified model: all experts,
    in logical order. Every rank must call both, and may keep the result of one rank. ``load_state_dict()`` takes them
    on any number of ranks, before the first step or in the middle of a run. A resumed run loads model, optimizer and
    balancer, and calls :meth:`resume_placement`.

    With Lightning Fabric::

        model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters()))  # after leave_experts_out_of_ddp
        balancer = ExpertLoadBalancer(model, [optimizer])  # as fabric.setup returned them, for clip_gradients
        state = {"model": model, "optimizer": optimizer, "balancer": balancer}
        if resumes:
            fabric.load("last.ckpt", state)
            balancer.resume_placement()
        ...  # the same loop, with fabric.backward and fabric.clip_gradients
        fabric.save("last.ckpt", state)

    ``model`` may hold several models, and layers with different numbers of experts. Those of one model with one number
    have a placement and a window of their own, in :attr:`models`. All are rearranged together.

    Args:
        model: Model that ``parallelize_experts`` converted.
        optimizers: Optimizers that hold expert parameters; their state moves with the experts. :attr:`optimizers` can
            be set later.
        policy: Policy that chooses placements. ``None`` for ``BalancedPolicy()``.
        window_size: Optimizer steps whose load the policy looks at.
        step_interval: Optimizer steps between rearrangements. The first comes after a quarter of it, and one may come
            early if the load drifts, see :class:`~lightning_eplb.balancer.schedule.Schedule`.
        redundancy: When the redundant slots are filled. ``"window"``: with each rearrangement, by the policy.
            ``"batch"``: in each forward pass, for the tokens that it routes.
        min_tokens_per_copy: With ``"batch"``, tokens that a redundant expert must take over. ``None``: as many as take
            as long to compute as its weights and gradient to transfer, as measured in the first step; 1 until then.
        use_async: Overlap the transfer of rows with the training steps that follow, a few layers in each, see
            :class:`~lightning_eplb.relocation.async_transfer.AsyncTransfer`. Requires a call of
            :meth:`before_optimizer_step` before each optimizer step.

    Raises:
        ValueError: An argument is not valid, or ranks were given different ones; ``model`` has no converted layer; or
            an optimizer mixes experts, or its state for them can't move with them.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Iterable[Optimizer] = (),
        *,
        policy: Policy | None = None,
        window_size: int = 100,
        step_interval: int = 100,
        redundancy: Literal["window", "batch"] = "window",
        min_tokens_per_copy: int | None = None,
        use_async: bool = False,
    ) -> None:
        self._modules = list(expert_layers(model))
        check_arguments(self._modules, window_size, step_interval, redundancy, min_tokens_per_copy, use_async)
        self._overlaps = use_async and self.groups.size > 1
        self.model = model
        self.step_interval = step_interval
        self.min_tokens_per_copy = min_tokens_per_copy
        for layer, _ in self._modules:
            layer.set_redundancy(redundancy == "batch", min_tokens_per_copy or 1)
        super().__init__(find_models(model, window_size))
        models = self.placed_models
        policy = policy if policy is not None else BalancedPolicy()
        self._planner = RearrangementPlanner(policy, models, step_interval)
        self._mover = ExpertMover(models, (), use_async)
        self.optimizers = optimizers
        self._cost_model = CostModel(models, self._mover)
        self._schedule = Schedule(step_interval, len(models))
        self.capacity: tuple[float, ...] | None = None
        """Share of the work for each EP rank from the next plan on, in any unit, such as its speed. 0 drains a rank,
        ``None`` gives all ranks the same. Rank 0's counts."""
        self.costs: Costs | None = None
        """Costs that the policy is told instead of those measured in the first step. Rank 0's count."""
        self._state = RearrangementState.IDLE
        self._current: RearrangementPlan | None = None  # planned or in flight
        self._unreported: RearrangementResult | None = None  # finished in a step without tokens
        self._first_step_is_done = False
        self._has_warned = False
        self._profile: ProfileRun | None = None
        if use_async:  # rows in flight would overwrite weights that are loaded meanwhile
            cancel = weakref.WeakMethod(self.cancel_rearrangement)
            for each in models:
                first_module = each.modules[0].module
                first_module.register_load_state_dict_pre_hook(lambda *_: method() if (method := cancel()) else None)
        dispatch_plan.warm_up()
        self._planner.warm_up()
        self.record(True)

    @property
    def policy(self) -> Policy:
        """Policy that chooses placements."""
        return self._planner.policy

    @property
    def optimizers(self) -> list[Optimizer]:
        """Optimizers whose state moves with the experts, without Fabric's wrappers."""
        return self._mover.optimizers

    @optimizers.setter
    def optimizers(self, optimizers: Iterable[Optimizer]) -> None:
        self._mover.watch(prepare_optimizers(optimizers, self.model, self._modules, self._overlaps))

    def record(self, on: bool) -> None:
        """Start or stop counting the tokens of forward passes: those of validation are no training load."""
        for model in self.models.values():
            for layer, _ in model.modules:
                layer.set_load_recording(on)

    def step(self, *, with_gradients: bool = True, dummy: bool = False) -> StepStats | None:
        """End an optimizer step: add its load to the window, and rearrange if that is due. Every rank must call it.

        Micro-batches since the last call count as one step. A step in which no expert got a token does not count.

        Args:
            with_gradients: Move gradients with their experts. ``False`` saves time if gradients are zeroed before they
                are used again.
            dummy: End a step whose tokens are no load, such as a warm-up or padding, the same on all ranks. It is not
                counted: no window and no schedule sees it, and no rearrangement starts. Rows in flight travel on.

        Returns:
            Statistics of the step under the placement that it ran with; ``None`` for a dummy or one without tokens.

        Raises:
            ValueError: After the first step, on all ranks, if an optimizer's state can't move with the experts.
            ValueError, RuntimeError: If a rearrangement is due, as in :meth:`rearrange`.
        """
        with self._cost_model.between_steps():
            if not self._first_step_is_done and not dummy:
                self._finish_first_step()
            self._mover.cancel_prefetch()  # of a forward that was broken off: the weights are others now
            if self._profile is not None and not dummy and not self._state.is_in_flight:
                self._profile.run(with_gradients, self._cost_model.overlap_bytes())
                self._profile = None if self._profile.is_done else self._profile
            stats = collect_step_stats(list(self.models.values()), self.groups)
            self._mover.send_next()
            result = self._finish_if_committed() or self._unreported
            if dummy or not stats.has_tokens:
                self._unreported = result
                return None
            self._unreported = None
            is_ready = self._record_step(stats)
            if is_ready and result is None:
                plan = self._current or self._plan(None, with_gradients)
                result = self._rearrange(plan, with_gradients, overlap=self._overlaps)
            self.last_step = replace(stats, rearrangement=result)
            return self.last_step

    def profile(self) -> None:
        """Reserve memory in the first step, so that too little of it shows there. Every rank must call it, before.

        At the end of that step, when gradients and optimizer state exist, the largest exchanges are done once with
        dummy rows: all primaries to the next rank, and a dispatch of as many tokens as the first batch had, forward and
        backward, with all redundant slots filled and twice the mean's tokens on each rank in turn (1.5 times with two
        ranks). An out-of-memory error names what was tried. Nothing is counted, and no parameter, gradient, optimizer
        state, buffer or random generator changes. It has no effect if one rank holds all experts.
        """
        if self.groups.size > 1:
            self._profile = ProfileRun(self.placed_models, self._mover)

    def before_optimizer_step(self, optimizer: Optimizer | None = None) -> None:
        """Commit the rows in flight, or plan a rearrangement that is due. Every rank calls it right before a step.

        Has an effect only with ``use_async``. Rows that transferred since the last optimizer step are committed with
        their gradients. A rearrangement that is due is planned while the device still computes the backward pass.

        Args:
            optimizer: Optimizer that is about to step. Nothing is done if it holds no experts but another one does.
                ``None``: it holds experts.

        Raises:
            RuntimeError: Ranks have gradients for different parameters. All raise it, and nothing was committed.
            ValueError: As in :meth:`step`, if the policy raises one.
        """
        if not self._overlaps or (
            optimizer is not None and not updates_experts(optimizer, self.optimizers, self._modules)
        ):
            return
        if self._state.is_in_flight:
            self._mover.commit()
        elif self._state is RearrangementState.DUE:
            self._current = self._plan(None, with_gradients=False)
            self._state = RearrangementState.PLANNED

    def finish_rearrangement(self) -> RearrangementResult | None:
        """Commit in-flight transfers and stop the rearrangement. Every rank must call it, after an optimizer step.

        Call it at the end of training. :meth:`rearrange` does it, too.

        Returns:
            Result of the part that was done; ``None`` if nothing was in flight.
        """
        if not self._state.is_in_flight:
            return None
        self._mover.stop()
        return self._finish_if_committed()

    def cancel_rearrangement(self) -> None:
        """Cancel the planned or in-flight rearrangement. Experts whose rows are in flight stay on their ranks.

        Call it before weights change outside of optimizer steps. Performs no communication: it is safe after a failure.
        """
        self._mover.cancel()
        self._current = None
        self._state = self._state.without_plan()

    abandon_rearrangement = cancel_rearrangement  # the earlier name

    def rearrange(
        self,
        placement: ExpertPlacement | Mapping[str, ExpertPlacement] | None = None,
        *,
        load: Load | None = None,
        with_gradients: bool = True,
    ) -> RearrangementResult | None:
        """Move experts with their optimizer state between two optimizer steps. Every rank must call it.

        Rank 0 asks the policy and broadcasts its plan. All ranks verify that they agree before the first row moves.

        Args:
            placement: Placement to rearrange to, the same on all ranks; ``None`` on all ranks to ask the policy. Of
                several models a mapping from names in :attr:`models` to placements; models that it leaves out stay.
            load: Load to plan by instead of the windows', such as a trace's: counts of tokens ``[layers, experts]``, or
                ``[steps, layers, experts]``, of which the latest ``window_size`` steps count. Of several models a
                mapping from names to loads. The same on all ranks. It is for this plan only: no window keeps it, and
                measured costs do not count. ``None`` for the windows' load.
            with_gradients: Move gradients with their experts, see :meth:`step`.

        Returns:
            Result of the rearrangement; ``None`` if one rank holds all experts, so that nothing can move.

        Raises:
            ValueError: The placements or loads of the ranks differ, or the given or planned one does not have the shape
                of the current one, or a load holds no counts of tokens, or the policy raised it. All ranks raise it,
                and nothing was moved.
            RuntimeError: Ranks would move different rows, or some did not call this within ten minutes; a warning names
                them after ten seconds. All ranks raise it, and nothing was moved. If the policy raises anything else,
                rank 0 raises that, and the others a ``RuntimeError``.
        """
        if self.groups.size == 1:
            return None
        current = {model.name: model.placement for model in self.placed_models}
        targets = check_targets(placement, current, self.groups)
        loads = check_loads(load, self.placed_models, self.groups)
        if targets is not None and loads is not None:
            raise ValueError("rearrange() was given a placement and a load to plan one by. Give one of them.")
        self.finish_rearrangement()
        plan = self._plan(targets, with_gradients, loads)
        return self._rearrange(plan, with_gradients, overlap=False)

    def reset(self) -> None:
        """Move experts back to the initial placement. Every rank must call it."""
        initial = {}
        for model in self.placed_models:
            now = model.placement
            sizes = (now.num_layers, now.num_logical_experts, now.num_ranks, now.num_redundant_experts)
            initial[model.name] = ExpertPlacement.initial(*sizes)
        self.rearrange(initial)

    def _record_step(self, stats: StepStats) -> bool:
        """Add a step to the windows and return whether a rearrangement is to start now."""
        parts = stats.models
        for name, model in self.models.items():
            model.record(parts[name].load)
        self.num_steps += 1
        is_ready = self._state in (RearrangementState.DUE, RearrangementState.PLANNED)
        placed = [parts[model.name] for model in self.placed_models]
        levels = [part.balancedness if part.has_tokens else None for part in placed]
        if self._schedule.step(*levels) and self.groups.size > 1:
            self._state = self._state.when_due()
            is_ready = is_ready or not self._overlaps  # with overlap it is planned during the next backward pass
        return is_ready

    def _plan(
        self,
        targets: Mapping[str, ExpertPlacement] | None,
        with_gradients: bool,
        loads: Mapping[str, np.ndarray] | None = None,
    ) -> RearrangementPlan:
        """Return the policy's plan, or one that leads to ``targets``, on every rank. ``loads`` replace the windows'."""
        monitored_barrier(self.groups, "step() has a decision to make for all ranks")
        if not self._overlaps:  # otherwise the host would wait for the device, which computes a backward pass
            self._warn_of_drift()
        costs = self._cost_model.costs(with_gradients)
        if loads is not None:  # sums over any number of steps, which can't be compared with seconds
            costs = [None] * len(costs)
        if self.costs is not None:
            costs = [self.costs] * len(costs)
        num_steps = [self._schedule.look_back(each.load.num_steps, i) for i, each in enumerate(self.placed_models)]
        context = PlanningContext(num_steps, self.capacity, costs, self._cost_model.overlap_bytes())
        return self._planner.plan(context, targets, loads)

    def _rearrange(self, plan: RearrangementPlan, with_gradients: bool, overlap: bool) -> RearrangementResult | None:
        """Carry out a plan and return its result, or with ``overlap`` start it and return ``None``."""
        self._state, self._current = RearrangementState.IDLE, None
        if overlap:
            self._mover.start(plan.after, plan.capacity, plan.overlap_bytes)
        else:
            self._mover.move(plan.after, plan.capacity, with_gradients)
        self._state, self._current = RearrangementState.IN_FLIGHT, plan
        return self._finish_if_committed()

    def _finish_if_committed(self) -> RearrangementResult | None:
        """Return the result of the rearrangement in flight once all its rows are committed."""
        plan = self._current
        if plan is None or not self._state.is_in_flight or self._mover.is_in_flight:
            return None
        self._state, self._current = self._state.without_plan(), None
        result = plan.result(self._mover.placements, self._mover.num_bytes, self._mover.seconds)
        self._add(result)
        for name, change in result.models.items():
            self.models[name].predicted_balancedness = change.predicted_balancedness
        return result

    def _finish_first_step(self) -> None:
        """Check what only exists after a step, and measure the hardware."""
        self._first_step_is_done = True
        if self.groups.size == 1:
            return
        check_state(self.optimizers, expert_parameters(self._modules))
        self._cost_model.measure()
        for model, measured in zip(self.placed_models, self._cost_model.min_tokens_per_copy(), strict=True):
            for layer, _ in model.modules:
                layer.set_redundancy(layer.chooses_by_batch, self.min_tokens_per_copy or measured)
        self._warn_of_drift()

    def _warn_of_drift(self) -> None:
        ddp = next((layer.ddp for layer, _ in self._modules if layer.ddp is not None), None)
        if ddp is not None and not self._has_warned:
            self._has_warned = warn_if_out_of_sync(ddp, self.groups)

    def seconds_saved(self, step: StepStats) -> float | None:
        """Estimate the seconds saved, see :meth:`~lightning_eplb.balancer.cost_model.CostModel.seconds_saved`."""
        return self._cost_model.seconds_saved(step)
