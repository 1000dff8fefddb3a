"""Record the load, decide, rearrange: load balancing for any training loop, without Lightning."""

import hashlib
import time
import weakref
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_eplb._validation import check_redundancy, check_steps, check_switches
from lightning_eplb.balancer.pace import Pace
from lightning_eplb.balancer.planner import Decision, DecisionMaker, Surroundings, extent
from lightning_eplb.balancer.schedule import Schedule
from lightning_eplb.balancer.served import take_load
from lightning_eplb.balancer.steps import Rearrangement, StepLoad
from lightning_eplb.checkpoint import install_optimizer_hooks
from lightning_eplb.functional import balancedness
from lightning_eplb.integrations.ddp import warn_if_out_of_sync
from lightning_eplb.integrations.fabric import clip_fabric_by_global_norm, optimizer_within
from lightning_eplb.metrics import ExpertLoad
from lightning_eplb.parallel import dispatch
from lightning_eplb.parallel.consensus import check_same_on_all_ranks
from lightning_eplb.parallel.convert import expert_layers
from lightning_eplb.parallel.experts import ExpertLayer
from lightning_eplb.parallel.waiting import wait_for_all_ranks
from lightning_eplb.placement import ExpertPlacement
from lightning_eplb.policies import BalancedPolicy, Costs, Policy
from lightning_eplb.policies.split import level_tokens
from lightning_eplb.relocation.mover import ExpertMover
from lightning_eplb.relocation.optimizer_check import check_optimizers, check_state


