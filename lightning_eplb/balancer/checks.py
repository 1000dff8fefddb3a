"""Checks of what ``ExpertLoadBalancer`` is given. Errors are raised on all ranks alike."""

from collections.abc import Mapping, Sequence

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_eplb._validation import check_redundancy, check_steps, check_switches
from lightning_eplb.parallel.consensus import check_same_on_all_ranks
from lightning_eplb.parallel.expert_layer import ExpertLayer
from lightning_eplb.parallel.groups import ExpertGroups
from lightning_eplb.placement import ExpertPlacement
from lightning_eplb.relocation.plan import plan_relocation


def check_arguments(
    modules: Sequence[tuple[ExpertLayer, nn.Module]],
    window_size: int,
    step_interval: int,
    redundancy: str,
    min_tokens_per_copy: int | None,
    use_async: bool,
) -> None:
    """Check the arguments of ``ExpertLoadBalancer`` and warn of ineffective ones. Every rank must call it.

    Raises:
        ValueError: An argument is not valid, or ranks were given different ones.
    """
    check_steps(window_size=window_size, step_interval=step_interval)
    check_redundancy(redundancy, min_tokens_per_copy)
    check_switches(use_async=use_async)
    if not modules:
        raise ValueError("model has no converted MoE layer; call parallelize_experts(model) before")
    layer, _ = modules[0]
    _warn_of_ineffective_arguments(redundancy, min_tokens_per_copy, layer)
    arguments = {
        "window_size": window_size,
        "step_interval": step_interval,
        "redundancy": redundancy,
        "min_tokens_per_copy": min_tokens_per_copy,
        "use_async": use_async,
    }
    check_same_on_all_ranks(arguments, "ExpertLoadBalancer() compares its arguments", layer.groups)


def _warn_of_ineffective_arguments(redundancy: str, min_tokens_per_copy: int | None, layer: ExpertLayer) -> None:
    num_redundant = len(layer.physical_to_logical) - len(layer.row_order)
    if redundancy == "batch" and num_redundant == 0:
        rank_zero_warn(
            "redundancy='batch' has no effect with num_redundant_experts=0, as there are no redundant slots to fill."
            f" Use num_redundant_experts={layer.groups.size} for one on each rank."
        )
    if redundancy == "window" and min_tokens_per_copy is not None:
        rank_zero_warn(
            f"min_tokens_per_copy={min_tokens_per_copy} has no effect with redundancy='window', where the policy"
            " chooses the redundant experts. Use redundancy='batch'."
        )


def check_targets(
    given: ExpertPlacement | Mapping[str, ExpertPlacement] | None,
    current: Mapping[str, ExpertPlacement],
    groups: ExpertGroups,
) -> Mapping[str, ExpertPlacement] | None:
    """Check the placements that ``rearrange()`` was given. Every rank of the default group must call it.

    Args:
        given: Placements to rearrange to by model, the placement of the only model, or ``None`` to ask the policy.
        current: Current placement of each model.
        groups: Process groups of the experts.

    Returns:
        Placements to rearrange to by model; ``None`` to ask the policy.

    Raises:
        ValueError: Ranks were given different placements, a placement does not have the shape of the current one, or
            it is not clear for which model it is.
    """
    described = _describe(given)
    check_same_on_all_ranks({"placement": described}, "rearrange() moves experts between ranks", groups)
    if given is None:
        return None
    named = f"'{next(iter(current))}': ExpertPlacement(...)"
    if isinstance(given, ExpertPlacement):
        if len(current) > 1:
            raise ValueError(
                f"placement={described} is for one model, and the balancer has {list(current)}. Name its model, as in"
                f" {{{named}}}."
            )
        given = {next(iter(current)): given}
    if not isinstance(given, Mapping) or not all(isinstance(each, ExpertPlacement) for each in given.values()):
        several = f" or, by model, {{{named}}}" if len(current) > 1 else ""
        raise ValueError(f"placement={described} must be an ExpertPlacement{several}. Use None to ask the policy.")
    if unknown := [name for name in given if name not in current]:
        raise ValueError(f"placement={described} names {unknown[0]!r}; the models are {list(current)}")
    for name, target in given.items():
        plan_relocation(current[name], target)
    return given


def _describe(target: object) -> str:
    """Return a description that differs if a placement does."""
    if isinstance(target, ExpertPlacement):
        return f"{target!r} {target.digest().hex()[:16]}"
    if isinstance(target, Mapping):
        return "{" + ", ".join(f"{name!r}: {_describe(each)}" for name, each in sorted(target.items(), key=str)) + "}"
    return "None" if target is None else f"a {type(target).__name__}"
