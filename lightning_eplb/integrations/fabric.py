"""Lightning Fabric: wrapped optimizers, and gradient clipping by the norm of the whole model."""

from collections.abc import Iterable
from functools import partial
from typing import Any

from lightning.fabric import is_wrapped
from lightning.fabric.strategies.strategy import Strategy
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_eplb import _compat
from lightning_eplb.integrations.patches import replace
from lightning_eplb.parallel.clipping import clip_grad_norm_
from lightning_eplb.parallel.parallelize import expert_layers


def optimizer_within(optimizer: Any) -> Any:
    """Return the optimizer that Fabric has wrapped, or any other as it is."""
    return optimizer.optimizer if is_wrapped(optimizer) else optimizer


def clip_fabric_by_global_norm(wrapped: Iterable[object]) -> None:
    """Let ``fabric.clip_gradients(..., max_norm=...)`` use the norm of the whole model, as ``clip_grad_norm_`` does.

    Args:
        wrapped: Modules and optimizers that ``fabric.setup`` returned. Other objects are ignored.
    """
    for one in filter(is_wrapped, wrapped):
        strategy: Strategy = _compat.fabric_strategy(one)
        replace(strategy, "clip_gradients_norm", partial(_clip_gradients_norm, strategy))


def _clip_gradients_norm(
    strategy: Strategy,
    module: nn.Module,
    optimizer: Optimizer,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = True,
) -> Tensor:
    if not any(layer.groups.size > 1 for layer, _ in expert_layers(module)):
        plain = type(strategy).clip_gradients_norm
        return plain(strategy, module, optimizer, max_norm, norm_type, error_if_nonfinite)
    strategy.precision.unscale_gradients(optimizer)
    parameters = strategy.precision.main_params(optimizer)
    return clip_grad_norm_(module, max_norm, norm_type, error_if_nonfinite, parameters=parameters)
