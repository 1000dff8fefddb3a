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

from lightning_eplb.balancer import ExpertLoadBalancer
from lightning_eplb.balancer.warm_start import Load
from lightning_eplb.checkpoint.consolidate import DistributedCheckpointIO
from lightning_eplb.integrations.callback_arguments import check_callback_arguments
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
    check_converted_model,
    check_found_experts,
    check_other_parameters,
    check_pruning,
    check_trainer,
    check_world_size,
    keeps_gradients,
    resolve_ep_size,
)
from lightning_eplb.logging.fit_logger import FitLogger
from lightning_eplb.parallel.clipping import check_scaled_optimizer, share_overflow
from lightning_eplb.parallel.discovery import check_experts, find_experts
from lightning_eplb.parallel.fsdp1_parameters import check_not_flattened
from lightning_eplb.parallel.materialize import materialize
from lightning_eplb.parallel.parallelize import expert_layers, parallelize_experts, set_fused_experts
from lightning_eplb.policies import Policy
from lightning_eplb.simulation.initial_load import place_experts
from lightning_eplb.simulation.run_trace import RunTrace
from lightning_eplb.strategies import ExpertParallelStrategy


class EPLBCallback(Callback):
    r"""Spreads the experts of a Mixture-of-Experts model over the data-parallel ranks and balances their load.

    Each rank holds a part of the experts of every MoE layer, and tokens are dispatched to the ranks of their experts.
    The callback counts the tokens of each expert. Between optimizer steps it moves experts, with weights and optimizer
    state, to ranks where they balance the load. Losses, gradients, clipping and checkpoints are those of the unmodified
    model under DDP.

    A model that is built in ``LightningModule.__init__`` is converted in ``setup``. A model that is built in
    ``configure_model`` must be converted there by :func:`~lightning_eplb.parallelize_experts`. Any Hugging Face MoE
    model is supported, and any module that follows the protocol described there. A model that is built under
    ``torch.device("meta")`` in ``__init__`` gets memory for this rank's experts in ``setup``. In ``configure_model``
    call :func:`~lightning_eplb.load_weights` or :func:`~lightning_eplb.materialize`.

    A module may hold several models and layers with different numbers of experts, see ``balancer.models``.

    Scalars are logged whenever loggers write (``Trainer(log_every_n_steps=...)``), see
    :data:`lightning_eplb.logging.scalars.SCALARS`. The progress bar shows the ``balancedness`` of every step, and a
    table at the end of ``fit`` summarizes the rearrangements. A ``WandbLogger`` or ``TensorBoardLogger`` gets heatmaps
    of experts, slots and ranks before and after each rearrangement, and a histogram of the experts' load. A
    ``WandbLogger`` also gets a table of the final placement.

    Example::

        from lightning.pytorch import Trainer
        from lightning_eplb import EPLBCallback

        trainer = Trainer(strategy="ddp", devices=8, callbacks=[EPLBCallback(num_redundant_experts=8)])
        trainer.fit(model)

    Args:
        num_redundant_experts: Redundant experts of each layer over all ranks of an EP group, a multiple of ``ep_size``.
            They are replicas of popular experts: a rank keeps weights for them but no optimizer state. Defaults to 0.
        ep_size: Ranks that share the experts of a layer. ``None``: all ranks. With 1 the model is not changed and only
            monitored: each expert then counts as a rank of its own, so that balancedness is that of experts.
        policy: Policy that chooses placements. ``None``: :class:`~lightning_eplb.BalancedPolicy`.
        window_size: Optimizer steps whose load the policy looks at. Defaults to 100.
        step_interval: Optimizer steps between rearrangements. The first comes after a quarter of it, and one may come
            early if balancedness drops below what it was after the last. Defaults to 100.
        trace: File to record the load of every optimizer step in, for ``python -m lightning_eplb simulate``. A resumed
            run appends to it, any other run replaces it. Each of several models has a file, as
            ``trace.generator.npy``. ``None``: no file.
        redundancy: When the redundant slots are filled. ``"window"``: with each rearrangement, by the policy.
            ``"batch"``: in each forward pass, for the tokens that it routes. Defaults to ``"window"``.
        min_tokens_per_copy: With ``"batch"``, tokens that a redundant expert must take over. ``None``: as many as take
            as long to compute as its weights and gradient to transfer, as measured in the first step.
        use_async: Overlap the transfer of rows with the training steps that follow a decision, a few layers in each
            step, instead of between two steps. Weights must then change in optimizer steps only. Defaults to ``False``.
        fused_experts: Compute experts by fused kernels, see :func:`~lightning_eplb.parallelize_experts`. ``None``:
            those of a model that ``configure_model`` converts as it says there, others over several ranks where that
            runs. ``True``: also with ``ep_size=1``. ``False``: never. Defaults to ``None``.
        initial_load: Known load to arrange the experts by before the first step: a trace, a report or a checkpoint,
            which only rank 0 needs to have, or counts of tokens ``[layers, experts]`` or ``[steps, layers, experts]``
            (of several models by their names). No window keeps it, and a load from ``ckpt_path`` wins over it.
        profile: Do the largest exchanges once in the first step, see ``ExpertLoadBalancer.profile``. Defaults to False.

    Raises:
        TypeError, ValueError: In ``__init__`` or ``setup``, before any communication, if an argument is not valid or
            does not fit strategy, precision, model or another callback. On all ranks at the start of training, if
            ``initial_load`` can't be read or does not fit.

    Note:
        In validation, testing and prediction under DDP ranks may have different numbers of batches. Under FSDP a
        ``ValueError`` on all ranks names those that run out first. In training all ranks need the same number.

        ``model.state_dict()`` and ``optimizer.state_dict()`` gather the experts of all ranks, so every rank must call
        them, as ``Trainer.save_checkpoint`` does. ``named_parameters()`` has this rank's experts only, in an order that
        changes: build your own checkpoints from :func:`~lightning_eplb.logical_parameters`. Weight averaging callbacks
        are not supported: they average rows by position, and experts change positions.
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
        fused_experts: bool | None = None,
        initial_load: str | os.PathLike | Load | None = None,
        profile: bool = False,
    ) -> None:
        check_callback_arguments(
            num_redundant_experts=num_redundant_experts,
            ep_size=ep_size,
            policy=policy,
            trace=trace,
            redundancy=redundancy,
            min_tokens_per_copy=min_tokens_per_copy,
            fused_experts=fused_experts,
            initial_load=initial_load,
            steps={"window_size": window_size, "step_interval": step_interval},
            switches={"use_async": use_async, "profile": profile},
        )
        self.num_redundant_experts = num_redundant_experts
        self.ep_size = ep_size
        self.policy = policy
        self.window_size = window_size
        self.step_interval = step_interval
        self.trace = trace
        self.redundancy: Literal["window", "batch"] = redundancy
        self.use_async = use_async
        self.fused_experts = fused_experts
        self.min_tokens_per_copy = min_tokens_per_copy
        self.initial_load = initial_load
        self.profile = profile
        self.balancer: ExpertLoadBalancer | None = None
        """Balancer of the model; ``None`` until the first ``fit`` starts."""
        self._saved_state: dict[str, Any] = {}
        self._last_global_step = 0
        self._run_trace: RunTrace | None = None
        self._spread_experts: SpreadExperts | None = None
        self._evaluation: Evaluation | None = None
        self._fit_logger: FitLogger | None = None

    @override
    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        check_world_size(trainer, pl_module)
        ep_size = resolve_ep_size(trainer, self.ep_size)
        check_trainer(trainer, ep_size, self.num_redundant_experts)
        check_pruning(trainer, pl_module, ep_size)
        clip_by_global_norm(trainer, pl_module)
        leave_experts_out_of_ddp(pl_module)
        if not isinstance(trainer.strategy.checkpoint_io, DistributedCheckpointIO):
            replace(trainer.strategy, "checkpoint_io", DistributedCheckpointIO(trainer.strategy.checkpoint_io))
        if isinstance(trainer.strategy, ExpertParallelStrategy):
            trainer.strategy.before_loading = lambda: self._reset_placement(pl_module)
            return
        if isinstance(trainer.strategy, FSDPStrategy):
            self._undo_spread_experts()
            self._spread_experts = SpreadExperts(trainer.strategy, pl_module)
        if any(expert_layers(pl_module)):
            return
        found = dict(find_experts(pl_module))
        if not found and is_overridden("configure_model", pl_module):
            return
        check_found_experts(pl_module, found)
        check_experts(pl_module, found, ep_size, self.num_redundant_experts)
        if stage == "fit" and ep_size > 1:
            check_other_parameters(pl_module, found)
        group = None
        if trainer.world_size > ep_size:
            group, _ = dist.new_subgroups(ep_size)
            assert isinstance(group, dist.ProcessGroup)
        settings = {"num_redundant_experts": self.num_redundant_experts, "fused_experts": self.fused_experts}
        parallelize_experts(pl_module, group, **settings)
        materialize(pl_module, trainer.strategy.root_device)

    @override
    def on_fit_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        ep_size = resolve_ep_size(trainer, self.ep_size)
        check_converted_model(trainer, pl_module, ep_size, self.num_redundant_experts)
        if self.fused_experts is not None:
            set_fused_experts(pl_module, self.fused_experts)
        balancer = self.balancer
        if balancer is None or balancer.model is not pl_module:
            self.balancer = balancer = ExpertLoadBalancer(
                pl_module,
                policy=self.policy,
                window_size=self.window_size,
                step_interval=self.step_interval,
                redundancy=self.redundancy,
                min_tokens_per_copy=self.min_tokens_per_copy,
                use_async=self.use_async,
            )
            balancer.record(False)  # until training starts: sanity checking is no load
        balancer.cancel_rearrangement()  # of a fit that failed: its weights may have been loaded anew
        self._fit_logger = FitLogger(balancer, self.window_size)
        self._watch_optimizers(trainer)
        check_not_flattened(pl_module)
        clip_fsdp_by_global_norm(trainer.strategy.model, pl_module, balancer.groups)
        average_when_ddp_does(trainer.strategy.model, pl_module)

    @override
    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        balancer = self._fit.balancer
        self._last_global_step = trainer.global_step
        self._open_trace(trainer)
        saved, self._saved_state = self._saved_state, {}
        if saved:
            balancer.load_state_dict(saved)
        self._fit_logger = FitLogger(balancer, self.window_size)
        if (result := place_experts(balancer, bool(saved), self.initial_load)) is not None:
            self._fit.log_rearrangement(trainer, result)
        if self.profile:
            balancer.profile()

    @override
    def on_train_batch_start(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch: Any, batch_idx: int
    ) -> None:
        balancer = self._fit.balancer
        if balancer.groups.size > 1:
            check_fsdp_hook(trainer.strategy.model)  # registered in any hook before
        balancer.record(True)

    @override
    def on_before_optimizer_step(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", optimizer: Optimizer
    ) -> None:
        balancer = self._fit.balancer
        if any(ours is not theirs for ours, theirs in zip_longest(balancer.optimizers, trainer.optimizers)):
            self._watch_optimizers(trainer)  # they were replaced
        if (scaler := shared_scaler(trainer)) is not None:
            share_overflow(scaler, optimizer, balancer.groups)
        balancer.before_optimizer_step(optimizer)

    @override
    def on_train_batch_end(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        balancer = self._fit.balancer
        balancer.record(False)
        if trainer.global_step == self._last_global_step:
            return
        self._last_global_step = trainer.global_step
        stats = balancer.step(with_gradients=keeps_gradients(pl_module))
        if stats is None:
            return
        if self._run_trace is not None:
            self._run_trace.append(stats)
        self._fit.log_step(trainer, pl_module, stats)

    @override
    def on_train_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if (result := self._fit.balancer.finish_rearrangement()) is not None:
            self._fit.log_rearrangement(trainer, result)
        self._fit.log_placement(trainer)

    @override
    def on_fit_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._fit.print_summary(trainer)

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
        self._start_evaluation_batch(dataloader_idx)

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
        self._start_evaluation_batch(dataloader_idx)

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
        self._start_evaluation_batch(dataloader_idx)

    @override
    def on_exception(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", exception: BaseException) -> None:
        if self._evaluation is not None:
            self._evaluation.stop()

    @override
    def teardown(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        clip_as_before(trainer)
        restore(trainer.strategy, "checkpoint_io")
        self._undo_spread_experts()
        if self._run_trace is not None:
            self._run_trace.close()
            self._run_trace = None

    @override
    def state_dict(self) -> dict[str, Any]:
        return self.balancer.state_dict() if self.balancer is not None else self._saved_state

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved_state = state_dict

    @property
    def _fit(self) -> FitLogger:
        """The balancer and the logs of the current ``fit``."""
        if self._fit_logger is None:
            raise RuntimeError("a training hook of EPLBCallback was called before on_fit_start")
        return self._fit_logger

    def _start_evaluation_batch(self, dataloader_idx: int) -> None:
        if self._evaluation is not None:
            self._evaluation.start_batch(dataloader_idx)

    def _open_trace(self, trainer: "pl.Trainer") -> None:
        """Open the trace on rank 0. If that fails, every rank raises ``ValueError``."""
        if self.trace is None:
            return
        fault = None
        if trainer.is_global_zero:
            try:
                self._run_trace = RunTrace(self.trace, self._fit.balancer, self._saved_state)
            except ValueError as error:
                fault = str(error)
        if (fault := trainer.strategy.broadcast(fault)) is not None:
            raise ValueError(fault)

    def _undo_spread_experts(self) -> None:
        if self._spread_experts is not None:
            self._spread_experts.undo()
            self._spread_experts = None

    def _watch_optimizers(self, trainer: "pl.Trainer") -> None:
        self._fit.balancer.optimizers = trainer.optimizers
        if shared_scaler(trainer) is not None:
            for optimizer in trainer.optimizers:
                check_scaled_optimizer(optimizer)

    def _reset_placement(self, pl_module: "pl.LightningModule") -> None:
        """Move experts to their initial ranks, as Lightning loads a file into the shards in logical order."""
        if not any(expert_layers(pl_module)):
            return
        balancer = self.balancer
        if balancer is None or balancer.model is not pl_module:
            balancer = ExpertLoadBalancer(pl_module)
        balancer.reset()
