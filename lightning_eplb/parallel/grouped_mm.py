"""Grouped matrix products of Hugging Face's experts on rows that are sorted by expert.

transformers' ``grouped_mm`` sorts its tokens by expert, computes and restores their order. After the dispatch rows are
sorted already and their number for each expert is known, so that two products and an activation remain. They are
registered with transformers as an implementation of experts, and selected on a copy of the module's config.

Shape suffixes: ``M`` rows, ``D`` model width, ``S`` experts of a rank.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from lightning_eplb import _compat

NAME = "grouped_mm_of_sorted_rows"


def takes_sorted_rows(experts: nn.Module) -> bool:
    """Return ``True`` if ``experts`` uses transformers' ``grouped_mm``, and transformers has what ours needs."""
    return _compat.experts_implementation(experts) == "grouped_mm" and _is_registered()


def let_take_sorted_rows(experts: Any, ends_S: Tensor) -> None:
    """Make the forward of ``experts`` compute rows that are sorted by expert, each with a weight of one.

    Args:
        experts: Module for which :func:`takes_sorted_rows` holds, and that owns its attributes.
        ends_S: End of each expert's rows, int32.
    """
    config = _compat.with_experts_implementation(experts.config, NAME)
    experts.__dict__.update(config=config, row_ends=ends_S)


@functools.cache
def _is_registered() -> bool:
    """Register :func:`_forward`. Such experts exist only if transformers is imported."""
    moe = sys.modules.get("transformers.integrations.moe")
    linear, implementations = _compat.grouped_linear(moe), getattr(moe, "ALL_EXPERTS_FUNCTIONS", None)
    if linear is None or implementations is None:
        return False
    implementations.register(NAME, functools.partial(_forward, linear))
    return True


def _forward(
    grouped_linear: Callable[..., Tensor], experts: Any, hidden_MD: Tensor, slots_M1: Tensor, weights_M1: Tensor
) -> Tensor:
    del weights_M1  # all are one
    slots_M = slots_M1.squeeze(-1)

    def linear(name: str, rows: Tensor) -> Tensor:
        bias = getattr(experts, f"{name}_bias")[slots_M] if experts.has_bias else None
        return grouped_linear(rows, getattr(experts, name), experts.row_ends, bias, experts.is_transposed)

    if experts.has_gate:
        inner = _compat.apply_gate(experts, linear("gate_up_proj", hidden_MD))
    else:
        inner = experts.act_fn(linear("up_proj", hidden_MD))
    output_MD = linear("down_proj", inner)
    if getattr(experts, "has_post_expert_norm", False):
        output_MD = experts.post_expert_norm(output_MD)
    return output_MD.to(hidden_MD.dtype)