class ExpertLoadBalancer:
    """Counts the tokens of every expert and moves experts between ranks so that the ranks get equal work.

    ``EPLBCallback`` drives it under Lightning. In another loop call :meth:`step` after every optimizer step. Every rank
    makes it, with the same arguments, and calls its methods together with the others.

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

    From then on ``optimizer.state_dict()`` is that of the unmodified model, as ``model.state_dict()`` is: all experts,
    in logical order. Every rank must call both, and may keep the result of one rank. ``load_state_dict()`` takes them,
    on any number of ranks, before the first step or in the middle of a run. A run that goes on loads model, optimizer
    and balancer; the placement is not saved, and :meth:`rearrange` levels the ranks by the window that was.

    With Lightning Fabric::

        fabric = Fabric(strategy="ddp", devices=8)
        fabric.launch()
        parallelize_experts(model, num_redundant_experts=8)
        leave_experts_out_of_ddp(model)
        model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters()))
        balancer = ExpertLoadBalancer(model, [optimizer])  # what fabric.setup returned: then clip_gradients is right
        state = {"model": model, "optimizer": optimizer, "balancer": balancer}
        if resumes:
            fabric.load("last.ckpt", state)
            balancer.rearrange()
        for batch in batches:
            fabric.backward(model(batch).loss)
            fabric.clip_gradients(model, optimizer, max_norm=1.0)
            optimizer.step()
            balancer.step()
            optimizer.zero_grad()
        fabric.save("last.ckpt", state)

    Args:
        model: Converted by ``parallelize_experts``.
        optimizers: Those that hold expert parameters: their state moves with the experts. :attr:`optimizers` can be set
            later.
        policy: Decides where experts go; ``None`` for ``BalancedPolicy()``.
        window_size: Optimizer steps that the decision looks back on.
        step_interval: Optimizer steps between rearrangements; the first comes after a quarter of it, and one may come
            early when the load drifts away, see :class:`~lightning_eplb.balancer.schedule.Schedule`.
        redundancy: When the redundant slots are filled: ``"window"`` with each rearrangement, by the policy;
            ``"batch"`` in each forward, for the very tokens that it routes.
        min_tokens_per_copy: With ``"batch"``, tokens that a copy must take over. ``None``: as many as take as long to
            compute as its weights and its gradient to travel, as measured in the first step; 1 until then.
        use_async: Rows move behind the steps that follow a decision, a few layers in each, see
            :class:`~lightning_eplb.relocation.background.BackgroundRelocation`. Then call
            :meth:`before_optimizer_step`, too.

    Raises:
        ValueError: A number is below 1, ``redundancy`` is neither, or ``model`` has no converted layer; an optimizer
            mixes experts, or has state for them that can't move with them; or ranks were given different numbers. All
            ranks raise the last.

    Note:
        With ranks of unequal speed, set :attr:`capacity`. What moves cost is measured in the first step; set
        :attr:`costs` before to use other numbers.
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
        check_steps(window_size=window_size, step_interval=step_interval)
        check_redundancy(redundancy, min_tokens_per_copy)
        check_switches(use_async=use_async)
        self._modules = list(expert_layers(model))
        if not self._modules:
            raise ValueError("model has no converted MoE layer; call parallelize_experts(model) before")
        _warn_of_idle_arguments(redundancy, min_tokens_per_copy, self._modules[0][0])
        first_layer, first_module = self._modules[0]
        self.groups = first_layer.groups
        arguments = {
            "window_size": window_size,
            "step_interval": step_interval,
            "redundancy": redundancy,
            "min_tokens_per_copy": min_tokens_per_copy,
            "use_async": use_async,
        }
        check_same_on_all_ranks(arguments, "ExpertLoadBalancer() compares its arguments", self.groups)
        self._use_async = use_async
        self.model = model
        self.step_interval = step_interval
        self.min_tokens_per_copy = min_tokens_per_copy
        self._copies_by_batch = redundancy == "batch"
        for layer, _ in self._modules:
            layer.copies_by_batch = self._copies_by_batch
            layer.min_tokens_per_copy = min_tokens_per_copy or 1
        self._maker = DecisionMaker(
            policy if policy is not None else BalancedPolicy(), [layer for layer, _ in self._modules], step_interval
        )
        self._mover = ExpertMover(self._modules, (), use_async)
        self.optimizers = optimizers
        self._pace = Pace(self._modules, self._mover)
        if self._copies_by_batch:
            self._mover.placement = self._mover.placement.without_copies()
        self.load = ExpertLoad(
            len(self._modules),
            first_layer.num_logical_experts,
            window_size,
            self.placement if self.groups.size > 1 else None,
            sync_on_compute=False,  # every rank is given the sum over all
        )
        self.num_steps = 0
        """Optimizer steps in which the experts got a token."""
        self.num_rearrangements = 0
        """Decisions that changed the placement."""
        self.rearranged_rows = 0
        """Primaries that changed ranks in all rearrangements, in one EP group."""
        self.rearrange_seconds = 0.0
        """What all decisions took on this rank, those that moved nothing included."""
        self.rearranged_bytes = 0
        """Bytes that crossed ranks in all rearrangements, over all ranks."""
        self.last_rearrangement: Rearrangement | None = None
        """The latest that changed the placement."""
        self.last_step: StepLoad | None = None
        """The latest optimizer step in which the experts got a token."""
        self.capacity: tuple[float, ...] | None = None
        """How much work each EP rank should get from the next decision on, in any unit; rank 0 reads it. 0 for a rank
        that is to be drained. ``None``: all the same."""
        self.costs: Costs | None = None
        """What the policy is told that moves cost; rank 0 reads it. ``None``: what was measured in the first step."""
        self.predicted_balancedness: float | None = None
        """What the latest decision expects of the steps that follow it; ``None`` before the first."""
        self._under_way: Rearrangement | None = None
        self._untold: Rearrangement | None = None
        self._is_due = False
        self._decision: Decision | None = None
        self._schedule = Schedule(step_interval)
        self._first_step_is_done = False
        self._has_warned = False
        if use_async:  # rows in flight would overwrite weights that were loaded meanwhile
            abandon = weakref.WeakMethod(self.abandon_rearrangement)
            first_module.register_load_state_dict_pre_hook(lambda *_: method() if (method := abandon()) else None)
        dispatch.warm_up()
        self._maker.warm_up(self.placement)
        self.record(True)

    @property
    def placement(self) -> ExpertPlacement:
        """Where experts are."""
        return self._mover.placement

    @property
    def policy(self) -> Policy:
        """Who decides where experts go."""
        return self._maker.policy

    @property
    def forecast_error(self) -> float | None:
        """How far off the forecast of the last whole interval was; 0 is exact."""
        return self._maker.forecast_error

    @property
    def optimizers(self) -> list[Optimizer]:
        """Those whose state moves with the experts, and whose state dicts are the unmodified model's; without Fabric's
        wrappers."""
        return self._mover.optimizers

    @optimizers.setter
    def optimizers(self, optimizers: Iterable[Optimizer]) -> None:
        given = list(optimizers)
        watched = self._checked(optimizer_within(optimizer) for optimizer in given)
        clip_fabric_by_global_norm([self.model, *given])
        for optimizer in watched:
            install_optimizer_hooks(optimizer, self.model)
        self._mover.watch(watched)

    def record(self, on: bool) -> None:
        """Count the tokens of the forward passes from now on, or don't: those of validation are no training load."""
        for layer, _ in self._modules:
            layer.records_load = on

    def step(self, *, with_gradients: bool = True) -> StepLoad | None:
        """Close an optimizer step: add its load to the window, and rearrange when it is time. Every rank must call it.

        Micro-batches since the last call count as one step. A step in which no expert got a token is none.

        Args:
            with_gradients: Gradients move with their experts, should a rearrangement be due. ``False`` saves that
                where they are zeroed before they are used again.

        Returns:
            The step's load on the placement that served it; ``None`` for a step without a token.

        Raises:
            ValueError: After the first step, if an optimizer's state can't move with experts; or whenever the policy
                raises one or returns what is not a placement. All ranks raise it, and nothing was moved.
            RuntimeError: A decision is due and some ranks did not come within ten minutes, of which a warning tells
                after ten seconds; or on the other ranks, where the policy raised anything else, which rank 0 raises
                itself.
        """
        with self._pace.between_steps():
            return self._close_step(with_gradients)

    def _close_step(self, with_gradients: bool) -> StepLoad | None:
        if not self._first_step_is_done and self.groups.size > 1:
            check_state(self.optimizers, self._named_parameters())
            self._pace.measure()
            if self.min_tokens_per_copy is None:
                floor = self._pace.tokens_worth_a_copy()
                for layer, _ in self._modules:
                    layer.min_tokens_per_copy = floor
            self._warn_of_drift()
        self._first_step_is_done = True
        self._modules[0][0].ahead.discard()  # of a forward that was broken off: the weights are others now
        served = take_load([layer for layer, _ in self._modules], self.groups)
        self._mover.go_on()
        done = self._close_rearrangement() or self._untold
        self._untold = done if not served.load.any() else None
        if not served.load.any():
            return None
        self.load.update(served.load)
        self.num_steps += 1
        self._maker.note(served.load)
        was_due = self._is_due
        self._is_due |= self._schedule.step(served.balancedness) and self.groups.size > 1
        waits_for_decision = self._mover.goes_behind and not was_due  # made before the next step, behind the backward
        if self._is_due and not waits_for_decision and self._under_way is None and done is None:
            decision = self._decision or self._decide(None, with_gradients)
            done = self._carry_out(decision, with_gradients, self._mover.goes_behind)
        self.last_step = replace(served, rearrangement=done)
        return self.last_step

    def before_optimizer_step(self, optimizer: Optimizer | None = None) -> None:
        """Put in place what moved behind this step, or decide. Every rank must call it, right before the step.

        Only with ``use_async`` there is something to do: gradients move, those of the experts that arrive; or, when it
        is time, what moves from this step on is decided while the device is still busy with the backward pass.

        Args:
            optimizer: That is about to step; nothing happens before the step of one that holds no experts where
                another does. ``None``: it holds some.

        Raises:
            RuntimeError: Ranks have gradients for other parameters. All raise it, and nothing was put in place.
            ValueError: The policy raises one, see :meth:`step`.
        """
        if not self._mover.goes_behind or (optimizer is not None and not self._is_awaited(optimizer)):
            return
        if self._mover.is_moving:
            self._mover.put_in_place()
            self.load.placement = self.placement
        elif self._is_due and self._decision is None:
            self._decision = self._decide(None, with_gradients=False)

    def finish_rearrangement(self) -> Rearrangement | None:
        """Put in place what is under way, and leave it at that. Every rank must call it, after an optimizer step.

        At the end of training; a rearrangement that was told does it, too.

        Returns:
            What was done of the rearrangement that was under way; ``None`` if none was.
        """
        if not self._mover.is_moving:
            return None
        self._mover.stop()
        self.load.placement = self.placement
        assert self._under_way is not None
        self._under_way = replace(self._under_way, **extent(self._under_way.before, self.placement))
        return self._close_rearrangement()

    def abandon_rearrangement(self) -> None:
        """Forget what is under way: experts stay where they are. Before weights change otherwise than by a step.

        It communicates with nobody, so that it will do after a failure, too.
        """
        self._mover.abandon()
        self._under_way, self._decision = None, None

    def rearrange(
        self, placement: ExpertPlacement | None = None, *, with_gradients: bool = True
    ) -> Rearrangement | None:
        """Move experts, with their optimizer state, between two optimizer steps. Every rank must call it.

        Rank 0 asks the policy and tells the others. Before the first row moves, all ranks compare what they are about
        to do.

        Args:
            placement: Go there, the same on all ranks; ``None`` on all ranks to ask the policy.
            with_gradients: As in :meth:`step`.

        Returns:
            What was done; ``None`` where one rank holds all experts and there is nothing to move.

        Raises:
            ValueError: Ranks were given different placements, or some of them none; or what was given, or the policy
                returned, is not a placement of the same shape; or the policy raised it.
            RuntimeError: Ranks disagree about what is to be moved; some did not come within ten minutes, of which a
                warning tells after ten seconds; or on the other ranks, where the policy raised anything else, which
                rank 0 raises itself. In each case all ranks raise, and nothing was moved.
        """
        if self.groups.size == 1:
            return None
        what = "rearrange() moves experts between ranks"
        check_same_on_all_ranks({"placement": _in_words(placement)}, what, self.groups)
        if placement is not None:
            self._maker.agree(self.placement, placement, None, self._surroundings(with_gradients))  # or raise
        self.finish_rearrangement()
        return self._carry_out(self._decide(placement, with_gradients), with_gradients, in_background=False)

    def _decide(self, placement: ExpertPlacement | None, with_gradients: bool) -> Decision:
        """What the policy decides, or to go to ``placement``."""
        wait_for_all_ranks(self.groups, "step() has a decision to make for all ranks")
        if not self._mover.goes_behind:  # or the host would wait for the device, which has a backward pass to do
            self._warn_of_drift()
        begun_at = time.perf_counter()
        steps_WYL = self.load.steps().cpu().numpy()
        load_YL = steps_WYL.sum(axis=0)
        steps_WYL = steps_WYL[-self._schedule.look_back(len(steps_WYL)) :]
        if not len(steps_WYL):
            steps_WYL = np.zeros_like(self.load.ring[:1].cpu().numpy())
        surroundings = self._surroundings(with_gradients)
        return self._maker.decide(self.placement, placement, steps_WYL, load_YL, surroundings, begun_at)

    def _carry_out(self, decision: Decision, with_gradients: bool, in_background: bool) -> Rearrangement | None:
        """Do what is decided, or begin with it and return ``None``."""
        self._is_due, self._decision = False, None
        if in_background:
            self._mover.begin(decision.rearrangement.after, decision.capacity, decision.most_bytes)
        else:
            self._mover.move(decision.rearrangement.after, decision.capacity, with_gradients)
        self.load.placement = self.placement
        self._under_way = decision.rearrangement
        return self._close_rearrangement()

    def _close_rearrangement(self) -> Rearrangement | None:
        """What was done, once all experts have arrived."""
        if self._under_way is None or self._mover.is_moving:
            return None
        done = replace(
            self._under_way,
            num_bytes=self._mover.num_bytes,
            exchange_seconds=self._mover.seconds,
            seconds=self._under_way.plan_seconds + self._mover.seconds,
        )
        self._under_way = None
        self.predicted_balancedness = done.predicted_balancedness
        self.rearrange_seconds += done.seconds
        if done.before != done.after:
            self.num_rearrangements += 1
            self.rearranged_rows += done.num_rows
            self.rearranged_bytes += done.num_bytes
            self.last_rearrangement = done
        return done

    def reset(self) -> None:
        """Move experts back to the placement that training starts from. Every rank must call it."""
        num_redundant = self.placement.physical_to_logical.shape[1] - self.placement.num_logical_experts
        self.rearrange(
            ExpertPlacement.initial(
                self.placement.num_layers, self.placement.num_logical_experts, self.placement.num_ranks, num_redundant
            )
        )

    def window_balancedness(self) -> float:
        """Of the window's load, had the present placement served it at once; 1 before the first step."""
        if not self.load.num_steps:
            return 1.0
        values = self.load.compute()
        if self.groups.size == 1:
            return float(values["balancedness"])
        return balancedness(level_tokens(values["load"].cpu().numpy(), self.placement.by_rank))

    def seconds_saved(self, step: StepLoad) -> float | None:
        """Estimate of what the experts' part of a step took less than under plain expert parallelism.

        Plain is: the experts where training starts with them, without copies. The estimate is the tokens that the
        fullest ranks served less, times the seconds that a token takes as measured in the first step, which is rounded
        to a power of two. It is too low where gradients are accumulated or there are several EP groups, as the plain
        ranks are looked at over all of these together.

        Returns:
            Seconds, below zero where plain were better; ``None`` where one rank holds all experts, or before the first
            step.
        """
        if self._pace.speed is None:
            return None
        per_group_YR = step.load.view(len(step.load), self.groups.size, -1).sum(dim=2)
        plain = float(per_group_YR.max(dim=1).values.sum())
        return (plain - step.max_tokens) / self.groups.num_replicas * self._pace.speed.seconds_per_token

    def state_dict(self) -> dict[str, Any]:
        """Window and counters, as tensors and numbers, the same on every rank.

        The placement is there to be looked at: a resumed run plans its own, by the window.
        """
        return {
            "window": self.load.steps().cpu(),
            "num_steps": self.num_steps,
            "steps_to_go": self._schedule.steps_to_go,
            "num_rearrangements": self.num_rearrangements,
            "rearranged_rows": self.rearranged_rows,
            "rearranged_bytes": self.rearranged_bytes,
            "is_rearranging": self._mover.is_moving or self._is_due,
            "num_ranks": self.groups.size,
            "physical_to_logical": torch.from_numpy(self.placement.physical_to_logical.astype(np.int32)),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over window and counters, also into a window of another size. Every rank must call it.

        Experts stay where they are: :meth:`rearrange` levels the ranks by the window. What is in flight with
        ``use_async`` is abandoned.

        Args:
            state: From :meth:`state_dict`, on any number of ranks; the same on all.

        Raises:
            ValueError: The saved window has other layers or experts, or ranks were given different states. All ranks
                raise it, and nothing was taken over.
        """
        window_WYL = state["window"]
        numbers = {key: state[key] for key in ("num_steps", "steps_to_go", "num_rearrangements")}
        digest = hashlib.sha256(window_WYL.cpu().numpy().tobytes()).hexdigest()[:16]
        what = "load_state_dict() of the balancer compares what ranks were given"
        check_same_on_all_ranks(numbers | {"window": f"{list(window_WYL.shape)} {digest}"}, what, self.groups)
        if tuple(window_WYL.shape[1:]) != tuple(self.load.ring.shape[1:]):
            raise ValueError(
                f"the saved window has {list(window_WYL.shape[1:])} layers and experts, the model has"
                f" {list(self.load.ring.shape[1:])}; resume with the model that was saved"
            )
        self.abandon_rearrangement()
        self.load.reset()
        for load_YL in window_WYL:
            self.load.update(load_YL)
        self.num_steps = state["num_steps"]
        self.num_rearrangements = state["num_rearrangements"]
        self.rearranged_rows = state.get("rearranged_rows", 0)  # earlier versions did not save it
        self.rearranged_bytes = state["rearranged_bytes"]
        self._schedule.steps_to_go = min(state["steps_to_go"], self.step_interval)
        self._is_due, self._decision = False, None

    def _warn_of_drift(self) -> None:
        ddp = self._modules[0][0].ddp
        if ddp is not None and not self._has_warned:
            self._has_warned = warn_if_out_of_sync(ddp, self.groups)

    def _is_awaited(self, optimizer: Optimizer) -> bool:
        """Whether rows arrive before its step: experts change in it, or, all of them frozen, in no step."""
        return self._holds_experts(optimizer) or not any(self._holds_experts(each) for each in self.optimizers)

    def _holds_experts(self, optimizer: Optimizer) -> bool:
        experts = {id(parameter) for parameter in self._named_parameters().values()}
        return any(id(parameter) in experts for group in optimizer.param_groups for parameter in group["params"])

    def _checked(self, optimizers: Iterable[Optimizer]) -> list[Optimizer]:
        """These, or a ``ValueError`` on all ranks, see :func:`check_optimizers`."""
        optimizers = list(optimizers)
        if self._modules[0][0].groups.size > 1:
            check_optimizers(optimizers, self._named_parameters(), self._use_async)
        return optimizers

    def _named_parameters(self) -> dict[str, Tensor]:
        return {
            f"{layer.name}.{name}": parameter
            for layer, module in self._modules
            for name, parameter in module.named_parameters(recurse=False)
        }

    def _surroundings(self, with_gradients: bool) -> Surroundings:
        costs = self.costs if self.costs is not None else self._pace.costs(with_gradients)
        return Surroundings(self.capacity, costs, self._pace.bytes_behind_a_step())


def _in_words(placement: object) -> str:
    """Description of a placement, or of what was given for one, that tells it from others."""
    if isinstance(placement, ExpertPlacement):
        return f"{placement!r} {placement.digest().hex()[:16]}"
    return "None" if placement is None else f"a {type(placement).__name__}"


def _warn_of_idle_arguments(redundancy: str, min_tokens_per_copy: int | None, layer: ExpertLayer) -> None:
    """They harm nothing, and whoever compares settings may leave them; but nobody should believe that they act."""
    num_redundant = len(layer.physical_to_logical) - layer.num_logical_experts
    if redundancy == "batch" and num_redundant == 0:
        rank_zero_warn(
            "redundancy='batch' has no effect with num_redundant_experts=0: there is no slot to fill in each forward;"
            f" num_redundant_experts={layer.groups.size} would be one a rank"
        )
    if redundancy == "window" and min_tokens_per_copy is not None:
        rank_zero_warn(
            f"min_tokens_per_copy={min_tokens_per_copy} has no effect with redundancy='window', where the policy"
            " decides about copies; redundancy='batch' would use it"
        )
