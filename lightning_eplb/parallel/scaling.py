"""Mixed precision with a gradient scaler: one rank's overflow is everyone's."""

import torch
import torch.distributed as dist
from torch.optim import Optimizer

from lightning_eplb import _compat
from lightning_eplb.parallel.groups import ExpertGroups


def share_overflow(scaler: torch.amp.GradScaler, optimizer: Optimizer, groups: ExpertGroups) -> None:
    """Let all ranks skip a step and lower their scale, if one must. All ranks call it, after ``scaler.unscale_()``.

    An overflow in an expert's gradient is seen by the rank that holds the expert only. If that rank alone skipped the
    step, the others' copies of all else would drift from its own.

    Args:
        scaler: Of this rank; enabled.
        optimizer: Whose gradients were unscaled.
        groups: As the converted modules' ``expert_layer.groups``.
    """
    found = _compat.found_overflow(scaler, optimizer)
    overflow = torch.stack([one.detach().cpu().reshape(()) for one in found]).max() if found else torch.zeros(())
    dist.all_reduce(overflow, op=dist.ReduceOp.MAX, group=groups.control)
    for one in found:
        one.fill_(float(overflow))


def check_scaled_optimizer(optimizer: Optimizer) -> None:
    """Raise ``ValueError`` for an optimizer that looks for overflows within its step, where they can't be shared."""
    if _compat.unscales_in_step(optimizer):
        raise ValueError(
            f"{type(optimizer).__name__}(fused=True) looks for overflows of its own rank only, and with"
            " precision='16-mixed' every rank would skip other steps; foreach=True or precision='bf16-mixed' would do"
        )
