"""Attributes with an element for each expert, beside the parameters: buffers, tensors, lists, lists of modules.

They stay whole on every rank, in the order of logical experts, as the router and the model's own code know them. So
relocation leaves them alone, and a state dict holds them as they are. The forward gets the elements of the experts that
it computes. Additions to a tensor, such as a counter of tokens, are summed over ranks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_eplb import _compat
from lightning_eplb.parallel.packing import to_device


@dataclass(frozen=True)
class PerExpertState:
    """Names of a module's attributes with an element for each expert, without its parameters.

    Attributes:
        attributes: Attributes of which the forward gets the elements of the experts that it computes.
        counters: Tensors among them that the forward adds to.
        has_modules: Some of them are modules, whose parameters every rank has.
    """

    attributes: tuple[str, ...] = ()
    counters: tuple[str, ...] = ()
    has_modules: bool = False


DICTIONARIES = (dict, nn.ModuleDict, nn.ParameterDict)
"""Types whose keys are in the order of logical experts."""


def make_part(
    module: nn.Module,
    original: type[nn.Module],
    parameters: Mapping[str, Tensor],
    attributes: Sequence[str],
    experts: Sequence[int],
) -> nn.Module:
    """Create a module that computes some of the experts of ``module``, without copying its tensors.

    Args:
        module: Module with all experts.
        original: Class of the new module.
        parameters: Weights of these experts, by name.
        attributes: Names of attributes with an element for each expert, see :class:`PerExpertState`.
        experts: Logical ids of these experts, in the order of the weights' rows.
    """
    part = object.__new__(original)
    part.__dict__.update(module.__dict__, num_experts=len(experts))
    own = _compat.registered(module)
    _compat.replace_registered(part, own.parameters | dict(parameters))
    if attributes:
        _compat.replace_registered(part, buffers=dict(own.buffers), children=dict(own.children))
    select_elements(part, attributes, experts)
    return part


def select_elements(part: nn.Module, attributes: Sequence[str], experts: Sequence[int]) -> None:
    """Replace attributes of ``part``, which owns its dictionaries, by their elements for some experts."""
    for name in attributes:
        elements = _elements(getattr(part, name), experts)
        own = _compat.registered(part)
        own.buffers.pop(name, None)
        own.children.pop(name, None)
        part.__dict__[name] = elements


def _elements(value: Any, experts: Sequence[int]) -> Any:
    if isinstance(value, Tensor):
        return value[to_device(np.array(experts), value.device)]
    if isinstance(value, np.ndarray):
        return value[list(experts)]
    if isinstance(value, DICTIONARIES):
        keys = list(value)
        return {keys[i]: value[keys[expert]] for i, expert in enumerate(experts)}
    elements = [value[expert] for expert in experts]
    return tuple(elements) if isinstance(value, tuple) else elements


class CounterUpdates:
    """Sums that the forward passes of one call add to a module's counters.

    Args:
        module: Module with the whole counters.
        counters: Names of the counters.
    """

    def __init__(self, module: nn.Module, counters: Sequence[str]) -> None:
        self._module = module
        self.sums: dict[str, Tensor] = {}
        """Sums by name, in dtypes that collectives take: int64, or float32 at least for floating point."""
        for name in counters:
            value = getattr(module, name)
            self.sums[name] = torch.zeros_like(value, dtype=_wide(value))

    def add(self, part: nn.Module, experts: Sequence[int]) -> None:
        """Add the changes that ``part`` made to its elements of the counters, those of ``experts``."""
        with torch.no_grad():
            for name, sums in self.sums.items():
                index = to_device(np.array(experts), sums.device)
                before = getattr(self._module, name)[index].to(sums.dtype)
                sums.index_add_(0, index, getattr(part, name).to(sums.dtype) - before)

    def write(self) -> None:
        """Add the sums to the counters, in place."""
        with torch.no_grad():
            for name, sums in self.sums.items():
                getattr(self._module, name).add_(sums)


class CounterSync:
    """Counters of a module that each EP group adds to by itself, since they call it unequally often.

    Args:
        module: Module with the whole counters, the same on all ranks.
        counters: Names of the counters.
    """

    def __init__(self, module: nn.Module, counters: Sequence[str]) -> None:
        self._module = module
        self._before = {name: getattr(module, name).to(_wide(getattr(module, name)), copy=True) for name in counters}

    @torch.no_grad()
    def all_reduce(self, edp_group: dist.ProcessGroup) -> None:
        """Add what all EP groups have counted since this was created. Every rank must call it, once."""
        for name, before in self._before.items():
            value = getattr(self._module, name)
            added = value.to(before.dtype) - before
            dist.all_reduce(added, group=edp_group)
            value.copy_(before + added)


def _wide(value: Tensor) -> torch.dtype:
    return torch.promote_types(value.dtype, torch.float32) if value.is_floating_point() else torch.int64
