"""Extra arguments of the experts' call, beyond the protocol's three: passed on, or dispatched with the tokens.

A tensor whose first dimension is the number of tokens, on every rank, has a row for each token and is dispatched with
it. Everything else must be the same on all ranks, since an expert computes the tokens of all ranks. Ranks exchange
descriptions of their arguments before a token travels, so that all ranks make the same decision and raise the same
error.

Shape suffixes: ``T`` tokens, ``K`` top-k, ``L`` logical experts, ``M`` rows that a rank computes, ``D`` model width,
``R`` ranks.
"""

import enum
import hashlib
import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_eplb.parallel.dispatch import TokenDispatcher
from lightning_eplb.parallel.gradient_hooks import FINGERPRINT_BITS
from lightning_eplb.parallel.groups import ExpertGroups
from lightning_eplb.parallel.ties import TieGradients

HAS_EXTRA_ARGUMENTS = 2**FINGERPRINT_BITS
"""Flag in a rank's payload, above the fingerprint of its gradient hooks."""

_PLAIN = (bool, int, float, complex, str, bytes, type(None), enum.Enum, np.generic, torch.dtype, torch.Size)
_SENT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class CallArguments(NamedTuple):
    """Extra arguments as the original forward takes them."""

    args: Sequence[Any]
    kwargs: dict[str, Any]


class CallSizes(NamedTuple):
    """Sizes of one call that a dimension of an argument could equal by chance.

    Attributes:
        top_k: Number of choices of a token, ``K``.
        num_experts: Number of logical experts, ``L``.
        of_experts: Sizes of the experts' parameters, and ``D``.
    """

    top_k: int
    num_experts: int
    of_experts: frozenset[int]


class _Description(NamedTuple):
    """Description of an argument that ranks exchange.

    Attributes:
        text: All that must be the same on all ranks.
        shape: Shape of a tensor.
        error: Reason why the argument is not supported.
    """

    text: str
    shape: tuple[int, ...] | None = None
    error: str = ""

    def __str__(self) -> str:
        return self.text if self.shape is None else f"{self.text} of shape {list(self.shape)}"


