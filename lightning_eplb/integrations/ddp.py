"""``DistributedDataParallel``: experts stay out of it, and parameters that it keeps equal are checked."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_eplb import _compat
from lightning_eplb.parallel.groups import ExpertGroups
from lightning_eplb.parallel.parallelize import expert_layers, layers_by_parameter

PIECE = 2**24
"""Elements summed at a time. Summing widens integers to 8 bytes, so this bounds memory."""
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def leave_experts_out_of_ddp(module: nn.Module) -> list[str]:
    """Keep the experts of ``module`` out of ``DistributedDataParallel``, and return their parameters' names.

    Each rank holds other experts, and the converted layers average their gradients themselves. ``EPLBCallback`` calls
    this. In a loop without Lightning's ``Trainer``, call it on every rank before DDP or ``fabric.setup`` wraps the
    module, on that very module.

    Example::

        parallelize_experts(model, num_redundant_experts=8)
        leave_experts_out_of_ddp(model)
        model = DistributedDataParallel(model)

    Args:
        module: Module that ``parallelize_experts`` has converted, or will have when DDP wraps it. Parameters that it
            already tells DDP to ignore stay ignored.

    Returns:
        Names of the parameters whose rows differ from rank to rank, as in ``module.named_parameters()``. Empty where
        one rank holds all experts. FSDP1 must ignore the same parameters (``ignored_states``).
    """
    ignored = getattr(module, _compat.IGNORED_BY_DDP, ())
    if not isinstance(ignored, _IgnoredByDDP):
        ignored = _IgnoredByDDP(module, ignored)
        setattr(module, _compat.IGNORED_BY_DDP, ignored)
    return ignored.names_of_experts()


def average_when_ddp_does(wrapped: nn.Module | None, module: nn.Module) -> None:
    """Average the experts' gradients over EP groups in those backward passes in which DDP averages all others."""
    if isinstance(wrapped, DistributedDataParallel):
        for layer, _ in expert_layers(module):
            if layer.gradient_sync is not None:
                layer.gradient_sync.block_while(lambda: not wrapped.require_backward_grad_sync)


def warn_if_out_of_sync(ddp: DistributedDataParallel, groups: ExpertGroups) -> bool:
    """Warn on rank 0 if parameters that DDP keeps equal differ between ranks. Collective.

    Args:
        ddp: See :func:`first_out_of_sync`.
        groups: See :func:`first_out_of_sync`.

    Returns:
        ``True`` if some parameter differs, the same on all ranks.
    """
    name = first_out_of_sync(ddp, groups)
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


def first_out_of_sync(ddp: DistributedDataParallel, groups: ExpertGroups) -> str | None:
    """Find the first parameter whose bits on some rank differ from rank 0's.

    Collective: all ranks call it between two optimizer steps, and all get the same answer.

    Args:
        ddp: Model after an optimizer step, whose gradients DDP has averaged.
        groups: Process groups of the experts, which ``ddp`` leaves alone.

    Returns:
        Name of the parameter; ``None`` if all parameters agree.
    """
    names = {id(parameter): name for name, parameter in ddp.module.named_parameters()}
    parameters = [parameter for parameter in _compat.ddp_parameters(ddp) if parameter.element_size() in _BITS]
    if not parameters:
        return None
    sums = torch.stack([_sum_of_bits(parameter.detach()) for parameter in parameters]).cpu()
    of_ranks = [torch.empty_like(sums) for _ in range(groups.world_size)]
    dist.all_gather(of_ranks, sums, group=groups.cpu_group)
    differs = (torch.stack(of_ranks) != of_ranks[0]).any(dim=0)
    return names[id(parameters[int(differs.int().argmax())])] if differs.any() else None


def _sum_of_bits(tensor: Tensor) -> Tensor:
    bits = tensor.reshape(-1).view(_BITS[tensor.element_size()])
    if len(bits) <= PIECE:
        return bits.sum()
    return torch.stack([piece.sum() for piece in bits.split(PIECE)]).sum()


class _IgnoredByDDP:
    """Names that DDP must ignore, evaluated when DDP asks: by then ``configure_model`` has run."""

    def __init__(self, module: nn.Module, others: Any) -> None:
        self._module = module
        self._others = others

    def __iter__(self) -> Iterator[str]:
        yield from self._others
        yield from self.names_of_experts()

    def names_of_experts(self) -> list[str]:
        layer_of = layers_by_parameter(self._module)
        return [
            name
            for name, parameter in self._module.named_parameters()
            if (layer := layer_of.get(id(parameter))) is not None and layer.groups.size > 1
        ]
