"""The Lightning callback."""

import os
from itertools import zip_longest
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import distributed as dist
from torch.optim import Optimizer
from typing_extensions import override

from lightning_eplb._validation import check_redundancy, check_steps, check_switches, check_whole_numbers
from lightning_eplb.balancer import ExpertLoadBalancer
from lightning_eplb.checkpoint.consolidate import DistributedCheckpointIO
from lightning_eplb.integrations.ddp import average_when_ddp_does, leave_experts_out_of_ddp
from lightning_eplb.integrations.evaluation import Evaluation
from lightning_eplb.integrations.fsdp1 import SpreadExperts, check_fsdp_hook
from lightning_eplb.integrations.patches import replace, restore
from lightning_eplb.integrations.precision import (
    clip_as_before,
    clip_by_global_norm,
    clip_fsdp_by_global_norm,
    shared_scaler,
)
from lightning_eplb.integrations.requirements import (
    check_adopted,
    check_found,
    check_pruning,
    check_spread,
    checked_ep_size,
    ep_size_in,
)
from lightning_eplb.logging.loggers import log_histogram, log_placement
from lightning_eplb.logging.rearrangement import report_rearrangement
from lightning_eplb.logging.scalars import scalars_of
from lightning_eplb.logging.summary import FitSummary, print_table
from lightning_eplb.parallel.convert import check_experts, expert_layers, find_experts, parallelize_experts
from lightning_eplb.parallel.flat_parameters import check_not_flattened
from lightning_eplb.parallel.materialize import materialize
from lightning_eplb.parallel.scaling import check_scaled_optimizer, share_overflow
from lightning_eplb.policies import Policy
from lightning_eplb.simulation.trace import TraceWriter
from lightning_eplb.strategies import ExpertParallelStrategy


