"""Gradient hooks on expert parameters, which get the gradients of all experts in logical order.

A rank has some rows of a parameter, in the order of the placement. A hook was written for the unmodified model, such as
a mask by expert index or a norm over all experts. So it gets the gradient that one process with the batches of all
ranks would have, ``[L, ...]``, and this rank keeps its own rows of the result. Ranks gather the gradient for each hook.

A hook may use the gradient only. Weights of other ranks' experts are not gathered, and reading weights is an error.
"""

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode

from lightning_eplb import _compat
from lightning_eplb.parallel.dtensor import sharded_parameters
from lightning_eplb.parallel.expert_data_parallel import ExpertGradientSync
from lightning_eplb.parallel.groups import ExpertGroups
from lightning_eplb.parallel.packing import to_device
from lightning_eplb.parallel.row_exchange import all_gather_single

FINGERPRINT_BITS = 21
"""Bits of the number that ranks compare."""

NOT_UNDER_FSDP = (
    "which ExpertParallelStrategy and fully_shard would run with a shard of it, or not at all. Use strategy='ddp' or"
    " FSDPStrategy()."
)
"""Reason why a hook on an expert parameter is not supported under FSDP2, and the remedy."""


class HookedLayer(Protocol):
    """Attributes of :class:`~lightning_eplb.parallel.expert_layer.ExpertLayer` that hooks use."""

    name: str
    gradient_sync: ExpertGradientSync | None

    @property
    def groups(self) -> ExpertGroups: ...

    @property
    def row_order(self) -> Tensor: ...

    @property
    def local_experts(self) -> Tensor: ...


def wrap_hooks(module: nn.Module, layer: HookedLayer) -> int:
    """Let users' hooks on a layer's parameters get the gradients of all experts. Called in each forward pass.

    They run before the sync of gradients over EP groups. Their handles stay valid. Hooks on sharded parameters stay as
    they are, and :func:`check_hooks` raises for them.

    Returns:
        Fingerprint of the number of hooks on each parameter, below ``2**FINGERPRINT_BITS``. 0 if there are none.
    """
    parameters = list(module.parameters(recurse=False))
    if _is_sharded(module):
        return int(has_hooks([*parameters, *sharded_parameters(module)]))
    numbers = [
        _wrap(hooks, kind, parameters, layer)
        for parameter in parameters
        for hooks, kind in zip(_compat.gradient_hooks(parameter), (_GradientHook, _PostAccumulateHook), strict=True)
    ]
    if not any(numbers):
        return 0
    return 1 + zlib.crc32(repr(numbers).encode()) % (2**FINGERPRINT_BITS - 1)


def has_hooks(parameters: Iterable[Tensor]) -> bool:
    """Return ``True`` if a user has registered a hook on one of the parameters."""
    return any(True for parameter in parameters for _ in _users_hooks(parameter))


def check_hooks(fingerprints_R: np.ndarray, module: nn.Module, layer: HookedLayer) -> bool:
    """Return ``True`` if the layer has hooks, the same on all ranks. Each rank of the EP group calls it.

    Args:
        fingerprints_R: Return values of :func:`wrap_hooks` on all EP ranks.
        module: Module of the layer.
        layer: State of the layer.

    Raises:
        ValueError: Hooks differ between ranks, or ``fully_shard`` has the parameters. All ranks raise it.
    """
    if fingerprints_R.any() and _is_sharded(module):
        raise ValueError(f"a parameter of {layer.name} has a gradient hook, {NOT_UNDER_FSDP}")
    mismatched = np.flatnonzero(fingerprints_R != fingerprints_R[0]).tolist()
    if mismatched:
        raise ValueError(
            f"EP ranks {mismatched} have other gradient hooks on the parameters of {layer.name} than EP rank 0. A hook"
            " gets the gradients of all experts, which ranks gather for it. Register the same hooks on every rank."
        )
    return bool(fingerprints_R[0])


def check_wrapped(parameters: Sequence[nn.Parameter], layer: HookedLayer) -> None:
    """Raise ``ValueError`` for a hook that was registered between the forward and the backward pass."""
    for parameter in parameters:
        if any(not isinstance(hook, _GlobalHook) for hook in _users_hooks(parameter)):
            raise ValueError(
                f"a gradient hook was registered on a parameter of {layer.name} between its forward and its backward"
                " pass. Register it before the forward pass."
            )


def check_unhooked(module: nn.Module, name: str, reason: str) -> None:
    """Raise ``ValueError`` if a parameter of ``module`` itself has a hook, since it would be lost."""
    for parameter_name, parameter in module.named_parameters(recurse=False):
        if has_hooks([parameter]):
            full_name = f"{name}.{parameter_name}" if name else parameter_name
            raise ValueError(f"{full_name} has a gradient hook, {reason}")