@dataclass(eq=False)
class ExtraArguments:
    """Extra arguments of one call.

    Attributes:
        positional: Names of those that are given by position, in order.
        values: Values by name.
        rows: Names of those that have a row for each token.
    """

    positional: list[str]
    values: dict[str, Any]
    rows: list[str] = field(default_factory=list)
    _handles: dict[str, Any] = field(default_factory=dict)

    @property
    def is_given(self) -> bool:
        """``True`` if any argument is given. ``None`` means the same as no argument."""
        return any(value is not None for value in self.values.values())

    def dispatch(self, dispatcher: TokenDispatcher, handle: Any) -> None:
        """Send the rows of this rank's tokens, after the tokens, whose handle is given."""
        flat = {name: _flat(self.values[name]) for name in self.rows}
        self._handles = {name: dispatcher.dispatch_argument(handle, rows) for name, rows in flat.items()}

    def receive(
        self, dispatcher: TokenDispatcher, part: int, own_MD: Tensor, others_MD: Tensor
    ) -> tuple[Tensor, CallArguments, Tensor, CallArguments]:
        """Wait for the rows of a part: those of ``own_MD``, for primaries, and of ``others_MD``, for redundant experts.

        Tensors that get a gradient are tied to the tokens. So every rank enters each collective of the backward pass
        and has a gradient for each parameter among them, used or not.
        """
        own: dict[str, Tensor] = {}
        others: dict[str, Tensor] = {}
        for name, handle in self._handles.items():
            for rows, received in zip((own, others), dispatcher.receive_argument(handle, part), strict=True):
                rows[name] = _unflat(received, self.values[name])
        same = {name: v for name, v in self.values.items() if isinstance(v, Tensor) and name not in self.rows}
        tied = [(values, name) for values in (own, others, same) for name, v in values.items() if v.requires_grad]
        if tied and torch.is_grad_enabled():
            own_MD, others_MD, *tensors = TieGradients.apply(
                own_MD, others_MD, *(values[name] for values, name in tied)
            )
            for (values, name), tensor in zip(tied, tensors, strict=True):
                values[name] = tensor
        return own_MD, self._with(same | own), others_MD, self._with(same | others)

    def sample(self) -> CallArguments:
        """Return arguments for one token of zeros."""
        return self._with({k: self.values[k].new_zeros(1, *self.values[k].shape[1:]) for k in self.rows})

    def without_tokens(self, detached: bool = False) -> CallArguments:
        """Return arguments for a call without tokens.

        Args:
            detached: Detach all tensors. Defaults to ``False``.
        """
        changes = {name: self.values[name][:0] for name in self.rows}
        if detached:
            tensors = {name: value for name, value in self.values.items() if isinstance(value, Tensor)}
            changes = {name: value.detach() for name, value in (tensors | changes).items()}
        return self._with(changes)

    def trained(self) -> list[Tensor]:
        """Return the tensors that get a gradient."""
        return [value for value in self.values.values() if isinstance(value, Tensor) and value.requires_grad]

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters of modules among the arguments, which all experts share."""
        return [p for value in self.values.values() if isinstance(value, nn.Module) for p in value.parameters()]

    def _with(self, changes: dict[str, Tensor]) -> CallArguments:
        values = self.values | changes
        args = [values[name] for name in self.positional]
        return CallArguments(args, {name: value for name, value in values.items() if name not in self.positional})


class ExtraArgumentResolver:
    """Resolver of the extra arguments of a layer that have a row for each token. It remembers its findings.

    Args:
        name: Name of the layer, for messages.
        module_class: Original class of the layer. Its attribute ``token_arguments`` may name the arguments that have a
            row for each token, for cases in which shapes don't tell.
    """

    def __init__(self, name: str, module_class: type[nn.Module]) -> None:
        self._signature = inspect.signature(module_class.forward)
        parameters = list(self._signature.parameters.values())[1:]
        self._names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        self._where, self._class = f"{name} ({module_class.__name__})", module_class.__name__
        self._declared: Sequence[str] | None = getattr(module_class, "token_arguments", None)
        self._known: dict[str, bool] = {}

    def bind(self, args: Sequence[Any], kwargs: dict[str, Any]) -> ExtraArguments:
        """Return the extra arguments of one call. Raise ``TypeError`` for one that the original does not take."""
        if len(args) + len(kwargs) > 3:
            self._signature.bind(None, *args, **kwargs)
        names = [*self._names[3:], *(f"argument {i + 1}" for i in range(len(self._names), len(args)))]
        positional = names[: max(0, len(args) - 3)]
        by_name = {name: value for name, value in kwargs.items() if name not in self._names[:3]}
        return ExtraArguments(positional, dict(zip(positional, args[3:], strict=True)) | by_name)

    def resolve(self, extra: ExtraArguments, num_tokens: int, sizes: CallSizes, groups: ExpertGroups) -> None:
        """Find the arguments that have a row for each token. Every rank of the EP group calls it if one has any.

        Raises:
            ValueError: Arguments differ between ranks, or shapes don't tell which have a row for each token.
            TypeError: An argument is neither a tensor nor a plain value. All ranks raise these.
        """
        mine = {name: _describe(value, sizes) for name, value in extra.values.items() if value is not None}
        gathered = _gather((num_tokens, mine), groups)
        tokens_R = [tokens for tokens, _ in gathered]
        for name in sorted({name for _, values in gathered for name in values}):
            described_R = [values.get(name, _Description("nothing")) for _, values in gathered]
            if error := next((one.error for one in described_R if one.error), ""):
                raise TypeError(f"{self._where}: argument {name!r} {error}")
            self._check_same(name, [one.text for one in described_R], described_R)
            shapes = [one.shape for one in described_R if one.shape is not None]
            if shapes and self._has_rows(name, tokens_R, shapes, sizes):
                self._check_same(name, [shape[1:] for shape in shapes], described_R)
                extra.rows.append(name)
            else:
                self._check_same(name, shapes, described_R)
        same = {k: v for k, v in extra.values.items() if isinstance(v, Tensor) and k not in extra.rows}
        digests = {name: _digest(v) for name, v in same.items() if not isinstance(v, nn.Parameter)}
        if digests:  # parameters stay the same, since their gradients are averaged
            digests_R = _gather(digests, groups)
            for name in digests:
                self._check_same(name, [theirs[name] for theirs in digests_R], ["another tensor"] * len(digests_R))

    def _check_same(self, name: str, values: Sequence[Any], described_R: Sequence[Any]) -> None:
        for rank, value in enumerate(values):
            if value != values[0]:
                raise ValueError(
                    f"{self._where}: argument {name!r} differs between ranks, {described_R[0]} on EP rank 0 and"
                    f" {described_R[rank]} on {rank}, and an expert computes the tokens of all; give all ranks the"
                    " same, or a tensor with a row for each token"
                )

    def _has_rows(
        self, name: str, tokens_R: Sequence[int], shapes: Sequence[tuple[int, ...]], sizes: CallSizes
    ) -> bool:
        """Decide whether an argument has a row for each token, from values that are the same on all ranks."""
        fits = all(shape[:1] == (tokens,) for shape, tokens in zip(shapes, tokens_R, strict=True))
        by_chance = max(tokens_R) > 1 and len(set(tokens_R)) == 1 and tokens_R[0] in sizes.of_experts
        if self._declared is not None:
            has_rows = name in self._declared
        elif name in self._known:
            has_rows = self._known[name]
        elif fits and by_chance:
            raise ValueError(
                f"{self._where}: argument {name!r} has shape {list(shapes[0])}, and {tokens_R[0]} is both the number of"
                f" tokens and a size of the experts; set token_arguments = ({name!r},) on {self._class} if it has a row"
                " for each token, or token_arguments = () if it is the same for all"
            )
        else:
            has_rows = fits
            self._check_other_dimensions(name, has_rows, tokens_R, shapes[0], sizes)
            if max(tokens_R) > 1:
                self._known[name] = has_rows
        if has_rows and not fits:
            raise ValueError(
                f"{self._where}: argument {name!r} must have a row for each token, and has shapes"
                f" {[list(shape) for shape in shapes]} where the ranks have {list(tokens_R)} tokens"
            )
        return has_rows

    def _check_other_dimensions(
        self, name: str, has_rows: bool, tokens_R: Sequence[int], shape: tuple[int, ...], sizes: CallSizes
    ) -> None:
        """Raise if a dimension seems to be that of choices, of experts, or of tokens in another position."""
        others, tokens = shape[1:] if has_rows else shape, tokens_R[0]
        remedy = f"If it is something else, set token_arguments = {(name,) if has_rows else ()} on {self._class}"
        if has_rows and sizes.top_k > 1 and shape[1:2] == (sizes.top_k,):
            raise ValueError(
                f"{self._where}: argument {name!r} has shape {list(shape)}, a value for each of a token's"
                f" {sizes.top_k} experts, which is not supported: an expert is given one choice at a time. {remedy}"
            )
        if sizes.num_experts in others:
            raise ValueError(
                f"{self._where}: argument {name!r} has shape {list(shape)}, a value for each of"
                f" {sizes.num_experts} experts, which is not supported: a rank has some of them, under other numbers;"
                f" register it in the module. {remedy}"
            )
        spans = {math.prod(shape[:i]) for i in range(2, len(shape) + 1)} | set(shape[1:])
        if tokens > 1 and tokens not in sizes.of_experts and tokens in (set(shape[1:]) if has_rows else spans):
            raise ValueError(
                f"{self._where}: argument {name!r} has shape {list(shape)}, and there are {tokens} tokens; tokens must"
                f" be its first dimension, and no other. {remedy}"
            )


def _describe(value: Any, sizes: CallSizes) -> _Description:
    if isinstance(value, DTensor):
        return _Description("", error="is a DTensor; pass its full_tensor()")
    if isinstance(value, Tensor):
        grad = " that requires a gradient" if value.requires_grad and torch.is_grad_enabled() else ""
        return _Description(f"a tensor of {value.dtype}{grad}", tuple(value.shape))
    if isinstance(value, _PLAIN):
        return _Description(f"{value!r}")
    if isinstance(value, torch.device):
        return _Description(f"a device of type {value.type}")
    if isinstance(value, nn.Module) or callable(value):
        return _Description(getattr(value, "__qualname__", type(value).__qualname__))
    if type(value) in (list, tuple, dict, set) and len(value) != sizes.num_experts:
        parts = [part for item in value.items() for part in item] if isinstance(value, dict) else list(value)
        described = [_describe(part, sizes) for part in parts]
        if all(one.shape is None and not one.error for one in described):
            return _Description(f"{type(value).__name__}({', '.join(map(str, described))})")
        return _Description(
            "", error=f"is a {type(value).__name__} that holds tensors; pass each as an argument of its own"
        )
    if type(value) in (list, tuple, dict, set):
        return _Description(
            "",
            error=f"is a {type(value).__name__} with a value for each of {sizes.num_experts} experts, and a rank has"
            " some of them, under other numbers; make it a parameter or buffer of the module",
        )
    return _Description(
        "",
        error=f"is a {type(value).__name__}; only tensors, numbers, strings, None, functions, modules, and lists of"
        " these without tensors are passed on to experts of other ranks",
    )


def _gather(mine: Any, groups: ExpertGroups) -> list[Any]:
    gathered: list[Any] = [None] * groups.size
    dist.all_gather_object(gathered, mine, group=groups.ep_group)
    return gathered


def _digest(tensor: Tensor) -> bytes:
    # A copy, since numpy() makes a storage unresizable, and FSDP1 frees memory by resizing.
    flat = tensor.detach().reshape(-1).resolve_conj().to("cpu", copy=True)
    return hashlib.blake2b(flat.view(torch.uint8).numpy().data, digest_size=16).digest()


def _flat(rows: Tensor) -> Tensor:
    """Flatten rows for sending, ``[T, any]``. Those without a gradient become bytes, which every backend sends."""
    if rows.is_complex():
        rows = torch.view_as_real(rows)
    flat = rows.reshape(len(rows), math.prod(rows.shape[1:]))
    return flat if flat.dtype in _SENT_DTYPES else flat.contiguous().view(torch.uint8)


def _unflat(received: Tensor, like: Tensor) -> Tensor:
    """Undo :func:`_flat` for received rows."""
    dtype = torch.view_as_real(like).dtype if like.is_complex() else like.dtype
    rows = received if received.dtype == dtype else received.contiguous().view(dtype)
    rows = rows.reshape(len(rows), *like.shape[1:], *([2] if like.is_complex() else []))
    return torch.view_as_complex(rows) if like.is_complex() else rows
