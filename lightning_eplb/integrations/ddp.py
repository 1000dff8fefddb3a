"""What ``DistributedDataParallel`` must know of experts: they differ from rank to rank."""

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_eplb import _compat
from lightning_eplb.parallel.convert import expert_layers


def leave_experts_out_of_ddp(module: nn.Module) -> list[str]:
    """Let ``DistributedDataParallel`` leave the experts of ``module`` alone, and return their parameters' names.

    Ranks hold other experts each, and the converted layers average their gradients. ``EPLBCallback`` calls this; in a
    loop without Lightning's ``Trainer`` call it on every rank, on the very module that DDP or ``fabric.setup`` is to
    wrap, and before.

    Example::

        parallelize_experts(model, num_redundant_experts=8)
        leave_experts_out_of_ddp(model)
        model = DistributedDataParallel(model)

    Args:
        module: Converted by ``parallelize_experts`` now or before DDP wraps it. What it tells DDP to ignore already is
            kept.

    Returns:
        Names as in ``module.named_parameters()``, of the parameters whose rows are other experts on each rank: none
        where a rank holds all experts. FSDP1 must ignore the same ones (``ignored_states``).
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
            if layer.average is not None:
                layer.average.blocked = lambda: not wrapped.require_backward_grad_sync


class _IgnoredByDDP:
    """The names that DDP must leave alone, looked up when DDP asks: by then ``configure_model`` has run."""

    def __init__(self, module: nn.Module, others: Any) -> None:
        self._module = module
        self._others = others

    def __iter__(self) -> Iterator[str]:
        yield from self._others
        yield from self.names_of_experts()

    def names_of_experts(self) -> list[str]:
        experts = {
            id(parameter)
            for layer, module in expert_layers(self._module)
            if layer.groups.size > 1
            for parameter in module.parameters(recurse=False)
        }
        return [name for name, parameter in self._module.named_parameters() if id(parameter) in experts]
