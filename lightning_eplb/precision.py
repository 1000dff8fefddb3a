"""What Lightning's precision plugin does on each rank by itself and must do alike on all: clipping, and its scaler."""

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import FSDPStrategy
from torch.optim import Optimizer

from lightning_eplb.parallel.clipping import clip_grad_norm_, clip_grad_value_
from lightning_eplb.parallel.convert import expert_layers
from lightning_eplb.parallel.flat_parameters import shard_groups
from lightning_eplb.parallel.groups import ExpertGroups
from lightning_eplb.strategies import ExpertParallelStrategy


def clip_by_global_norm(trainer: "pl.Trainer", pl_module: "pl.LightningModule", groups: ExpertGroups) -> None:
    """Let the precision plugin, through which every clipping goes, use the norm of the whole model.

    Lightning clips each rank by the norm of the gradients it has; the experts of other ranks would be missing from it,
    and it refuses those of several meshes.
    """
    precision = trainer.precision_plugin
    experts = [parameter for _, module in expert_layers(pl_module) for parameter in module.parameters(recurse=False)]
    cut = shard_groups(trainer.strategy.model or pl_module)

    def clip_grad_by_norm(optimizer: Optimizer, clip_val: int | float) -> None:
        clip_grad_norm_(precision.main_params(optimizer), float(clip_val), experts, groups, cut)

    def clip_grad_by_value(optimizer: Optimizer, clip_val: int | float) -> None:
        clip_grad_value_(precision.main_params(optimizer), float(clip_val))

    if groups.size > 1 or isinstance(trainer.strategy, (ExpertParallelStrategy, FSDPStrategy)):
        precision.clip_grad_by_norm = clip_grad_by_norm  # type: ignore[method-assign]
        precision.clip_grad_by_value = clip_grad_by_value  # type: ignore[method-assign]


def clip_as_before(trainer: "pl.Trainer") -> None:
    """Undo :func:`clip_by_global_norm`."""
    for name in ("clip_grad_by_norm", "clip_grad_by_value"):
        vars(trainer.precision_plugin).pop(name, None)


def shared_scaler(trainer: "pl.Trainer") -> torch.amp.GradScaler | None:
    """The gradient scaler, where several ranks must agree about what it does."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler if scaler is not None and trainer.world_size > 1 else None