class _GlobalHook:
    """User's hook, which autograd calls with this rank's rows. All ranks of the layer's groups call it alike.

    Args:
        hook: Hook of the user.
        parameters: Parameters of the layer.
        layer: State of the layer.
    """

    def __init__(self, hook: Callable[[Tensor], Any], parameters: Sequence[nn.Parameter], layer: HookedLayer) -> None:
        self._hook, self._layer = hook, layer
        self._ids = {id(parameter) for parameter in parameters}

    def _gathered(self, rows: Tensor) -> Tensor:
        """Gather the gradient of all experts over the batches of all ranks, ``[L, ...]`` in logical order."""
        groups = self._layer.groups
        assert groups.ep_group is not None
        with torch.no_grad():
            if self._layer.gradient_sync is not None:
                rows = rows.clone(memory_format=torch.contiguous_format)
                dist.all_reduce(rows, group=groups.edp_group)
                rows /= groups.num_ep_groups
            of_ranks = rows.new_empty(groups.size * len(rows), *rows.shape[1:])
            all_gather_single(of_ranks, rows.contiguous(), group=groups.ep_group)
            return of_ranks[to_device(torch.argsort(self._layer.row_order).numpy(), rows.device)]

    def _own_rows(self, whole: Any, shape: torch.Size) -> Tensor:
        if not isinstance(whole, Tensor) or whole.shape != shape:
            made = list(whole.shape) if isinstance(whole, Tensor) else type(whole).__name__
            raise ValueError(
                f"a gradient hook on a parameter of {self._layer.name} returned a gradient of shape {made}. It must be"
                f" that of all experts, {list(shape)}."
            )
        with torch.no_grad():
            return whole.detach()[to_device(self._layer.local_experts.numpy(), whole.device)]


class _GradientHook(_GlobalHook):
    """Hook of ``Tensor.register_hook``."""

    def __call__(self, grad: Tensor) -> Tensor:
        whole = self._gathered(grad)
        with _ForbidWeights(self._ids, _METADATA, self._layer.name):
            changed = self._hook(whole)
        return self._own_rows(whole if changed is None else changed, whole.shape)


class _PostAccumulateHook(_GlobalHook):
    """Hook of ``Tensor.register_post_accumulate_grad_hook``: ``parameter.grad`` has all experts while it runs."""

    def __call__(self, parameter: Tensor) -> None:
        rows, grad = parameter.data, parameter.grad
        whole = None if grad is None else self._gathered(grad)
        shape = torch.Size((len(self._layer.row_order), *rows.shape[1:]))
        parameter.grad = None
        parameter.data = rows.new_zeros(()).expand(shape)
        parameter.grad = whole
        try:
            with _ForbidWeights(self._ids, _METADATA | _GRADIENT_ACCESS, self._layer.name):
                self._hook(parameter)
            changed = parameter.grad
        finally:
            parameter.grad = None
            parameter.data = rows
            parameter.grad = grad
        if changed is None or grad is None:
            parameter.grad = None if changed is None else self._own_rows(changed, shape)
        else:
            grad.copy_(self._own_rows(changed, shape))


class _ForbidWeights(TorchFunctionMode):
    """Mode in which parameters of the layer can be passed to ``allowed`` functions only."""

    def __init__(self, ids: set[int], allowed: set[Callable[..., Any]], name: str) -> None:
        super().__init__()
        self._ids, self._allowed, self._name = ids, allowed, name

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in self._allowed and any(id(tensor) in self._ids for tensor in _leaves([args, kwargs])):
            raise ValueError(
                f"a gradient hook on a parameter of {self._name} uses the parameter itself"
                f" ({getattr(func, '__name__', func)}): it is given the gradients of all experts, and a rank has the"
                " weights of some. Use the gradient alone; read weights, change them or step an optimizer after the"
                " backward pass"
            )
        return func(*args, **kwargs)


_METADATA = {
    getattr(Tensor, name).__get__ for name in ("requires_grad", "is_leaf", "dtype", "device", "layout", "is_cuda")
}
_GRADIENT_ACCESS = {
    Tensor.grad.__get__,  # type: ignore[attr-defined]
    Tensor.grad.__set__,  # type: ignore[attr-defined]
    Tensor.grad.__delete__,  # type: ignore[attr-defined]
    Tensor.shape.__get__,  # type: ignore[attr-defined]
    Tensor.ndim.__get__,  # type: ignore[attr-defined]
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
}


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, dict):
        yield from _leaves(list(value.values()))
    else:
        yield value


def _users_hooks(parameter: Tensor) -> Iterator[Any]:
    for hooks in _compat.gradient_hooks(parameter):
        yield from (hook for hook in (hooks or {}).values() if not _is_ours(hook))


def _is_sharded(module: nn.Module) -> bool:
    return isinstance(module, FSDPModule) or any(isinstance(p, DTensor) for p in module.parameters(recurse=False))


def _is_ours(hook: Any) -> bool:
    return isinstance(getattr(hook, "__self__", None), ExpertGradientSync)


def _wrap(
    hooks: dict[int, Any] | None,
    kind: type[_GlobalHook],
    parameters: Sequence[nn.Parameter],
    layer: HookedLayer,
) -> int:
    """Wrap the user's hooks of a parameter in place, and let ours run last. Return the number of wrapped hooks."""
    if not hooks:
        return 0
    ours = {key: hook for key, hook in hooks.items() if _is_ours(hook)}
    if len(hooks) == len(ours):
        return 0
    for key, hook in hooks.items():
        if key not in ours and not isinstance(hook, _GlobalHook):
            hooks[key] = kind(hook, parameters, layer)
    for key, hook in ours.items():
        del hooks[key]
        hooks[key] = hook
    return len(hooks) - len(ours)
