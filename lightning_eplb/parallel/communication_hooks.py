"""Checks of DDP communication hooks, which must average gradients over all ranks.

Expert layers average their own gradients over all ranks. A hook that sums would scale all other gradients by the number
of ranks.
"""

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook, quantization_hooks
from torch.nn.parallel import DistributedDataParallel

from lightning_eplb import _compat

_SUPPORTED = (
    default_hooks.allreduce_hook,
    default_hooks.fp16_compress_hook,
    default_hooks.bf16_compress_hook,
    powerSGD_hook.powerSGD_hook,
    powerSGD_hook.batched_powerSGD_hook,
    quantization_hooks.quantization_pertensor_hook,
    quantization_hooks.quantization_perchannel_hook,
)
_WRAPPERS = (default_hooks.fp16_compress_wrapper, default_hooks.bf16_compress_wrapper)
_WRAPPED_CODES = [wrapper(default_hooks.allreduce_hook).__code__ for wrapper in _WRAPPERS]
"""Code objects of the closures that the wrappers return."""


def check_averages(source: str, hook: Callable, state: Any = None, wrapper: Callable | None = None) -> None:
    """Raise ``ValueError`` unless a communication hook averages gradients over all ranks. Needs no communication.

    Args:
        source: Call that the hook was passed to, for the message.
        hook: Communication hook, called by DDP with ``state`` and a bucket of gradients.
        state: First argument of the hook.
        wrapper: Wrapper that is applied to ``hook`` before it is registered.
    """
    if wrapper is not None and wrapper not in _WRAPPERS:
        raise ValueError(
            f"{source} in {_name_of(wrapper)} is not supported with expert parallelism: expert gradients are averaged"
            " over all ranks, and so must all others be. Use"
            f" {' or '.join(_name_of(each) for each in _WRAPPERS)}, or no wrapper"
        )
    inner = _unwrapped(hook)
    if inner not in _SUPPORTED and inner is not _compat.ddp_mixed_precision_hook():
        raise ValueError(
            f"{source} is not supported with expert parallelism: expert gradients are averaged over all ranks, and so"
            f" must all others be, which {_name_of(inner)} may not do. Use one of torch's hooks that"
            f" average, {', '.join(_name_of(each) for each in _SUPPORTED)}, or none"
        )
    group = state if isinstance(state, dist.ProcessGroup) else getattr(state, "process_group", None)
    if isinstance(group, dist.ProcessGroup) and group.size() != dist.get_world_size():
        raise ValueError(
            f"{source} averages gradients over a process group of {group.size()} ranks, and expert gradients are"
            f" averaged over all {dist.get_world_size()}. Leave the process group out of the hook's state."
        )


def check_registered_hooks(ddp: DistributedDataParallel) -> None:
    """Raise ``ValueError`` if a registered hook of ``ddp`` does not average over all ranks."""
    for hook, state in _compat.ddp_comm_hooks(ddp):
        check_averages(f"DistributedDataParallel.register_comm_hook(hook={_name_of(hook)})", hook, state)


def _name_of(hook: Any) -> str:
    return getattr(hook, "__name__", repr(hook))


def _unwrapped(hook: Any) -> Any:
    """Return the hook inside torch's wrappers."""
    while getattr(hook, "__code__", None) in _WRAPPED_CODES:
        (cell,) = hook.__closure__
        hook = cell.cell_contents
    return hook
