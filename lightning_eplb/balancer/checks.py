"""Checks of what ``ExpertLoadBalancer`` is given. Errors are raised on all ranks alike."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

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


def check_target(target: ExpertPlacement | None, current: ExpertPlacement, groups: ExpertGroups) -> None:
    """Check the placement that ``rearrange()`` was given. Every rank of the default group must call it.

    Args:
        target: Placement to rearrange to, ``None`` to ask the policy.
        current: Current placement.
        groups: Process groups of the experts.

    Raises:
        ValueError: Ranks were given different placements, or the placement does not have the shape of ``current``.
    """
    check_same_on_all_ranks({"placement": _describe(target)}, "rearrange() moves experts between ranks", groups)
    if target is None:
        return
    if not isinstance(target, ExpertPlacement):
        raise ValueError(f"placement={_describe(target)} must be an ExpertPlacement. Use None to ask the policy.")
    plan_relocation(current, target)


def check_saved_state(state: Mapping[str, Any], window_shape: Sequence[int], groups: ExpertGroups) -> None:
    """Check the state that ``load_state_dict()`` was given. Every rank of the default group must call it.

    Args:
        state: State as ``ExpertLoadBalancer.state_dict()`` returns it.
        window_shape: Shape of the window's steps, ``[Y, L]``.
        groups: Process groups of the experts.

    Raises:
        ValueError: Ranks were given different states, or the window has other layers or experts.
    """
    window_WYL = state["window"]
    digest = hashlib.sha256(window_WYL.cpu().numpy().tobytes()).hexdigest()[:16]
    values = {key: state[key] for key in ("num_steps", "steps_to_go", "num_rearrangements")}
    values["window"] = f"{list(window_WYL.shape)} {digest}"
    check_same_on_all_ranks(values, "load_state_dict() of the balancer compares the states of the ranks", groups)
    if tuple(window_WYL.shape[1:]) != tuple(window_shape):
        raise ValueError(
            f"the saved window has {list(window_WYL.shape[1:])} layers and experts, the model has"
            f" {list(window_shape)}. Resume with the model that was saved."
        )


def _describe(target: object) -> str:
    """Return a description that differs if the placement does."""
    if isinstance(target, ExpertPlacement):
        return f"{target!r} {target.digest().hex()[:16]}"
    return "None" if target is None else f"a {type(target).__name__}"
