"""Trial of expert modules before their conversion: checks that their forward computes what the protocol says.

Random tokens run through a small clone of the module. Its experts have random weights, since the module's own may be on
the meta device, zero or quantized. Outputs are compared with those of one token, one expert and a weight of one. The
clone shares nothing with the module that a forward could change, and calls no hook.

Shape suffixes: ``T`` tokens, ``K`` top-k, ``D`` model width.
"""

import collections
import copy
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from lightning_eplb import _compat
from lightning_eplb.parallel.per_expert_state import select_elements
from lightning_eplb.parallel.per_expert_trial import find_per_expert_state

PROTOCOL_OF_FORWARD = (
    "forward(hidden [T, D], top_k_index [T, K], top_k_weights [T, K]) returns [T, D], each token's sum over its K"
    " experts of weight times output, whatever the other tokens are, and reads num_experts for the number of experts"
)

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.05}
"""Largest relative difference by the dtype that a module computes in. Rounding causes 1e-15, 1e-6 and 1e-2."""

MAX_FLOAT64_PARAMETERS = 2**22
"""Parameters of an expert up to which the trial runs in float64, to bound time and memory."""

MAX_PARAMETERS = 2**23
"""Parameters of the clone, unless three experts have more."""

NUM_TOKENS = 64
"""Tokens of one expert that reveal a capacity. Its minimum is 4 in DeepSpeed."""

_OF_TRANSFORMERS = ("batched_mm", "grouped_mm", "sonicmoe", "deepgemm")
"""Implementations of transformers beside the eager one. They need a GPU, or copy weights for each token."""

FIRST_CHOICE = "only the first of a token's choices counts"
_NOT_TRIED = "not tried"
_log = logging.getLogger(__name__)


def check_protocol(found: dict[str, nn.Module]) -> set[str]:
    """Raise ``ValueError`` for the first expert module whose forward does not compute what the protocol says.

    Needs no communication, since all ranks try the same. One of several equal layers is tried. A module passes if its
    forward raises for random tokens of any width and dtype, since it may need what only training provides.

    Returns:
        Names of modules that read a token's first choice only, which is right for routers that make one.
    """
    tried: dict[tuple, str | None] = {}
    for name, module in found.items():
        if (key := _key(module)) not in tried:
            tried[key] = find_deviation(module)
        if (reason := tried[key]) not in (None, FIRST_CHOICE):
            raise ValueError(
                f"{name} ({type(module).__name__}) looks like experts, but {reason}. The protocol is:"
                f" {PROTOCOL_OF_FORWARD}. Change its forward, or rename its attribute num_experts to keep it whole"
            )
    return {name for name, module in found.items() if tried[_key(module)] == FIRST_CHOICE}


def find_deviation(module: nn.Module) -> str | None:
    """Describe how an unconverted module departs from the protocol. ``None`` if it complies or is not tried."""
    floats = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    if any(parameter.dtype not in floats for parameter in module.parameters()):
        return None  # quantized: random bits are no weights
    for device in _devices(module):
        autocast, eager = torch.autocast(device.type, enabled=False), torch.compiler.set_stance("force_eager")
        with isolate_rng(include_cuda=device.type == "cuda"), torch.no_grad(), device, autocast, eager:
            torch.manual_seed(0)  # or ranks could see different dropout
            trial = _Trial(module, device)
            reasons = [trial.run(is_training) for is_training in (True, False)]
        if (reason := next((r for r in reasons if r not in (None, _NOT_TRIED)), None)) is not None:
            return reason
        if None in reasons:
            return None
        if trial.is_out_of_range:  # an accelerator does not recover from that
            break
    _log.debug("%s raised for random tokens, so nothing is known of its forward", type(module).__name__)
    return None


def _devices(module: nn.Module) -> Iterator[torch.device]:
    """Yield the CPU, then the accelerator for modules that need one, such as those with Triton kernels."""
    yield torch.device("cpu")
    if torch.accelerator.is_available():
        own, accelerator = next(module.parameters()).device, torch.accelerator.current_accelerator()
        assert accelerator is not None
        yield own if own.type == accelerator.type else accelerator


def _key(module: nn.Module) -> tuple:
    """Return a key that is equal for modules of one class with the same attributes, whatever their weights."""
    key: list[Any] = []
    for name, part in module.named_modules():
        attributes = {k: v for k, v in vars(part).items() if not k.startswith("_") and k != "training"}
        plain = {k: v if isinstance(v, (int, float, str, tuple, type(None))) else id(v) for k, v in attributes.items()}
        tensors = [*part.named_parameters("", False), *part.named_buffers("", False)]
        key.append((name, type(part), repr(plain), repr([(k, tensor.shape, tensor.dtype) for k, tensor in tensors])))
    return tuple(key)


