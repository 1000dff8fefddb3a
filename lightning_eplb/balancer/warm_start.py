"""Warm start: checks of a known load that experts are arranged by before the first step."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from lightning_eplb.balancer.models import ModelLayers
from lightning_eplb.parallel.consensus import check_same_on_all_ranks
from lightning_eplb.parallel.groups import ExpertGroups

Load: TypeAlias = np.ndarray | Tensor | list[Any] | Mapping[str, Any]
"""Tokens of each logical expert, ``[Y, L]`` or ``[W, Y, L]``; of several models by the models' names."""


def check_loads(
    given: Load | None, models: Sequence[ModelLayers], groups: ExpertGroups
) -> dict[str, np.ndarray] | None:
    """Check the load that ``rearrange()`` was given. Every rank of the default group must call it.

    Args:
        given: Load of the only model, or loads by model. ``None`` for the windows' load.
        models: Models of the balancer.
        groups: Process groups of the experts.

    Returns:
        Load of each model, int64 ``[W, Y, L]``: the latest steps that its window has room for. Empty for models without
        one. ``None`` without a load.

    Raises:
        ValueError: Ranks were given different loads, a load has another shape, dtype or values, or it is not clear for
            which model it is. All ranks raise it.
    """
    loads = given if isinstance(given, Mapping) or given is None else {"": given}
    described = "None" if loads is None else {str(name): _describe(load) for name, load in loads.items()}
    check_same_on_all_ranks({"load": described}, "rearrange() moves experts between ranks", groups)
    if loads is None:
        return None
    names = [model.name for model in models]
    if not isinstance(given, Mapping):
        if len(names) > 1:
            raise ValueError(
                f"load=a {type(given).__name__} is for one model, and the balancer has {names}. Name its model, as in"
                f" {{{names[0]!r}: load}}."
            )
        loads = dict(zip(names, loads.values(), strict=True))
    unknown = [name for name in loads if name not in names]
    if unknown:
        raise ValueError(f"load has {unknown}, which are no models of the balancer. Use some of {names}.")
    checked = {
        model.name: _check_load(loads[model.name], model)
        if model.name in loads
        else np.empty((0, model.placement.num_layers, model.placement.num_logical_experts), dtype=np.int64)
        for model in models
    }
    if not any(load_WYL.any() for load_WYL in checked.values()):
        raise ValueError("load has no token in its latest steps, so it does not tell which experts are popular")
    return checked


def _describe(load: Any) -> str:
    """Return shape, dtype and a digest of an array, or the type of anything else."""
    try:
        array = _as_array(load)
    except (TypeError, ValueError, RuntimeError):
        return f"a {type(load).__name__}"
    return f"{list(array.shape)} {array.dtype} {hashlib.sha256(array.tobytes()).hexdigest()[:16]}"


def _as_array(load: Any) -> np.ndarray:
    if isinstance(load, Tensor):
        load = load.detach().cpu()
        return (load.float() if load.dtype == torch.bfloat16 else load).numpy()
    return np.asarray(load)


def _check_load(load: Any, model: ModelLayers) -> np.ndarray:
    layers, experts = model.placement.num_layers, model.placement.num_logical_experts
    of_model = "" if model.name == "model" else f" of {model.name}"
    try:
        array = _as_array(load)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"load{of_model} is a {type(load).__name__} that is no array: {error}") from None
    if array.ndim not in (2, 3) or array.shape[-2:] != (layers, experts) or not len(array):
        raise ValueError(
            f"load{of_model} has shape {list(array.shape)}; it must be [layers, experts] = [{layers}, {experts}], or"
            f" [steps, {layers}, {experts}] with at least one step"
        )
    if array.dtype.kind not in "iuf":
        raise ValueError(f"load{of_model} has dtype {array.dtype}; it must hold counts of tokens, such as int64")
    steps_WYL = array.reshape(-1, layers, experts)[-model.load.window_size :]
    is_wrong_WYL = ~np.isfinite(steps_WYL) | (steps_WYL < 0) | (steps_WYL != np.floor(steps_WYL))
    if is_wrong_WYL.any():
        step, layer, expert = np.argwhere(is_wrong_WYL)[0]
        raise ValueError(
            f"load{of_model} has {steps_WYL[step, layer, expert]} tokens for expert {expert} of layer {layer}; tokens"
            " are counted in whole numbers from 0. Multiply shares by a large number and round them."
        )
    if steps_WYL.sum(dtype=np.float64) >= 2.0**62:
        raise ValueError(f"load{of_model} has more tokens in all than int64 counts. Divide them by a number.")
    return steps_WYL.astype(np.int64)
