"""Form of expert modules that fused kernels can compute: recognition by structure, confirmed by a trial.

The trial runs the module's own forward on a few random tokens and small random weights, in float64 on the CPU, and
compares outputs and gradients with those of the form. Nothing of the module's own weights is needed, so they may be on
the meta device. A module that differs in anything, by a norm or a limit of its own, keeps its own forward.

Shape suffixes: ``T`` tokens, ``K`` top-k, ``D`` model width, ``H`` expert hidden width, ``S`` experts.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from lightning_eplb import _compat
from lightning_eplb.parallel.per_expert_state import make_part

SIGMOID, GELU, GELU_TANH, RELU, RELU_SQUARED = range(5)
"""Activations: ``x sigmoid(alpha x)``, GELU with the error function, its approximation by tanh, ReLU and its square."""

PLAIN, CONCATENATED, INTERLEAVED = range(3)
"""Layouts of the first product: no gate, ``[gate | up]``, and ``gate, up`` in alternate columns."""

QUICK_GELU_ALPHA = 1.702
"""Factor within the sigmoid in the approximation of GELU by a sigmoid, of its authors."""

TOLERANCE = 1e-5
"""Largest relative difference in the trial. In float64 rounding causes 1e-15, and activations within the module that
compute in float32 cause 1e-7. Other forms differ by more than 1e-4: GELU and its approximation by 1e-3."""

WIDTH, HIDDEN, EXPERTS, TOKENS, TOP_K = 12, 10, 3, 16, 2
"""Sizes of the trial, in which no two dimensions of a weight are equal or multiples of each other."""


class ActivationArguments(NamedTuple):
    """Constants of an activation, in the order of the kernels' parameters.

    Attributes:
        kind: :data:`SIGMOID` and its neighbours.
        alpha: Factor within the sigmoid.
        limit: Upper limit of the gate, and limit of the absolute value of ``up``. 0 for none.
        up_offset: Number that is added to ``up``.
        layout: :data:`PLAIN` and its neighbours.
    """

    kind: int
    alpha: float = 1.0
    limit: float = 0.0
    up_offset: float = 0.0
    layout: int = CONCATENATED


@dataclass(frozen=True)
class FusedForm:
    """Computation of an expert: a product, an activation with or without a gate, and a second product.

    Attributes:
        names: Names of the module's parameters, in their order.
        activation: Constants of the activation.
        is_transposed: Weights are ``[S, in, out]``, else ``[S, out, in]``.
        has_bias: Both products have a bias.
    """

    names: tuple[str, ...]
    activation: ActivationArguments
    is_transposed: bool
    has_bias: bool

    @property
    def up_name(self) -> str:
        """Name of the weights of the first product."""
        return "up_proj" if self.activation.layout == PLAIN else "gate_up_proj"

    def parts(self, parameters: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Return weights as ``[S, in, out]``, views, and contiguous biases, of parameters in the order of ``names``."""
        named = dict(zip(self.names, parameters, strict=True))
        weights = named[self.up_name], named["down_proj"]
        up, down = weights if self.is_transposed else (weight.transpose(-2, -1) for weight in weights)
        up_bias, down_bias = named.get(f"{self.up_name}_bias"), named.get("down_proj_bias")
        if up_bias is None or down_bias is None:
            return up, down, None, None
        return up, down, up_bias.contiguous(), down_bias.contiguous()  # as kernels read them

    def parts_needed(self, needs: Sequence[bool]) -> tuple[bool, ...]:
        """Return ``needs``, given in the order of ``names``, in the order of :meth:`parts`. ``False`` for no bias."""
        named = dict(zip(self.names, needs, strict=True))
        order = (self.up_name, "down_proj", f"{self.up_name}_bias", "down_proj_bias")
        return tuple(named.get(name, False) for name in order)

    def activate(self, inner: Tensor) -> Tensor:
        """Compute the activation by tensor operations."""
        constants, gate, up = self.activation, inner, None
        if constants.layout == CONCATENATED:
            gate, up = inner.chunk(2, dim=-1)
        elif constants.layout == INTERLEAVED:
            gate, up = inner[..., ::2], inner[..., 1::2]
        if constants.limit:
            gate = gate.clamp(max=constants.limit)
            up = None if up is None else up.clamp(-constants.limit, constants.limit)
        value = _ACTIVATIONS[constants.kind](gate, constants.alpha)
        return value if up is None else value * (up + constants.up_offset)

    def compute(self, parameters: Sequence[Tensor], hidden_TD: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Compute a whole module by tensor operations, ``[T, D]``. For trials: each pair copies its weights."""
        up, down, up_bias, down_bias = self.parts(parameters)
        inner = torch.einsum("td,tkdh->tkh", hidden_TD, up[index_TK])
        inner = inner if up_bias is None else inner + up_bias[index_TK]
        outer = torch.einsum("tkh,tkhd->tkd", self.activate(inner), down[index_TK])
        outer = outer if down_bias is None else outer + down_bias[index_TK]
        return (outer * weights_TK.unsqueeze(-1)).sum(dim=1)


_ACTIVATIONS: dict[int, Callable[[Tensor, float], Tensor]] = {
    SIGMOID: lambda x, alpha: x * torch.sigmoid(alpha * x),
    GELU: lambda x, _: nn.functional.gelu(x),
    GELU_TANH: lambda x, _: nn.functional.gelu(x, approximate="tanh"),
    RELU: lambda x, _: nn.functional.relu(x),
    RELU_SQUARED: lambda x, _: nn.functional.relu(x).square(),
}


def recognize(module: nn.Module) -> FusedForm | str:
    """Return the form of an expert module, or why its own forward must compute it.

    Args:
        module: Module before or after its conversion, with its parameters on any device.
    """
    own = dict(module.named_parameters(recurse=False))
    if (reason := why_not_plain(module)) is not None:
        return reason
    first = "gate_up_proj" if "gate_up_proj" in own else "up_proj"
    names = {first, "down_proj"}
    has_bias = f"{first}_bias" in own
    if set(own) != names | ({f"{first}_bias", "down_proj_bias"} if has_bias else set()):
        return f"its parameters are {', '.join(own)}"
    shapes = [tuple(own[name].shape[1:]) for name in (first, "down_proj")]
    if any(len(shape) != 2 for shape in shapes):
        return "its weights are not matrices"
    num_experts = {len(parameter) for parameter in own.values()}
    if len(num_experts) != 1:
        return "its parameters have different numbers of experts"
    halves = 2 if first == "gate_up_proj" else 1
    for is_transposed in _transpositions(module, shapes, halves):
        widths = [shape[1 if is_transposed else 0] for shape in shapes]
        biases = [own[f"{name}_bias"].shape[1:] for name in (first, "down_proj")] if has_bias else []
        if biases and biases != [(width,) for width in widths]:
            return "its biases are not as wide as the outputs"
        trial = _Trial(module, tuple(own), is_transposed, halves, has_bias)
        try:
            found = trial.find()
        except Exception as error:  # a forward may raise anything for tokens that are not from its model
            return f"its forward raised {type(error).__name__} for random tokens"
        return found or "its forward computes something else than the known forms"
    return "the shapes of its weights are unknown"


def why_not_plain(module: nn.Module) -> str | None:
    """Return the first thing beside class and parameters that could change what ``module`` computes."""
    if "forward" in vars(module) or _compat.gates(module)[1] is not None:
        return "its forward was replaced on the module itself"
    if is_parametrized(module):
        return "its parameters are computed by parametrizations"
    if getattr(module, "has_post_expert_norm", False):
        return "a norm follows the experts"
    if any(not parameter.is_floating_point() for parameter in module.parameters(recurse=False)):
        return "its weights are quantized"
    if next(module.buffers(), None) is not None:
        return "it has buffers"
    if any(isinstance(value, Tensor) for each in module.modules() for value in vars(each).values()):
        return "it has tensors that are no parameters"
    if any(True for child in module.children() for _ in child.parameters()):
        return "its submodules have parameters"
    is_converted = getattr(module, "expert_layer", None) is not None  # then FSDP2 may have added hooks of its own
    if not is_converted and _compat.has_call_hooks(module):
        return "it has hooks"
    if any(_compat.has_call_hooks(child) for child in module.modules() if child is not module):
        return "a submodule has hooks"
    return None


def _transpositions(module: nn.Module, shapes: Sequence[tuple[int, ...]], halves: int) -> Iterator[bool]:
    """Yield ``True`` if weights are ``[S, in, out]``, ``False`` if they are ``[S, out, in]``, nothing if neither."""
    (a, b), (c, d) = shapes
    fits = {False: b == c and a == halves * d, True: a == d and b == halves * c}
    declared = bool(getattr(module, "is_transposed", False))
    if fits[declared]:
        yield declared
    elif fits[not declared]:
        yield not declared


class _Trial:
    """Comparison of a module with all forms of its structure."""

    def __init__(
        self, module: nn.Module, names: tuple[str, ...], is_transposed: bool, halves: int, has_bias: bool
    ) -> None:
        self.module, self.names, self.has_bias, self.is_transposed = module, names, has_bias, is_transposed
        self.is_gated = halves == 2
        self._generator = torch.Generator("cpu").manual_seed(0)
        sizes = {"down_proj": (HIDDEN, WIDTH), "gate_up_proj": (WIDTH, 2 * HIDDEN), "up_proj": (WIDTH, HIDDEN)}
        self.weights = []
        for name in names:
            rows, columns = sizes[name.removesuffix("_bias")]
            matrix = (rows, columns) if is_transposed else (columns, rows)
            shape = (columns,) if name.endswith("_bias") else matrix
            self.weights.append(self._random(EXPERTS, *shape) / (1 if name.endswith("_bias") else rows**0.5))

    def find(self) -> FusedForm | None:
        """Return the form whose outputs and gradients are those of the module, with and without training."""
        forms, autocast = list(self._forms()), torch.autocast("cpu", enabled=False)
        scales = (1.0, 30.0, 1000.0 + 3 * max(form.activation.limit for form in forms))  # limits show
        with torch.device("cpu"), autocast, torch.inference_mode(False), torch.enable_grad():
            expected = []
            for scale, is_training in itertools.product(scales, (True, False)):
                inputs = self._inputs(scale)
                expected.append((inputs, list(self._results(self._own_forward(is_training), inputs))))
            for form in forms:
                if all(_are_close(self._results(form.compute, inputs), results) for inputs, results in expected):
                    return form
        return None

    def _forms(self) -> Iterator[FusedForm]:
        limits, alphas = self._numbers("limit", "swiglu_limit"), self._numbers("alpha", "swiglu_alpha")
        kinds = [(SIGMOID, alpha) for alpha in dict.fromkeys((*alphas, 1.0, QUICK_GELU_ALPHA))]
        kinds += [(kind, 1.0) for kind in (GELU, GELU_TANH, RELU, RELU_SQUARED)]
        is_interleaved = not getattr(self.module, "is_concatenated", True)
        layouts = (CONCATENATED, INTERLEAVED)[:: -1 if is_interleaved else 1] if self.is_gated else (PLAIN,)
        offsets = (0.0, 1.0) if self.is_gated else (0.0,)
        for layout, (kind, alpha), limit, offset in itertools.product(layouts, kinds, (*limits, 0.0), offsets):
            constants = ActivationArguments(kind, alpha, limit, offset, layout)
            yield FusedForm(self.names, constants, self.is_transposed, self.has_bias)

    def _numbers(self, *names: str) -> list[float]:
        values = [getattr(self.module, name, None) for name in names]
        return [float(x) for x in values if isinstance(x, (int, float)) and math.isfinite(x) and x > 0]

    def _inputs(self, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        index_TK = torch.stack([torch.randperm(EXPERTS, generator=self._generator)[:TOP_K] for _ in range(TOKENS)])
        weights_TK = torch.rand(TOKENS, TOP_K, generator=self._generator, dtype=torch.float64)
        return scale * self._random(TOKENS, WIDTH), index_TK, weights_TK

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator, dtype=torch.float64, device="cpu")

    def _own_forward(self, is_training: bool) -> Callable[..., Tensor]:
        def forward(weights: Sequence[Tensor], *inputs: Tensor) -> Tensor:
            original = _original_class(self.module)
            named = dict(zip(self.names, weights, strict=True))
            part = make_part(self.module, original, named, (), range(EXPERTS))
            part.__dict__["training"] = is_training
            if _compat.experts_implementation(part) is not None:
                part.__dict__["config"] = _compat.with_experts_implementation(part.config, "eager")
            return original.forward(part, *inputs)

        return forward

    def _results(self, forward: Callable[..., Tensor], inputs: tuple[Tensor, Tensor, Tensor]) -> Iterator[Tensor]:
        """Yield the output, then the gradients of weights, hidden states and routing weights."""
        hidden_TD, index_TK, weights_TK = inputs
        leaves = [x.detach().requires_grad_() for x in (*self.weights, hidden_TD, weights_TK)]
        output_TD = forward(leaves[:-2], leaves[-2], index_TK.clone(), leaves[-1])
        yield output_TD.detach()
        slopes_TD = torch.linspace(-1, 1, output_TD.numel(), dtype=output_TD.dtype).view(output_TD.shape)
        yield from torch.autograd.grad(output_TD, leaves, slopes_TD)


def _original_class(module: nn.Module) -> type[nn.Module]:
    layer = getattr(module, "expert_layer", None)
    return type(module) if layer is None else layer.original_class


def _are_close(ours: Iterable[Tensor], theirs: Sequence[Tensor]) -> bool:
    """Compare relative to the norm of each tensor, until one differs. NaN is never close."""
    pairs = zip(ours, theirs, strict=True)
    return all(a.shape == b.shape and bool((a - b).norm() <= TOLERANCE * b.norm()) for a, b in pairs)