def _per_expert_attributes(module: nn.Module) -> Sequence[str]:
    """Return names of attributes with an element for each expert. Empty if unknown, for which the trial may say why."""
    with suppress(ValueError):
        return find_per_expert_state("", module).attributes
    return ()


class _Clones:
    """Clones of a module with random weights, a new one for each call of its forward.

    All experts but the second are equal to the first.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.module, self.device = module, device
        self.num_experts: int = module.num_experts  # type: ignore[assignment]
        self.own = dict(module.named_parameters(recurse=False))
        self.row_size = sum(math.prod(parameter.shape[1:]) for parameter in self.own.values())
        self.attributes = _per_expert_attributes(module)
        self.is_training = True
        self.dtype = torch.float64
        self.experts: dict[str, Tensor] = {}
        self._shared: dict[int, Tensor] = {}
        self._generator = torch.Generator("cpu").manual_seed(0)

    def draw(self, dtype: torch.dtype, num_experts: int) -> None:
        """Draw weights, unless some of this dtype exist."""
        if self.experts and dtype == self.dtype:
            return
        self.dtype = dtype
        self._shared, self.experts, drawn = {}, {}, {}
        for name, parameter in self.own.items():
            two = self._weights(parameter.shape[1:], 2)
            drawn[name] = torch.cat((two, two[:1].expand(num_experts - 2, *two.shape[1:])))
        self.experts = drawn

    def twins(self) -> dict[str, Tensor]:
        """Return equal experts, another number of them than usual."""
        if len(next(iter(self.experts.values()))) > 2:
            return {name: rows[:3:2] for name, rows in self.experts.items()}
        return {name: rows[:1].expand(3, *rows.shape[1:]) for name, rows in self.experts.items()}

    def random(self, *shape: int) -> Tensor:
        """Return normal numbers, repeated if there are many: drawing them would take longer than all else."""
        count, drawn = math.prod(shape), 65_537
        numbers = torch.randn(min(count, drawn), generator=self._generator, dtype=self.dtype, device="cpu")
        return numbers.repeat(math.ceil(count / drawn) if count else 1)[:count].view(shape).to(self.device)

    def _weights(self, shape: torch.Size, *experts: int) -> Tensor:
        """Return matrices that preserve the norm of their input, or vectors from 0.5 to 1.5."""
        numbers = self.random(*experts, *shape)
        return 1 + numbers.clamp(-2, 2) / 4 if len(shape) < 2 else numbers.mul_(math.prod(shape) ** -0.25)

    def forward(self, experts: dict[str, Tensor], *args: Tensor) -> Any:
        """Run the forward of any number of experts on copies of the arguments."""
        local, rows = self._clone(self.module), len(next(iter(experts.values())))
        _compat.registered(local).parameters.update(experts)  # type: ignore[arg-type]
        local.__dict__["num_experts"] = rows
        order = [0, 1, *[0] * rows][:rows] if rows == len(next(iter(self.experts.values()))) else [0] * rows
        select_elements(local, self.attributes, order)
        if _compat.experts_implementation(local) in _OF_TRANSFORMERS:
            local.__dict__["config"] = _compat.with_experts_implementation(local.config, "eager")
        return type(self.module).forward(local, *(arg.clone() for arg in args))

    def _clone(self, module: nn.Module) -> nn.Module:
        clone = object.__new__(type(module))
        clone.__dict__.update({k: _copied(value) for k, value in vars(module).items() if k not in _compat.REGISTRIES})
        parameters, buffers, children = _compat.registered(module)
        _compat.replace_registered(
            clone,
            {k: self._random_instead_of(p) for k, p in parameters.items()},
            {k: self._copy_of(buffer) for k, buffer in buffers.items()},
            {k: child and self._clone(child) for k, child in children.items()},
        )
        clone.__dict__["training"] = self.is_training
        _compat.call_without_hooks(clone)
        return clone

    def _random_instead_of(self, parameter: nn.Parameter | None) -> Tensor | None:
        """Return random weights for a parameter that all experts share, the same in all calls."""
        if parameter is None or any(parameter is own for own in self.own.values()):
            return None
        if id(parameter) not in self._shared:
            self._shared[id(parameter)] = self._weights(parameter.shape)
        return self._shared[id(parameter)]

    def _copy_of(self, buffer: Tensor | None) -> Tensor | None:
        if buffer is None:
            return None
        dtype = self.dtype if buffer.is_floating_point() else buffer.dtype
        if buffer.is_meta:
            return torch.ones(buffer.shape, dtype=dtype, device=self.device)
        return buffer.detach().to(self.device, dtype, copy=True)


def _copied(value: Any) -> Any:
    """Copy what a forward may change in place: tensors and containers."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if type(value) in (list, set, collections.deque):
        return type(value)(map(_copied, value))
    if isinstance(value, dict):
        copied = copy.copy(value)
        copied.update({key: _copied(item) for key, item in value.items()})
        return copied
    return value