class EPLBCallback(Callback):
    r"""Spreads the experts of a Mixture-of-Experts model over the data-parallel ranks and keeps the ranks level.

    Each rank holds a part of the experts of every MoE layer, and tokens travel to the ranks of their experts. The
    callback counts which experts the router picks, and between optimizer steps moves experts, with weights and
    optimizer state, to where they level the ranks. Training is the same training: losses, gradients, clipping and
    checkpoints are those of the unmodified model under DDP.

    A model that was built in ``LightningModule.__init__`` is converted in ``setup``. One that is built in
    ``configure_model`` must be converted there, by :func:`~lightning_eplb.parallelize_experts`; the callback adopts it.
    Any Hugging Face MoE model will do, and any module that follows the protocol described there. A model that was built
    under ``torch.device("meta")`` in ``__init__`` gets its memory in ``setup``, for this rank's experts only; in
    ``configure_model`` call :func:`~lightning_eplb.load_weights` or :func:`~lightning_eplb.materialize`.

    Scalars are logged whenever loggers write (``Trainer(log_every_n_steps=...)``);
    :data:`lightning_eplb.logging.scalars.SCALARS` says what each means.

    The progress bar shows ``balancedness`` of every step, and a table at the end of ``fit`` what balancing did. A
    ``WandbLogger`` or ``TensorBoardLogger`` gets heatmaps of experts, of slots and of ranks, before and after each
    rearrangement, and a histogram of the experts' load with the scalars; a ``WandbLogger`` a table of the placement at
    the end.

    Example::

        from lightning.pytorch import Trainer
        from lightning_eplb import EPLBCallback

        trainer = Trainer(strategy="ddp", devices=8, callbacks=[EPLBCallback(num_redundant_experts=8)])
        trainer.fit(model)

    Args:
        num_redundant_experts: Redundant experts of each layer, over all ranks of an EP group: copies of popular
            experts, for which each rank keeps weights but no optimizer state. A multiple of ``ep_size``.
        ep_size: Ranks that share the experts of a layer. ``None``: all. With 1, the model stays as it is and is only
            watched; each expert then counts as if it were alone on a rank, so that balancedness is that of experts.
        policy: Decides where experts go. ``None``: :class:`~lightning_eplb.BalancedPolicy`.
        window_size: Optimizer steps whose load the policy looks at.
        step_interval: Optimizer steps between rearrangements. The first comes after a quarter of it, and one may come
            early when the ranks are no longer as level as they were after the last.
        trace: A file to record the load of every optimizer step in, for ``python -m lightning_eplb simulate``. A
            resumed run goes on with it, any other replaces it.
        redundancy: When the redundant slots are filled: ``"window"`` with each rearrangement, by the policy;
            ``"batch"`` in each forward pass, for the very tokens that it routes.
        min_tokens_per_copy: With ``"batch"``, tokens that a copy must take over. ``None``: as many as take as long to
            compute as its weights and its gradient to travel, as measured in the first step.
        use_async: Rows move behind the steps that follow a decision, those of a few layers in each step, instead of
            between two steps. Weights must then change in optimizer steps only.

    Raises:
        ValueError: In ``__init__`` or in ``setup``, before any communication, if an argument does not fit by itself,
            the strategy, the precision, another callback or the model.

    Note:
        In validation, testing and prediction under DDP ranks may have unequal numbers of batches. Under FSDP a
        ``ValueError`` on all ranks names those that ran out first. In training all ranks need as many batches.

        ``model.state_dict()`` and ``optimizer.state_dict()`` gather the experts of all ranks, so every rank must call
        them, as ``Trainer.save_checkpoint`` does. ``named_parameters()`` has this rank's experts only, in an order that
        changes: build checkpoints of your own from :func:`~lightning_eplb.logical_parameters`. Weight averaging
        callbacks are refused: they keep rows of experts by the place where they once were.
    """

    def __init__(
        self,
        num_redundant_experts: int = 0,
        ep_size: int | None = None,
        policy: Policy | None = None,
        window_size: int = 100,
        step_interval: int = 100,
        trace: str | os.PathLike | None = None,
        redundancy: Literal["window", "batch"] = "window",
        min_tokens_per_copy: int | None = None,
        use_async: bool = False,
    ) -> None:
        check_redundancy(redundancy, min_tokens_per_copy)
        check_steps(window_size=window_size, step_interval=step_interval)
        check_whole_numbers(num_redundant_experts=num_redundant_experts)
        check_switches(use_async=use_async)
        if ep_size is not None:
            check_whole_numbers(ep_size=ep_size)
        if num_redundant_experts < 0:
            raise ValueError(f"num_redundant_experts={num_redundant_experts} must not be negative; 0 is none")
        if ep_size is not None and ep_size < 1:
            raise ValueError(f"ep_size={ep_size} must be at least 1; None takes every data-parallel rank")
        if policy is not None and not isinstance(policy, Policy):
            raise ValueError(f"policy={policy!r} must be a lightning_eplb.Policy, such as BalancedPolicy(), or None")
        if trace is not None and os.path.isdir(trace):
            raise ValueError(
                f"trace={str(trace)!r} is a folder; name a file, such as {os.path.join(trace, 'trace.npy')!r}"
            )
        self.num_redundant_experts = num_redundant_experts
        self.ep_size = ep_size
        self.policy = policy
        self.window_size = window_size
        self.step_interval = step_interval
        self.trace = trace
        self.redundancy: Literal["window", "batch"] = redundancy
        self.use_async = use_async
        self.min_tokens_per_copy = min_tokens_per_copy
        self.balancer: ExpertLoadBalancer | None = None
        """Exists from the start of ``fit`` on, and stays."""
        self._saved_state: dict[str, Any] = {}
        self._last_global_step = 0
        self._trace_writer: TraceWriter | None = None
        self._spread_experts: SpreadExperts | None = None
        self._evaluation: Evaluation | None = None
        self._summary: FitSummary | None = None

    @override
    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        check_spread(trainer, pl_module)
        ep_size = checked_ep_size(trainer, self.ep_size, self.num_redundant_experts)
        check_pruning(trainer, pl_module, ep_size)
        clip_by_global_norm(trainer, pl_module)
        leave_experts_out_of_ddp(pl_module)
        if isinstance(trainer.strategy, ExpertParallelStrategy):
            trainer.strategy.before_loading = lambda: self._reset_placement(pl_module)
            return
        if isinstance(trainer.strategy, FSDPStrategy):
            self._undo_spread_experts()
            self._spread_experts = SpreadExperts(trainer.strategy, pl_module)
        elif not isinstance(trainer.strategy.checkpoint_io, DistributedCheckpointIO):
            replace(trainer.strategy, "checkpoint_io", DistributedCheckpointIO(trainer.strategy.checkpoint_io))
        if any(expert_layers(pl_module)):
            return
        found = dict(find_experts(pl_module))
        if not found and is_overridden("configure_model", pl_module):
            return
        check_found(pl_module, found)
        check_experts(pl_module, found, ep_size, self.num_redundant_experts)
        experts = {id(parameter) for module in found.values() for parameter in module.parameters(recurse=False)}
        trained_elsewhere = any(p.requires_grad and id(p) not in experts for p in pl_module.parameters())
        if stage == "fit" and ep_size > 1 and not trained_elsewhere:
            raise ValueError(
                f"{type(pl_module).__name__} trains no parameter outside of experts, and DDP refuses such a model; let"
                " one other parameter require gradients, a norm's would do"
            )
        group = None
        if trainer.world_size > ep_size:
            group, _ = dist.new_subgroups(ep_size)
            assert isinstance(group, dist.ProcessGroup)
        parallelize_experts(pl_module, group, num_redundant_experts=self.num_redundant_experts)
        materialize(pl_module, trainer.strategy.root_device)

    @override
    def on_fit_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        check_adopted(trainer, pl_module, ep_size_in(trainer, self.ep_size), self.num_redundant_experts)
        if self.balancer is None or self.balancer.model is not pl_module:
            self.balancer = ExpertLoadBalancer(
                pl_module,
                policy=self.policy,
                window_size=self.window_size,
                step_interval=self.step_interval,
                redundancy=self.redundancy,
                min_tokens_per_copy=self.min_tokens_per_copy,
                use_async=self.use_async,
            )
            self.balancer.record(False)  # until training starts: the sanity check is no load
        self.balancer.abandon_rearrangement()  # of a fit that failed: its weights may have been loaded anew
        self._watch_optimizers(trainer, pl_module)
        check_not_flattened(pl_module)
        clip_fsdp_by_global_norm(trainer.strategy.model, pl_module, self.balancer.groups)
        average_when_ddp_does(trainer.strategy.model, pl_module)

    @override
    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        assert self.balancer is not None
        self._last_global_step = trainer.global_step
        self._open_trace(trainer)
        saved, self._saved_state = self._saved_state, {}
        if saved:
            self.balancer.load_state_dict(saved)
        self._summary = FitSummary(self.window_size, self.balancer)
        if saved and (self.balancer.num_rearrangements or saved.get("is_rearranging", False)):
            # A resumed run starts from the initial placement: level it by the window that it brought along.
            done = self.balancer.rearrange()
            if done is not None:
                report_rearrangement(trainer, done, self._layer_names())

    @override
    def on_train_batch_start(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch: Any, batch_idx: int
    ) -> None:
        assert self.balancer is not None
        if self.balancer.groups.size > 1:
            check_fsdp_hook(trainer.strategy.model)  # registered in any hook before
        self.balancer.record(True)

    @override
    def on_before_optimizer_step(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", optimizer: Optimizer
    ) -> None:
        assert self.balancer is not None
        if any(ours is not theirs for ours, theirs in zip_longest(self.balancer.optimizers, trainer.optimizers)):
            self._watch_optimizers(trainer, pl_module)  # they were made anew
        if (scaler := shared_scaler(trainer)) is not None:
            share_overflow(scaler, optimizer, self.balancer.groups)
        self.balancer.before_optimizer_step(optimizer)

    @override
    def on_train_batch_end(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        assert self.balancer is not None
        assert self._summary is not None
        self.balancer.record(False)
        if trainer.global_step == self._last_global_step:
            return
        self._last_global_step = trainer.global_step
        load = self.balancer.step(with_gradients=_keeps_gradients(pl_module))
        if load is None:
            return
        self._summary.add(load)
        if self._trace_writer is not None:
            self._trace_writer.append(load.load)
        if load.rearrangement is not None:
            report_rearrangement(trainer, load.rearrangement, self._layer_names())
        # A value that is logged costs a third of a millisecond, also in the steps that no logger writes.
        if trainer.progress_bar_callback is not None:
            pl_module.log("balancedness", load.balancedness, prog_bar=True, logger=False)  # a bar is narrow
        if self._is_logged(trainer, pl_module):
            pl_module.log_dict(scalars_of(self.balancer, load))
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every > 0 and self.balancer.num_steps % every == 0:
            log_histogram(trainer.loggers, trainer.global_step - 1, load.load)

    @override
    def on_train_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        assert self.balancer is not None
        if (done := self.balancer.finish_rearrangement()) is not None:
            report_rearrangement(trainer, done, self._layer_names())
        if self._summary is not None and self._summary.last and self.balancer.groups.size > 1:
            load_YL = self.balancer.load.compute()["load"].cpu().numpy()
            log_placement(trainer.loggers, trainer.global_step - 1, self.balancer.placement, load_YL)

    @override
    def on_fit_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        assert self.balancer is not None
        # Who wants no progress bar wants no table either.
        if trainer.is_global_zero and trainer.progress_bar_callback is not None and self._summary is not None:
            title = f"Expert load after {self.balancer.num_steps:,} optimizer steps"
            if self._summary.last:
                print_table(title, self._summary.rows(), trainer.progress_bar_callback)

    @override
    def on_validation_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._evaluation = Evaluation(trainer, pl_module)

    @override
    def on_validation_batch_start(
        self,
        trainer: "pl.Trainer",
        pl_module: "pl.LightningModule",
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        assert self._evaluation is not None
        self._evaluation.start_batch(dataloader_idx)

    @override
    def on_test_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._evaluation = Evaluation(trainer, pl_module)

    @override
    def on_test_batch_start(
        self,
        trainer: "pl.Trainer",
        pl_module: "pl.LightningModule",
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        assert self._evaluation is not None
        self._evaluation.start_batch(dataloader_idx)

    @override
    def on_predict_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._evaluation = Evaluation(trainer, pl_module)

    @override
    def on_predict_batch_start(
        self,
        trainer: "pl.Trainer",
        pl_module: "pl.LightningModule",
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        assert self._evaluation is not None
        self._evaluation.start_batch(dataloader_idx)

    @override
    def on_exception(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", exception: BaseException) -> None:
        if self._evaluation is not None:
            self._evaluation.stop()

    @override
    def teardown(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        clip_as_before(trainer)
        restore(trainer.strategy, "checkpoint_io")
        self._undo_spread_experts()
        if self._trace_writer is not None:
            self._trace_writer.close()
            self._trace_writer = None

    @override
    def state_dict(self) -> dict[str, Any]:
        return self.balancer.state_dict() if self.balancer is not None else self._saved_state

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved_state = state_dict

    def _open_trace(self, trainer: "pl.Trainer") -> None:
        """Open the trace on rank 0. Where that fails, every rank raises ``ValueError``, so that none waits."""
        if self.trace is None:
            return
        fault = None
        if trainer.is_global_zero:
            try:
                self._trace_writer = TraceWriter(self.trace, keep=self._saved_state.get("num_steps", 0))
            except ValueError as error:
                fault = str(error)
        if (fault := trainer.strategy.broadcast(fault)) is not None:
            raise ValueError(fault)

    def _undo_spread_experts(self) -> None:
        if self._spread_experts is not None:
            self._spread_experts.undo()
            self._spread_experts = None

    def _watch_optimizers(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        assert self.balancer is not None
        self.balancer.optimizers = trainer.optimizers
        if shared_scaler(trainer) is not None:
            for optimizer in trainer.optimizers:
                check_scaled_optimizer(optimizer)

    def _reset_placement(self, pl_module: "pl.LightningModule") -> None:
        """Lightning loads a file right into the shards and takes them to be in the order of the unmodified model."""
        if not any(expert_layers(pl_module)):
            return
        balancer = self.balancer
        if balancer is None or balancer.model is not pl_module:
            balancer = ExpertLoadBalancer(pl_module)
        balancer.reset()

    def _layer_names(self) -> list[str]:
        assert self.balancer is not None
        return [layer.name for layer, _ in expert_layers(self.balancer.model)]

    def _is_logged(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> bool:
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        # Under manual optimization Lightning counts batches, which `global_step` doesn't tell.
        return not pl_module.automatic_optimization or (every > 0 and trainer.global_step % every == 0)


def _keeps_gradients(module: "pl.LightningModule") -> bool:
    """Whether gradients may be used again after an optimizer step: Lightning's own loop zeroes them before."""
    overridden = (is_overridden(name, module) for name in ("optimizer_step", "optimizer_zero_grad"))
    return not module.automatic_optimization or any(overridden)
