"""Lightning's precision plugin: gradient clipping by the norm of the whole model, and the gradient scaler."""

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim import Optimizer

from lightning_eplb.integrations.patches import replace, restore
from lightning_eplb.parallel.clipping import clip_by_norm_of_all_, clip_grad_value_
from lightning_eplb.parallel.fsdp1_parameters import shard_groups
from lightning_eplb.parallel.groups import ExpertGroups
from lightning_eplb.parallel.parallelize import expert_layers
from lightning_eplb.strategies import ExpertParallelStrategy


def clip_by_global_norm(trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
    """Let the precision plugin, through which every clipping goes, clip by the norm of the whole model.

    Lightning clips by the norm of a rank's own gradients, without the experts of other ranks, and does not support
    several meshes. The model is looked up at the first clipping: it may be built later than this call, and
    ``LearningRateFinder`` trains before ``on_fit_start``.
    """
    clip_as_before(trainer)
    precision = trainer.precision_plugin
    plain_by_norm, plain_by_value = precision.clip_grad_by_norm, precision.clip_grad_by_value

    @functools.cache
    def model() -> _Clipped | None:
        layers = list(expert_layers(pl_module))
        groups = layers[0][0].groups if layers else ExpertGroups()
        if groups.size == 1 and not isinstance(trainer.strategy, (ExpertParallelStrategy, FSDPStrategy)):
            return None
        experts = [parameter for _, module in layers for parameter in module.parameters(recurse=False)]
        return _Clipped(experts, groups, shard_groups(trainer.strategy.model or pl_module))

    def clip_grad_by_norm(optimizer: Optimizer, clip_val: int | float) -> None:
        if (clipped := model()) is None:
            plain_by_norm(optimizer, clip_val)
        else:
            clip_by_norm_of_all_(precision.main_params(optimizer), float(clip_val), *clipped)

    def clip_grad_by_value(optimizer: Optimizer, clip_val: int | float) -> None:
        if model() is None:
            plain_by_value(optimizer, clip_val)
        else:
            clip_grad_value_(precision.main_params(optimizer), float(clip_val))

    replace(precision, "clip_grad_by_norm", clip_grad_by_norm)
    replace(precision, "clip_grad_by_value", clip_grad_by_value)


def clip_fsdp_by_global_norm(wrapped: nn.Module | None, pl_module: "pl.LightningModule", groups: ExpertGroups) -> None:
    """Let ``FullyShardedDataParallel.clip_grad_norm_`` clip by the norm of the whole model.

    FSDP takes the parameters that it ignores to be the same on all ranks.
    """
    if not isinstance(wrapped, FullyShardedDataParallel) or groups.size == 1:
        return
    experts = [parameter for _, module in expert_layers(pl_module) for parameter in module.parameters(recurse=False)]

    def clip(max_norm: float | int, norm_type: float | int = 2.0) -> Tensor:
        if norm_type != 2:
            raise ValueError(f"norm_type={norm_type} is not supported with EPLBCallback. Use 2.0.")
        return clip_by_norm_of_all_(wrapped.parameters(), float(max_norm), experts, groups, shard_groups(wrapped))

    replace(wrapped, "clip_grad_norm_", clip)


class _Clipped(NamedTuple):
    """Arguments of :func:`~lightning_eplb.parallel.clipping.clip_by_norm_of_all_`."""

    expert_parameters: Sequence[Tensor]
    groups: ExpertGroups
    shard_groups: Mapping[int, dist.ProcessGroup]


def clip_as_before(trainer: "pl.Trainer") -> None:
    """Undo :func:`clip_by_global_norm`."""
    restore(trainer.precision_plugin, "clip_grad_by_norm", "clip_grad_by_value")


def shared_scaler(trainer: "pl.Trainer") -> torch.amp.GradScaler | None:
    """Return the gradient scaler if several ranks must agree on its decisions."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler if scaler is not None and trainer.world_size > 1 else None
