"""Choice between fused experts and the module's own forward: by the user's setting, the module, device and dtype."""

import importlib.util
import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_eplb import _compat
from lightning_eplb.parallel.extra_arguments import HAS_EXTRA_ARGUMENTS
from lightning_eplb.parallel.fused_form import FusedForm, recognize, why_not_plain

KEEPS_FORWARD = 2 * HAS_EXTRA_ARGUMENTS
"""Flag in the payload of a rank that does not fuse a call. Ranks may differ, as by a hook for a log on one of them."""

FAST_DTYPES = (torch.bfloat16, torch.float16)
"""Dtypes in which experts are fused unless the user says otherwise. In others products take most of the time, and
``grouped_mm`` of torch is a loop over experts."""

KNOWN_DTYPES = (*FAST_DTYPES, torch.float32, torch.float64)
"""Dtypes in which ``fused_experts=True`` fuses. Others, such as float8, are storage that a forward knows to scale."""

REPLACED = (None, "grouped_mm")
"""Implementations of transformers that are replaced by default: its own default, and that of modules without a choice.
``eager`` and the others were chosen by the user."""

REPLACED_IF_ASKED = (*REPLACED, "eager", "batched_mm")
"""Implementations that ``fused_experts=True`` replaces. The rest are kernels of their own, such as ``deepgemm``."""

OF_EVERY_MODULE = frozenset(vars(nn.Module())) | {"expert_layer", "num_experts"}
"""Attributes that are no settings of a module."""


class FusedChoice:
    """Choice of one layer, made anew for each call, since dtype, device and the module's settings may change.

    Args:
        module: Expert module, before its parameters are sharded.
        setting: Argument ``fused_experts`` of ``parallelize_experts``.
        form: Form of the module, or why it has none.
    """

    def __init__(self, module: nn.Module, setting: bool | None, form: FusedForm | str) -> None:
        self.setting = setting
        self.form = form if isinstance(form, FusedForm) else None
        self.reason: str | None = form if isinstance(form, str) else None
        """Why the last call ran the module's own forward. ``None`` if it was fused."""
        self._no_form = self.reason
        self.names = self.form.names if self.form is not None else ()
        """Names of the parameters that the form is computed from."""
        self._children = list(module.modules())[1:]
        self._settings = [_settings(each) for each in (module, *self._children)]
        self._forward = self._current_forward(module)

    def form_for(self, module: nn.Module, weights: Sequence[Tensor], has_other_arguments: bool) -> FusedForm | None:
        """Return the form if this call is to be fused, and keep why not.

        Args:
            module: Converted module.
            weights: Weights of the experts on the device.
            has_other_arguments: The call has other arguments than hidden states, ids and weights.
        """
        self.reason = self._why_not(module, weights, has_other_arguments)
        return self.form if self.reason is None else None

    def _why_not(self, module: nn.Module, weights: Sequence[Tensor], has_other_arguments: bool) -> str | None:
        if self.form is None:
            return self._no_form
        if has_other_arguments:
            return "it was called with other arguments"
        weight, asked = weights[0], self.setting is True
        if not runs_on(weight.device) or not (asked or weight.is_cuda):
            return f"the kernels need a GPU and Triton, and weights are on {weight.device}"
        if weight.dtype not in (KNOWN_DTYPES if asked else FAST_DTYPES):
            return f"weights are {weight.dtype}"
        if any(other.dtype != weight.dtype for other in weights):
            return "weights have several dtypes"
        implementation = _compat.experts_implementation(module)
        if implementation not in (REPLACED_IF_ASKED if asked else REPLACED):
            return f"its implementation is {implementation!r}"
        if self._forward != self._current_forward(module):
            return "its forward was changed"
        children = list(module.modules())[1:]
        if list(map(id, children)) != list(map(id, self._children)):
            return "its activation was changed"
        if not all(map(_are_equal, (module, *children), self._settings)):
            return "an attribute was changed"
        return "a submodule has hooks" if any(map(_compat.has_call_hooks, children)) else None

    def _current_forward(self, module: nn.Module) -> tuple:
        """Return the functions that compute a module, before or after its conversion."""
        layer = getattr(module, "expert_layer", None)
        original = type(module) if layer is None else layer.original_class
        return original.forward, vars(module).get("forward"), *_compat.gates(module)


