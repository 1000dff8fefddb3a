"""The Lightning callback."""

import os
from collections.abc import Iterator
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from typing_extensions import override

from lightning_eplb.arguments import check_whole_numbers
from lightning_eplb.balancer import ExpertLoadBalancer, check_redundancy
from lightning_eplb.checkpoint import install_optimizer_hooks
from lightning_eplb.consolidate import ReadsDistributedCheckpoints
from lightning_eplb.fsdp import ExpertsLeftOut, check_fsdp
from lightning_eplb.functional import rank_tokens, slot_tokens
from lightning_eplb.logging.heatmap import draw_before_after, draw_expert_load, draw_slot_load
from lightning_eplb.logging.loggers import (
    EXPERT_LOAD,
    RANK_LOAD,
    SLOT_LOAD,
    log_heatmaps,
    log_histogram,
    log_placement,
    takes_pictures,
)
from lightning_eplb.parallel.clipping import clip_grad_norm_, clip_grad_value_
from lightning_eplb.parallel.convert import check_experts, expert_layers, find_experts, parallelize_experts
from lightning_eplb.parallel.flat_parameters import check_not_flattened, shard_groups
from lightning_eplb.parallel.groups import check_nodes
from lightning_eplb.parallel.materialize import materialize
from lightning_eplb.parallel.scaling import check_scaled_optimizer, share_overflow
from lightning_eplb.policies import Policy
from lightning_eplb.scalars import scalars_of
from lightning_eplb.steps import Rearrangement
from lightning_eplb.strategies import ExpertParallelStrategy
from lightning_eplb.summary import FitSummary, print_table
from lightning_eplb.trace import TraceWriter


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
    :data:`lightning_eplb.scalars.SCALARS` says what each means.

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
        ``model.state_dict()`` and ``optimizer.state_dict()`` gather the experts of all ranks, so every rank must call
        them, as ``Trainer.save_checkpoint`` does. Weight averaging callbacks are refused: they keep rows of experts by
        the place where they once were.
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
        check_whole_numbers(
            num_redundant_experts=num_redundant_experts, window_size=window_size, step_interval=step_interval
        )
        if ep_size is not None:
            check_whole_numbers(ep_size=ep_size)
        if num_redundant_experts < 0:
            raise ValueError(f"num_redundant_experts={num_redundant_experts} must not be negative; 0 is none")
        if ep_size is not None and ep_size < 1:
            raise ValueError(f"ep_size={ep_size} must be at least 1; None takes every data-parallel rank")
        if policy is not None and not isinstance(policy, Policy):
            raise ValueError(f"policy={policy!r} must be a lightning_eplb.Policy, such as BalancedPolicy(), or None")
        for name, value in {"window_size": window_size, "step_interval": step_interval}.items():
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1 optimizer step")
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
        self._left_out: ExpertsLeftOut | None = None
        self._summary = FitSummary(window_size)

    @override
    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        ep_size = self._check_trainer(trainer)
        ignored = getattr(pl_module, "_ddp_params_and_buffers_to_ignore", ())
        if not isinstance(ignored, _IgnoredByDDP):
            pl_module._ddp_params_and_buffers_to_ignore = _IgnoredByDDP(pl_module, ignored)  # type: ignore[assignment]
        if isinstance(trainer.strategy, ExpertParallelStrategy):
            trainer.strategy.before_loading = lambda: self._reset_placement(pl_module)
            return
        if isinstance(trainer.strategy, FSDPStrategy):
            self._end_leaving_out()
            self._left_out = ExpertsLeftOut(trainer.strategy, pl_module)
        elif not isinstance(trainer.strategy.checkpoint_io, ReadsDistributedCheckpoints):
            trainer.strategy.checkpoint_io = ReadsDistributedCheckpoints(trainer.strategy.checkpoint_io)
        if any(expert_layers(pl_module)):
            return
        found = dict(find_experts(pl_module))
        if not found and is_overridden("configure_model", pl_module):
            return
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
        self._check_adopted(trainer, pl_module)
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
        self.balancer.optimizers = trainer.optimizers
        for optimizer in trainer.optimizers:
            install_optimizer_hooks(optimizer, pl_module)
            if self._scaler(trainer) is not None:
                check_scaled_optimizer(optimizer)
        check_not_flattened(pl_module)
        _clip_by_global_norm(trainer, pl_module, self.balancer)
        _average_when_ddp_does(trainer.strategy.model, pl_module)

    @override
    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        assert self.balancer is not None
        self._last_global_step = trainer.global_step
        self._summary = FitSummary(self.window_size)
        if self.trace is not None and trainer.is_global_zero:
            self._trace_writer = TraceWriter(self.trace, append=bool(self._saved_state))
        if self._saved_state:
            self.balancer.load_state_dict(self._saved_state)
            was_rearranging = self._saved_state.get("is_rearranging", False)
            self._saved_state = {}
            if self.balancer.num_rearrangements or was_rearranging:
                # A resumed run starts from the initial placement: level it by the window that it brought along.
                self.balancer.rearrange()

    @override
    def on_train_batch_start(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch: Any, batch_idx: int
    ) -> None:
        assert self.balancer is not None
        self.balancer.record(True)

    @override
    def on_before_optimizer_step(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", optimizer: Optimizer
    ) -> None:
        assert self.balancer is not None
        if (scaler := self._scaler(trainer)) is not None:
            share_overflow(scaler, optimizer, self.balancer.groups)
        self.balancer.before_optimizer_step(optimizer)

    @override
    def on_train_batch_end(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        assert self.balancer is not None
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
            self._report(trainer, load.rearrangement)
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
            self._report(trainer, done)
        if self._summary.last and self.balancer.groups.size > 1:
            load_YL = self.balancer.load.compute()["load"].cpu().numpy()
            log_placement(trainer.loggers, trainer.global_step - 1, self.balancer.placement, load_YL)

    @override
    def on_fit_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        assert self.balancer is not None
        # Who wants no progress bar wants no table either.
        if trainer.is_global_zero and trainer.progress_bar_callback is not None and self._summary.last:
            title = f"Expert load after {self.balancer.num_steps:,} optimizer steps"
            print_table(title, self._summary.rows(self.balancer))

    @override
    def teardown(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        for name in ("clip_grad_by_norm", "clip_grad_by_value"):
            vars(trainer.precision_plugin).pop(name, None)
        self._end_leaving_out()
        if self._trace_writer is not None:
            self._trace_writer.close()
            self._trace_writer = None

    @override
    def state_dict(self) -> dict[str, Any]:
        return self.balancer.state_dict() if self.balancer is not None else self._saved_state

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved_state = state_dict

    def _end_leaving_out(self) -> None:
        if self._left_out is not None:
            self._left_out.undo()
            self._left_out = None

    def _scaler(self, trainer: "pl.Trainer") -> torch.amp.GradScaler | None:
        """The gradient scaler, where several ranks must agree about what it does."""
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        return scaler if scaler is not None and trainer.world_size > 1 else None

    def _check_trainer(self, trainer: "pl.Trainer") -> int:
        """The size of an EP group, once it is sure that trainer and arguments go together."""
        ep_size = self._ep_size_in(trainer)
        if trainer.world_size % ep_size:
            sizes = [size for size in range(1, trainer.world_size + 1) if trainer.world_size % size == 0]
            raise ValueError(
                f"ep_size={ep_size} must divide the {trainer.world_size} data-parallel ranks; one of {sizes} would do"
            )
        if self.num_redundant_experts % ep_size:
            below = self.num_redundant_experts // ep_size * ep_size
            raise ValueError(
                f"num_redundant_experts={self.num_redundant_experts} must be a multiple of ep_size={ep_size};"
                f" {below} or {below + ep_size} would do"
            )
        if isinstance(trainer.strategy, FSDPStrategy):
            check_fsdp(trainer.strategy)
        elif not isinstance(trainer.strategy, (DDPStrategy, SingleDeviceStrategy, ExpertParallelStrategy)):
            raise ValueError(
                f"strategy={type(trainer.strategy).__name__} is not supported by EPLBCallback; 'ddp', 'fsdp' or"
                " lightning_eplb.ExpertParallelStrategy() on several devices, or a single device, would do"
            )
        check_nodes(ep_size, trainer.num_devices)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if ep_size > 1 and isinstance(callback, (WeightAveraging, StochasticWeightAveraging)):
                raise ValueError(
                    f"{type(callback).__name__} is not supported with EPLBCallback: it averages the rows of experts by"
                    " the place where they are, and they move; remove one of the two callbacks"
                )
        return ep_size

    def _reset_placement(self, pl_module: "pl.LightningModule") -> None:
        """Lightning loads a file right into the shards and takes them to be in the order of the unmodified model."""
        if not any(expert_layers(pl_module)):
            return
        balancer = self.balancer
        if balancer is None or balancer.model is not pl_module:
            balancer = ExpertLoadBalancer(pl_module)
        balancer.reset()

    def _ep_size_in(self, trainer: "pl.Trainer") -> int:
        if not isinstance(trainer.strategy, ExpertParallelStrategy):
            return trainer.world_size if self.ep_size is None else self.ep_size
        theirs = trainer.strategy.ep_size
        if self.ep_size not in (None, theirs):
            raise ValueError(
                f"ep_size={self.ep_size} must be that of ExpertParallelStrategy, which is {theirs}; leave it out here"
            )
        return theirs

    def _check_adopted(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """A model that ``configure_model`` built and converted must be what the arguments say."""
        layers = [layer for layer, _ in expert_layers(pl_module)]
        ep_size = self._ep_size_in(trainer)
        is_sharded = isinstance(trainer.strategy, ExpertParallelStrategy)
        if not layers:
            check_experts(pl_module, dict(find_experts(pl_module)), ep_size, self.num_redundant_experts)
            call = "fully_shard_moe(self.model, self.device_mesh, " if is_sharded else "parallelize_experts(self, "
            raise ValueError(
                "configure_model built MoE layers and did not convert them; call"
                f" {call}num_redundant_experts={self.num_redundant_experts}) at its end"
            )
        for layer, module in expert_layers(pl_module):
            if is_sharded and layer.groups.num_replicas > 1 and not isinstance(module, FSDPModule):
                raise ValueError(
                    f"{layer.name} was spread over a mesh and not sharded, so that nobody averages its gradients; call"
                    " fully_shard_moe(model, mesh), or fully_shard(experts, mesh=mesh['efsdp'],"
                    " shard_placement_fn=lambda parameter: Shard(1))"
                )
        if is_sharded and trainer.world_size > 1:
            _check_sharded(pl_module)
        redundant = len(layers[0].physical_to_logical) - layers[0].num_logical_experts
        if layers[0].groups.size != ep_size or redundant != self.num_redundant_experts:
            raise ValueError(
                f"EPLBCallback has ep_size={ep_size} and num_redundant_experts={self.num_redundant_experts};"
                f" parallelize_experts was called for {layers[0].groups.size} ranks with"
                f" num_redundant_experts={redundant}; give both the same"
            )

    def _is_logged(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> bool:
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        # Under manual optimization Lightning counts batches, which `global_step` doesn't tell.
        return not pl_module.automatic_optimization or (every > 0 and trainer.global_step % every == 0)

    def _report(self, trainer: "pl.Trainer", done: Rearrangement) -> None:
        assert self.balancer is not None
        if self.balancer.groups.size > 1:
            _warn_of_idle_layers([layer.name for layer, _ in expert_layers(self.balancer.model)], done.load)
        if done.before == done.after:
            rank_zero_info(f"step {trainer.global_step}: no expert moved, in no layer would it pay")
            return
        rank_zero_info(f"step {trainer.global_step}: {_in_words(done)}")
        if takes_pictures(trainer.loggers):
            before_YR, after_YR = rank_tokens(done.load, done.before), rank_tokens(done.load, done.after)
            before_YP, after_YP = slot_tokens(done.load, done.before), slot_tokens(done.load, done.after)
            figures = {
                EXPERT_LOAD: draw_expert_load(done.load),
                SLOT_LOAD: draw_slot_load(before_YP, after_YP),
                RANK_LOAD: draw_before_after(before_YR, after_YR),
            }
            log_heatmaps(trainer.loggers, trainer.global_step - 1, figures)


def _check_sharded(module: nn.Module) -> None:
    """The strategy itself averages nothing: what ``fully_shard`` was not called for would differ from rank to rank."""
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and not isinstance(parameter, DTensor):
            raise ValueError(
                f"{name} was not sharded, so that nobody averages its gradient; under ExpertParallelStrategy"
                " configure_model must call fully_shard_moe(model, self.device_mesh), or fully_shard for all else"
            )


def _in_words(done: Rearrangement) -> str:
    moved = "no expert changed ranks"
    if done.num_rows:
        moved = f"{_count(done.num_rows, 'expert')} in {_count(done.num_layers, 'layer')} changed ranks"
    copies = ""
    if done.num_copies:  # fewer copies may level less: those that were given up cost more than they saved
        redundant_YRE = done.after.by_rank[:, :, done.after.primaries_per_rank :]
        filled = int((redundant_YRE >= 0).sum())
        copies = f", {_count(done.num_copies, 'redundant slot')} changed ({filled} of {redundant_YRE.size} filled now)"
    return (
        f"{moved}{copies}, {done.num_bytes / 2**20:.1f} MiB in {done.seconds:.2f} s; balancedness of the window"
        f" {done.balancedness_before:.3f} -> {done.balancedness_after:.3f}"
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _warn_of_idle_layers(names: list[str], load_YL: np.ndarray) -> None:
    """A second copy of a model is placed by its own load: parameter by parameter the two no longer correspond."""
    tokens_Y = load_YL.sum(axis=1)
    idle = [name for name, tokens in zip(names, tokens_Y, strict=True) if not tokens]
    if idle and tokens_Y.any():
        rank_zero_warn(
            f"{len(idle)} of {len(names)} MoE layers got no token in the window, {idle[0]} first. If they belong to a"
            " copy of the model, such as an average of its weights: experts of model and copy change ranks apart, so"
            " average what state_dict() returns, not parameters"
        )


def _keeps_gradients(module: "pl.LightningModule") -> bool:
    """Whether gradients may be used again after an optimizer step: Lightning's own loop zeroes them before."""
    overridden = (is_overridden(name, module) for name in ("optimizer_step", "optimizer_zero_grad"))
    return not module.automatic_optimization or any(overridden)


class _IgnoredByDDP:
    """The names that DDP must leave alone, looked up when DDP asks: by then ``configure_model`` has run."""

    def __init__(self, module: nn.Module, others: Any) -> None:
        self._module = module
        self._others = others

    def __iter__(self) -> Iterator[str]:
        yield from self._others
        experts = {
            id(parameter)
            for layer, module in expert_layers(self._module)
            if layer.groups.size > 1
            for parameter in module.parameters(recurse=False)
        }
        yield from (name for name, parameter in self._module.named_parameters() if id(parameter) in experts)


def _clip_by_global_norm(trainer: "pl.Trainer", pl_module: "pl.LightningModule", balancer: ExpertLoadBalancer) -> None:
    """Let the precision plugin, through which every clipping goes, use the norm of the whole model.

    Lightning clips each rank by the norm of the gradients it has; the experts of other ranks would be missing from it,
    and it refuses those of several meshes.
    """
    precision = trainer.precision_plugin
    experts = [parameter for _, module in expert_layers(pl_module) for parameter in module.parameters(recurse=False)]
    cut = shard_groups(trainer.strategy.model or pl_module)

    def clip_grad_by_norm(optimizer: Optimizer, clip_val: int | float) -> None:
        clip_grad_norm_(precision.main_params(optimizer), float(clip_val), experts, balancer.groups, cut)

    def clip_grad_by_value(optimizer: Optimizer, clip_val: int | float) -> None:
        clip_grad_value_(precision.main_params(optimizer), float(clip_val))

    if balancer.groups.size > 1 or isinstance(trainer.strategy, (ExpertParallelStrategy, FSDPStrategy)):
        precision.clip_grad_by_norm = clip_grad_by_norm  # type: ignore[method-assign]
        precision.clip_grad_by_value = clip_grad_by_value  # type: ignore[method-assign]


def _average_when_ddp_does(wrapped: nn.Module | None, module: nn.Module) -> None:
    """Average the experts' gradients over EP groups in those backward passes in which DDP averages all others."""
    if isinstance(wrapped, DistributedDataParallel):
        for layer, _ in expert_layers(module):
            if layer.average is not None:
                layer.average.blocked = lambda: not wrapped.require_backward_grad_sync
