"""Checks of the arguments of ``EPLBCallback``, before anything is known of the trainer and the model."""

import os
from typing import Any

from lightning_eplb._validation import check_redundancy, check_steps, check_switches, check_whole_numbers
from lightning_eplb.policies import Policy


def check_callback_arguments(
    *,
    num_redundant_experts: int,
    ep_size: int | None,
    policy: Policy | None,
    trace: str | os.PathLike | None,
    redundancy: str,
    min_tokens_per_copy: int | None,
    fused_experts: bool | None,
    initial_load: Any,
    steps: dict[str, int],
    switches: dict[str, bool],
) -> None:
    """Check what can be checked in ``__init__``.

    Args:
        num_redundant_experts: Argument of this name. So are all others but the last two.
        ep_size: Argument.
        policy: Argument.
        trace: Argument.
        redundancy: Argument.
        min_tokens_per_copy: Argument.
        fused_experts: Argument.
        initial_load: Argument.
        steps: Arguments that are numbers of optimizer steps, by name.
        switches: Arguments that are ``True`` or ``False``, by name.

    Raises:
        ValueError: A value is not valid.
        TypeError: ``initial_load`` is neither a path nor anything like an array.
    """
    check_redundancy(redundancy, min_tokens_per_copy)
    check_steps(**steps)
    check_whole_numbers(num_redundant_experts=num_redundant_experts)
    check_switches(**switches)
    if fused_experts is not None:
        check_switches(fused_experts=fused_experts)
    if ep_size is not None:
        check_whole_numbers(ep_size=ep_size)
    if num_redundant_experts < 0:
        raise ValueError(f"num_redundant_experts={num_redundant_experts} must not be negative. Use 0 for none.")
    if ep_size is not None and ep_size < 1:
        raise ValueError(f"ep_size={ep_size} must be at least 1. Use None for all data-parallel ranks.")
    if policy is not None and not isinstance(policy, Policy):
        raise ValueError(f"policy={policy!r} must be a lightning_eplb.Policy, such as BalancedPolicy(), or None.")
    if trace is not None and os.path.isdir(trace):
        raise ValueError(
            f"trace={str(trace)!r} is a folder. Name a file, such as {os.path.join(trace, 'trace.npy')!r}."
        )
    is_path_or_array = isinstance(initial_load, os.PathLike) or hasattr(initial_load, "__len__")
    if initial_load is not None and not is_path_or_array:
        raise TypeError(
            f"initial_load={initial_load!r} must be a path, or counts of tokens [layers, experts] or [steps, layers,"
            " experts]. Use None to start from the model's own order of experts."
        )
