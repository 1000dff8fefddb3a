"""Dispatch of dummy tokens through a twin of a layer, which changes nothing of the layer itself.

Shape suffixes: ``T`` tokens, ``K`` top-k, ``D`` model width, ``L`` logical experts, ``R`` ranks, ``S`` slots of a rank.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from lightning_eplb import _compat
from lightning_eplb.parallel.dispatch import TokenDispatcher
from lightning_eplb.parallel.expert_layer import ExpertLayer
from lightning_eplb.parallel.forward import ParallelExperts
from lightning_eplb.parallel.packing import to_device
from lightning_eplb.parallel.prefetch import WeightPrefetcher
from lightning_eplb.placement import ExpertPlacement


class TensorForm(NamedTuple):
    """Shape and dtype of a tensor, without its memory."""

    shape: torch.Size
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> "TensorForm":
        return cls(tensor.shape, tensor.dtype)


class CallCapture:
    """Form of the first training call of a layer, to repeat it with dummy tokens.

    Set it as ``ExpertLayer.capture``. It keeps no tensor of the model but further arguments of the experts.
    """

    def __init__(self) -> None:
        self.hidden: TensorForm | None = None
        """Form of the hidden states, ``[T, D]``. ``None`` until the layer was called."""
        self.weights: TensorForm
        """Form of the routing weights, ``[T, K]``."""
        self.parameters: list[TensorForm]
        """Forms of the weights of this rank's primaries in the forward pass."""
        self.extra: tuple[Sequence[Any], Mapping[str, Any]]
        """Further arguments of the experts, detached."""
        self.device: torch.device
        self.autocast: tuple[bool, torch.dtype]
        """Autocast: ``True`` if it was on, and its dtype."""

    def __call__(
        self, layer: ExpertLayer, weights: Sequence[Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> None:
        """Capture a call that counts as training load."""
        if not layer.records_load or layer.join is not None:
            return
        names = layer.argument_names
        hidden_TD, _, weights_TK = (args[i] if i < len(args) else kwargs[name] for i, name in enumerate(names))
        self.weights, self.device = TensorForm.of(weights_TK), hidden_TD.device
        self.parameters = [TensorForm.of(weight) for weight in weights]
        others = {name: _detached(value) for name, value in kwargs.items() if name not in names}
        self.extra = [_detached(value) for value in args[len(names) :]], others
        kind = self.device.type
        self.autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        self.hidden = TensorForm.of(hidden_TD)
        layer.capture = None


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def dispatch_dummies(module: ParallelExperts, capture: CallCapture, imbalance: float) -> None:
    """Compute a layer with dummy tokens and all redundant slots filled, forward and backward, once for each rank.

    Neither the layer nor its parameters, gradients, buffers and load change. Random generators keep their state. Every
    rank of the EP group must call it.

    Args:
        module: Converted experts.
        capture: Form of a call.
        imbalance: Tokens of one rank after the other, in parts of the mean rank's.

    Raises:
        torch.OutOfMemoryError: There is too little memory on this rank.
    """
    groups, device = module.expert_layer.groups, capture.device
    dispatcher = type(module.expert_layer.dispatcher)(groups)
    is_on, dtype = capture.autocast
    with (
        torch.random.fork_rng(devices=[device.index or 0] if device.type == "cuda" else []),
        torch.autocast(device.type, dtype, enabled=is_on, cache_enabled=False),
        torch.enable_grad(),
    ):
        for full_rank in range(groups.size):
            twin = _twin(module, capture, dispatcher, full_rank, imbalance / groups.size)
            _compute(twin, capture, full_rank, imbalance / groups.size)


def _compute(twin: ParallelExperts, capture: CallCapture, full_rank: int, share: float) -> None:
    assert capture.hidden is not None
    layer, device = twin.expert_layer, capture.device
    num_tokens, top_k = capture.weights.shape
    own = layer.slot_map.slots[full_rank, : layer.num_primaries]
    own = own[own < layer.num_logical_experts]
    index_TK = to_device(dummy_index(num_tokens, top_k, own, layer.num_logical_experts, share), device)
    hidden_TD = torch.zeros(capture.hidden.shape, dtype=capture.hidden.dtype, device=device, requires_grad=True)
    weights_TK = torch.zeros(capture.weights.shape, dtype=capture.weights.dtype, device=device, requires_grad=True)
    args, kwargs = capture.extra
    output_TD = twin.forward(hidden_TD, index_TK, weights_TK, *args, **kwargs)
    inputs = [hidden_TD, weights_TK, *(weight for weight in twin.parameters(recurse=False) if weight.requires_grad)]
    # Gradients are returned and not accumulated, so that no hook of DDP or of a user is called.
    torch.autograd.grad(output_TD, inputs, torch.zeros_like(output_TD), allow_unused=True)


def dummy_index(num_tokens: int, top_k: int, own: np.ndarray, num_experts: int, share: float) -> np.ndarray:
    """Return the experts of dummy tokens, ``[T, K]`` int64, all different for each token.

    Args:
        num_tokens: Number of tokens.
        top_k: Choices of a token.
        own: Logical experts that get ``share`` of the choices, as far as a token can choose so many of them.
        num_experts: Logical experts of the layer. Those that are not in ``own`` get the rest.
        share: Part of the choices.
    """
    others = np.setdiff1d(np.arange(num_experts), own)
    many = min(max(top_k * share, top_k - len(others)), len(own))
    upto_T = np.floor(np.arange(num_tokens + 1) * many + 1e-9).astype(np.int64)
    from_own_T1 = np.diff(upto_T)[:, None]
    choice_K = np.arange(top_k)
    is_own_TK = choice_K < from_own_T1
    first_own_T1, first_other_T1 = upto_T[:-1, None], (np.arange(num_tokens) * top_k - upto_T[:-1])[:, None]
    own_TK = own[(first_own_T1 + choice_K) % len(own)]
    other_TK = others[(first_other_T1 + choice_K - from_own_T1) % len(others)]
    return np.where(is_own_TK, own_TK, other_TK)


def _twin(
    module: ParallelExperts, capture: CallCapture, dispatcher: TokenDispatcher, full_rank: int, share: float
) -> ParallelExperts:
    """Return a module that computes as ``module`` does, with the same weights and tensors of its own for all else."""
    layer, groups = copy.copy(module.expert_layer), module.expert_layer.groups
    layer.prefetcher, layer.gradient_sync, layer.records_load = WeightPrefetcher(), None, False
    layer.dispatcher = dispatcher
    layer.physical_to_logical = layer.physical_to_logical.copy()
    num_redundant = len(layer.physical_to_logical) - groups.size * layer.num_primaries
    filled = ExpertPlacement.initial(1, layer.num_logical_experts, groups.size, num_redundant)
    rest = (1.0 - share) / (groups.size - 1)
    layer.set_placement(filled, 0, [share if rank == full_rank else rest for rank in range(groups.size)])

    bases = (each for each in type(module).__mro__ if not issubclass(each, FSDPModule))
    twin = object.__new__(next(bases))
    twin.__dict__.update(module.__dict__, expert_layer=layer)
    registered = _compat.registered(module)
    named = zip(module.named_parameters(recurse=False), capture.parameters, strict=True)
    parameters = registered.parameters | {
        name: _weight(parameter, form, capture.device) for (name, parameter), form in named
    }
    buffers = {name: buffer if buffer is None else buffer.clone() for name, buffer in registered.buffers.items()}
    _compat.replace_registered(twin, parameters, buffers)
    for name in layer.per_expert.counters:
        if name not in buffers:
            twin.__dict__[name] = getattr(module, name).clone()
    return twin


def _weight(parameter: Tensor, form: TensorForm, device: torch.device) -> nn.Parameter:
    """Return the parameter's own memory if it is that of the forward pass, or else zeros in the same form."""
    is_whole = type(parameter) is nn.Parameter and TensorForm.of(parameter) == form
    weight = parameter.detach() if is_whole else torch.zeros(form.shape, dtype=form.dtype, device=device)
    return nn.Parameter(weight, requires_grad=parameter.requires_grad)
