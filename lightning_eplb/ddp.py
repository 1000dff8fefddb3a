"""What ``DistributedDataParallel`` must know of experts: they differ from rank to rank."""

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_eplb.parallel.convert import expert_layers


def keep_experts_from_ddp(module: nn.Module) -> None:
    """Let ``DistributedDataParallel`` leave alone what is an expert's when it wraps ``module``."""
    ignored = getattr(module, "_ddp_params_and_buffers_to_ignore", ())
    if not isinstance(ignored, _IgnoredByDDP):
        module._ddp_params_and_buffers_to_ignore = _IgnoredByDDP(module, ignored)  # type: ignore[assignment]


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
        experts = {
            id(parameter)
            for layer, module in expert_layers(self._module)
            if layer.groups.size > 1
            for parameter in module.parameters(recurse=False)
        }
        yield from (name for name, parameter in self._module.named_parameters() if id(parameter) in experts)