def choose(modules: Iterable[nn.Module], setting: bool | None, num_ranks: int) -> list[FusedChoice]:
    """Return the choice of each layer. Equal layers are tried once.

    Args:
        modules: Expert modules, before their parameters are sharded.
        setting: ``None`` to fuse over several ranks, ``True`` also on one, ``False`` never.
        num_ranks: Ranks that share the experts.
    """
    tried: dict[Any, FusedForm | str] = {}
    choices, names = [], []
    for module in modules:
        names.append(type(module).__name__)
        if setting is False:
            form = "fused_experts=False"
        elif setting is None and num_ranks == 1:
            form = "one rank holds all experts; fused_experts=True fuses them there, too"
        elif not (torch.cuda.is_available() or (setting is True and runs_on(torch.device("cpu")))):
            form = "the kernels need a GPU and Triton"
        elif (reason := why_not_plain(module)) is not None:  # hooks differ between layers
            form = reason
        elif (key := _key(module)) in tried:
            form = tried[key]
        else:
            form = tried[key] = recognize(module)
        choices.append(FusedChoice(module, setting, form))
    if setting is True and choices and all(choice.form is None for choice in choices):
        first = f"experts compute by the forward of {names[0]}, as {choices[0].reason}"
        rank_zero_warn(f"fused_experts=True has no effect: {first}")
    return choices


def report(choice: FusedChoice, name: str, class_name: str, others: str = "") -> None:
    """Tell once which path a model's experts take: a warning if ``fused_experts=True`` has no effect.

    Args:
        choice: Choice of the first layer that was called, after :meth:`FusedChoice.form_for`.
        name: Name of the layer.
        class_name: Class of the layer.
        others: Further part of the path, such as the dispatcher.
    """
    path = "fused kernels" if choice.reason is None else f"the forward of {class_name}, as {choice.reason}"
    line = f"experts of {name} compute by {path}{others}"
    if choice.setting is True and choice.form is not None and choice.reason is not None:
        rank_zero_warn(f"fused_experts=True has no effect: {line}")
    else:
        rank_zero_info(line)


def runs_on(device: torch.device) -> bool:
    """Return ``True`` if Triton's kernels run there: on a GPU, or in Triton's interpreter."""
    is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return _HAS_TRITON and (is_interpreted if device.type == "cpu" else device.type == "cuda")


_HAS_TRITON = importlib.util.find_spec("triton") is not None


def _key(module: nn.Module) -> Any:
    """Return a key that is equal for modules of one class that compute the same of their parameters."""
    shapes = tuple((name, tuple(p.shape), p.dtype) for name, p in module.named_parameters(recurse=False))
    parts = []
    for name, part in module.named_modules():
        settings = {k: v if isinstance(v, PLAIN) else id(v) for k, v in _settings(part).items()}
        parts.append((name, type(part), repr(settings)))
    return shapes, tuple(parts)


PLAIN = (int, float, str, type(None))
"""Types whose values are compared. Objects of others are compared by identity."""


def _settings(module: nn.Module) -> dict[str, Any]:
    """Return the attributes of one module that its forward may read, without its submodules and tensors."""
    return {name: value for name, value in vars(module).items() if name not in OF_EVERY_MODULE}


def _are_equal(module: nn.Module, settings: dict[str, Any]) -> bool:
    """Return ``True`` if a module has ``settings``, and no new attribute that hides one of its class."""
    own = vars(module)
    for name, value in settings.items():
        current = own.get(name, settings)  # no attribute is this dictionary
        if current is not value and not (isinstance(value, PLAIN) and current == value):
            return False
    return not any(hasattr(type(module), name) for name in own.keys() - OF_EVERY_MODULE - settings.keys())
