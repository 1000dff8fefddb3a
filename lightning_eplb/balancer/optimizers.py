"""Optimizers whose state moves with the experts: their checks, their hooks, and the expert parameters they hold."""

from collections.abc import Iterable, Sequence

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_eplb.checkpoint import install_optimizer_hooks
from lightning_eplb.integrations.fabric import clip_fabric_by_global_norm, optimizer_within
from lightning_eplb.parallel.parallelize import ConvertedExperts
from lightning_eplb.relocation.optimizer_check import check_optimizers


def prepare_optimizers(
    optimizers: Iterable[Optimizer],
    model: nn.Module,
    modules: Sequence[ConvertedExperts],
    use_async: bool,
) -> list[Optimizer]:
    """Make state dicts those of the unmodified model, and Fabric's clipping that of all experts.

    Args:
        optimizers: Optimizers, in Fabric's wrappers if they have any.
        model: Converted model.
        modules: Its expert layers with their modules.
        use_async: Rows will move during steps.

    Returns:
        The optimizers without Fabric's wrappers.

    Raises:
        ValueError: On all ranks, if an optimizer mixes experts, or its state for them can't move with them.
    """
    given = list(optimizers)
    unwrapped = [optimizer_within(optimizer) for optimizer in given]
    first_layer, _ = modules[0]
    if first_layer.groups.size > 1:
        check_optimizers(unwrapped, expert_parameters(modules), use_async)
    clip_fabric_by_global_norm([model, *given])
    for optimizer in unwrapped:
        install_optimizer_hooks(optimizer, model)
    return unwrapped


def expert_parameters(modules: Sequence[ConvertedExperts]) -> dict[str, Tensor]:
    """Return this rank's expert parameters by name."""
    return {name: parameter for experts in modules for name, parameter in experts.parameters.items()}


def updates_experts(optimizer: Optimizer, optimizers: Iterable[Optimizer], modules: Sequence[ConvertedExperts]) -> bool:
    """Return whether rows in flight must be committed before a step of ``optimizer``.

    That is the case if it holds experts, or if no optimizer does, as when all experts are frozen.

    Args:
        optimizer: Optimizer that is about to step.
        optimizers: All optimizers that the balancer knows.
        modules: Expert layers with their modules.
    """
    experts = {id(parameter) for parameter in expert_parameters(modules).values()}

    def holds_experts(each: Optimizer) -> bool:
        return any(id(parameter) in experts for group in each.param_groups for parameter in group["params"])

    return holds_experts(optimizer) or not any(map(holds_experts, optimizers))