class _Trial:
    """Trial of one module on one device."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.clones, self.device = _Clones(module, device), device
        self.tolerance, self.is_out_of_range = 0.0, False

    def run(self, is_training: bool) -> str | None:
        """Describe the deviation in training or in evaluation, if any."""
        self.clones.is_training = is_training
        for _ in self._settings():
            try:
                output = self.call(self.hidden(1), [[0]], [[1.0]])
                if not isinstance(output, Tensor):
                    return f"its forward returns a {type(output).__name__}"
                if output.shape == (1, self.width) and output.isfinite().all() and output.any():
                    return self._compare()
            except Exception as error:
                self.is_out_of_range |= isinstance(error, IndexError)
        return next((reason for _ in self._settings() if (reason := self._other_protocol()) is not None), _NOT_TRIED)

    def _settings(self) -> Iterator[None]:
        """Set dtypes and candidates for the model width: a size of most parameters, or an attribute."""
        clones, own = self.clones, list(self.clones.own.values())
        sizes = collections.Counter(size for p in own for size in dict.fromkeys(p.shape[1:]))
        attributes = [value for value in vars(clones.module).values() if type(value) is int and 1 < value < 2**16]
        widths = list(dict.fromkeys([*(size for size, _ in sizes.most_common()), *attributes]))
        count = min(clones.num_experts, max(3, MAX_PARAMETERS // clones.row_size))
        is_large = clones.row_size > MAX_FLOAT64_PARAMETERS
        for dtype in dict.fromkeys([torch.float32 if is_large else torch.float64, torch.float32, own[0].dtype]):
            with suppress(RuntimeError, TypeError):  # the device has no memory for it, or not this dtype
                clones.draw(dtype, count)
                for self.width in widths:
                    yield

    def hidden(self, tokens: int) -> Tensor:
        return self.clones.random(tokens, self.width)

    def call(self, hidden: Tensor, index: Any, weights: Any, experts: dict[str, Tensor] | None = None) -> Any:
        index = torch.as_tensor(index, device=self.device)
        weights = torch.as_tensor(weights, dtype=self.clones.dtype, device=self.device)
        return self.clones.forward(experts or self.clones.experts, hidden, index, weights)

    def _compare(self) -> str | None:
        hidden_TD = self.hidden(2)
        alone = torch.stack([torch.cat([self.call(row[None], [[e]], [[1.0]]) for row in hidden_TD]) for e in (0, 1)])
        token, output = hidden_TD[:1], alone[0, :1]
        if self._is_random(hidden_TD):
            return None  # as dropout is in training
        self.tolerance = self._tolerance(token, output)
        return (
            self._of_other_tokens(hidden_TD, alone[0])
            or self._of_number(token, output)
            or self._of_weights(hidden_TD, alone)
            or self._of_no_expert(token, output, alone[:, :1])
        )

    def _tolerance(self, token: Tensor, output: Tensor) -> float:
        """Return the tolerance of the dtype that the module computes in, which may be coarser than its own."""
        noise = self.hidden(1)
        for dtype, tolerance in TOLERANCE.items():
            eps = torch.finfo(dtype).eps
            is_finer = eps < torch.finfo(self.clones.dtype).eps
            if not is_finer and not torch.equal(self.call(token * (1 + 8 * eps * noise), [[0]], [[1.0]]), output):
                return tolerance
        return max(TOLERANCE.values())

    def _many_tokens(self, hidden_TD: Tensor) -> Tensor:
        which = torch.arange(NUM_TOKENS, device=self.device) % len(hidden_TD)
        return self.call(hidden_TD[which], [[0]] * NUM_TOKENS, [[1.0]] * NUM_TOKENS)

    def _is_random(self, hidden_TD: Tensor) -> bool:
        with suppress(Exception):
            return not torch.equal(self._many_tokens(hidden_TD), self._many_tokens(hidden_TD))
        return False

    def _of_other_tokens(self, hidden_TD: Tensor, alone_TD: Tensor) -> str | None:
        try:
            many = self._many_tokens(hidden_TD)
        except Exception as error:
            return f"its forward raises {type(error).__name__} ({error}) for several tokens of one expert"
        if self._equal(many, alone_TD.repeat(NUM_TOKENS // len(alone_TD), 1)):
            return None
        return (
            f"a token's output depends on the other tokens: among {NUM_TOKENS} of one expert it is another than alone"
            " (a capacity, statistics of the batch)"
        )

    def _of_weights(self, hidden_TD: Tensor, alone: Tensor) -> str | None:
        index, weights = (
            torch.tensor([[0, 1], [1, 0]], device=self.device),
            hidden_TD.new_tensor([[0.9, 0.3], [0.2, 0.7]]),
        )
        with suppress(Exception):  # asserts something of weights, which may well be so of those that its router gives
            whole = self.call(hidden_TD, index, weights)
            chosen = alone[index, torch.arange(2, device=self.device)[:, None]]
            if self._equal(whole, chosen[:, 0] * weights[:, :1]):
                return FIRST_CHOICE
            if not self._equal(whole, (chosen * weights[..., None]).sum(dim=1)):
                return self._how_weights_count(hidden_TD[:1], alone[0, :1])
        return None

    def _how_weights_count(self, token: Tensor, output: Tensor) -> str:
        zero, double = (self.call(token, [[0]], [[weight]]) for weight in (0.0, 2.0))
        if self._equal(double, output):
            return "a weight of 2 gives the output of a weight of 1 (weights normalized inside, or not used)"
        if zero.isfinite().all() and not self._equal(output + zero, output):
            return "a weight of 0 leaves something of the output (a term that no weight multiplies)"
        if not self._equal(double, 2 * output):
            return "a weight of 2 gives something else than twice the output (weights multiplied into the input)"
        return "the output of two experts is not their weighted sum (weights normalized inside)"

    def _of_number(self, token: Tensor, output: Tensor) -> str | None:
        """Check that experts with equal weights are equal, whatever their ids and their number."""
        for experts in (self.clones.experts, self.clones.twins()):
            count = len(next(iter(experts.values())))
            same = [e for e in range(count) if e != 1 or experts is not self.clones.experts]
            try:
                outputs = self.call(token.expand(len(same), -1), [[e] for e in same], [[1.0] for _ in same], experts)
            except Exception as error:
                return f"its forward raises {type(error).__name__} ({error}) for {count} experts"
            for expert, other in zip(same, outputs, strict=True):
                if not self._equal(other[None], output):
                    return (
                        f"of {count} experts, expert {expert} computes something else than one with the same weights"
                        " (a special case of its number, a value for each expert that is no parameter, or a factor of"
                        " num_experts)"
                    )
        return None

    def _of_no_expert(self, token: Tensor, output: Tensor, alone: Tensor) -> str | None:
        """Check that ids from ``num_experts`` up add nothing. Routers must avoid ids that raise or mean the last."""
        if self.device.type != "cpu":
            return None  # what they read there is not caught
        count = len(next(iter(self.clones.experts.values())))
        with suppress(Exception):
            whole = self.call(token, [[0, count]], [[0.9, 0.3]])
            if not any(self._equal(whole, 0.9 * output + last) for last in (0.0 * output, *(0.3 * alone))):
                return "an id of num_experts adds to the output, where it means no expert"
        return None

    def _other_protocol(self) -> str | None:
        """Describe the protocol of a forward that raises for ours, or returns zeros."""
        hidden_TD, index_TK = self.hidden(3), torch.tensor([[0, 1], [1, 0], [0, 1]], device=self.device)
        hidden_1TD, weights_TK = hidden_TD[None], hidden_TD.new_full((3, 2), 0.5)
        experts, num_experts = self.clones.experts, self.clones.num_experts
        if self._runs(experts, hidden_TD, index_TK, weights_TK):
            return "its forward does not take one token alone (statistics of the batch)"
        if self._runs(experts, hidden_TD, weights_TK, index_TK):
            return "its forward takes weights before indices"
        if self._runs(experts, hidden_1TD, index_TK, weights_TK):
            return "its forward takes hidden [B, S, D]"
        if self._runs(experts, hidden_1TD, index_TK[None], weights_TK[None]):
            return "its forward takes hidden [B, S, D]"
        if num_experts * self.clones.row_size <= 2 * MAX_PARAMETERS:
            experts = {name: rows[:1].expand(num_experts, *rows.shape[1:]) for name, rows in experts.items()}
            if self._runs(experts, hidden_TD, index_TK, weights_TK):
                return f"its forward fails for another number of experts than {num_experts}"
        return None

    def _runs(self, experts: dict[str, Tensor], *args: Tensor) -> bool:
        try:
            output = self.clones.forward(experts, *args)
        except Exception:
            return False
        return isinstance(output, Tensor) and output.shape[-1:] == (self.width,) and bool(output.any())

    def _equal(self, ours: Tensor, theirs: Tensor) -> bool:
        return ours.shape == theirs.shape and bool((ours - theirs).norm() <= self.tolerance * theirs.norm())
