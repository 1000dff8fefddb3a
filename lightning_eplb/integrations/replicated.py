"""What ``DistributedDataParallel`` keeps the same on all ranks, and whether it still is."""

import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from lightning_eplb import _compat
from lightning_eplb.parallel.groups import ExpertGroups

PIECE = 2**24
"""Elements that are added up at a time: integers are widened for that, which takes memory."""
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def warn_of_drift(ddp: DistributedDataParallel, groups: ExpertGroups) -> bool:
    """Where ranks change what DDP averages each by its own experts, they would drift apart in silence: rank 0 warns.

    For who must call it, and for the arguments, see :func:`first_that_differs`.

    Returns:
        Whether there was something to warn of, the same on all ranks.
    """
    name = first_that_differs(ddp, groups)
    if name is None:
        return False
    rank_zero_warn(
        f"{name} is no longer the same on all ranks, though DistributedDataParallel gives all the same gradient."
        " Each rank has other experts: whatever is computed of all gradients or weights differs, as the norm in"
        " torch.nn.utils.clip_grad_norm_(self.parameters(), ...) does. Trainer(gradient_clip_val=...),"
        " self.clip_gradients(optimizer, ...) and, in a loop of your own, lightning_eplb.clip_grad_norm_(model, ...)"
        " clip by the norm of the whole model"
    )
    return True


def first_that_differs(ddp: DistributedDataParallel, groups: ExpertGroups) -> str | None:
    """The first parameter whose bits are others on some rank than on rank 0; ``None`` where all are the same.

    All ranks must call it, between two optimizer steps, and all are told the same.

    Args:
        ddp: Has updated its parameters by the gradients that it averages, the same on every rank.
        groups: Of the experts, which ``ddp`` leaves alone.
    """
    names = {id(parameter): name for name, parameter in ddp.module.named_parameters()}
    parameters = [parameter for parameter in _compat.ddp_parameters(ddp) if parameter.element_size() in _BITS]
    if not parameters:
        return None
    sums = torch.stack([_sum_of_bits(parameter.detach()) for parameter in parameters]).cpu()
    of_ranks = [torch.empty_like(sums) for _ in range(groups.world_size)]
    dist.all_gather(of_ranks, sums, group=groups.control)
    differs = (torch.stack(of_ranks) != of_ranks[0]).any(dim=0)
    return names[id(parameters[int(differs.int().argmax())])] if differs.any() else None


def _sum_of_bits(tensor: Tensor) -> Tensor:
    bits = tensor.reshape(-1).view(_BITS[tensor.element_size()])
    if len(bits) <= PIECE:
        return bits.sum()
    return torch.stack([piece.sum() for piece in bits.split(PIECE)]).sum()
