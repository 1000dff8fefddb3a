"""State of a balancer in a checkpoint: windows and counters, as tensors and numbers."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lightning_eplb.balancer.models import ModelLayers
from lightning_eplb.parallel.consensus import check_same_on_all_ranks
from lightning_eplb.parallel.groups import ExpertGroups


def save_windows(models: Sequence[ModelLayers]) -> dict[str, Any]:
    """Return the windows and the placements, for :func:`load_windows` and for inspection.

    Those of the only model that is distributed are ``window`` and ``physical_to_logical``. Others are under ``models``,
    by name. ``ExpertLoadBalancer.resume_placement`` uses the placements on the same number of ranks.
    """
    states: dict[str, dict[str, Any]] = {}
    for model in models:
        states[model.name] = {"window": model.load.steps().cpu(), "num_steps": model.num_steps}
        if not model.is_whole:
            slots_YP = torch.tensor(model.placement.physical_to_logical, dtype=torch.int32)
            states[model.name]["physical_to_logical"] = slots_YP
    state: dict[str, Any] = {}
    if (only := _only_placed(models)) is not None:
        state = states.pop(only.name)
        del state["num_steps"]  # it is that of the run
    return state | ({"models": states} if states else {})


def load_windows(state: Mapping[str, Any], models: Sequence[ModelLayers]) -> None:
    """Load the windows of a state that :func:`check_saved_state` has checked."""
    saved = _by_name(state, models)
    for model in models:
        if model.name in saved:
            its = saved[model.name]
            model.reset_window(list(its["window"]), its["num_steps"])


def check_saved_state(state: Mapping[str, Any], models: Sequence[ModelLayers], groups: ExpertGroups) -> None:
    """Check the state that ``load_state_dict()`` was given. Every rank of the default group must call it.

    Args:
        state: State as ``ExpertLoadBalancer.state_dict()`` returns it.
        models: Models of the balancer.
        groups: Process groups of the experts.

    Raises:
        ValueError: Ranks were given different states, a model is missing in them, or a window has other layers or
            experts.
    """
    names = (["window"] if "window" in state else []) + list(state.get("models", {}))
    reason = "load_state_dict() of the balancer compares the states of the ranks"
    check_same_on_all_ranks({"models": names}, reason, groups)  # first, or values of other names would be compared
    values = {key: state[key] for key in ("num_steps", "steps_to_go", "num_rearrangements")}
    if "window" in state:
        values["window"] = _describe(state["window"])
    values |= {f"window of {name}": _describe(its["window"]) for name, its in state.get("models", {}).items()}
    check_same_on_all_ranks(values, reason, groups)
    saved = _by_name(state, models)
    if missing := [model.name for model in models if not model.is_whole and model.name not in saved]:
        known = list(state.get("models", {})) if "window" not in state else "one, without a name"
        raise ValueError(
            f"the saved state has no window of {missing[0]}: its models are {known}, and those of the balancer are"
            f" {[model.name for model in models]}. Resume with the models that were saved, or without this state."
        )
    for model in models:
        shape = list(model.load.ring.shape[1:])
        if model.name in saved and list(saved[model.name]["window"].shape[1:]) != shape:
            of_model = f" of {model.name}" if len(models) > 1 else ""
            raise ValueError(
                f"the saved window{of_model} has {list(saved[model.name]['window'].shape[1:])} layers and experts, the"
                f" model has {shape}. Resume with the model that was saved."
            )


def steps_of_model(state: Mapping[str, Any], name: str) -> int:
    """Return how many optimizer steps of a model a saved state counts; 0 if the model is not saved by name.

    Args:
        state: State as ``ExpertLoadBalancer.state_dict()`` returns it, or an empty one.
        name: Name of the model.
    """
    return state.get("models", {}).get(name, {}).get("num_steps", 0)


def _only_placed(models: Sequence[ModelLayers]) -> ModelLayers | None:
    first, *others = (model for model in models if not model.is_whole)
    return None if others else first


def _by_name(state: Mapping[str, Any], models: Sequence[ModelLayers]) -> dict[str, Mapping[str, Any]]:
    """Return the saved windows by the names of the models that they are for."""
    saved = dict(state.get("models", {}))
    if "window" in state and (only := _only_placed(models)) is not None:
        saved[only.name] = state
    return saved


def _describe(window_WYL: torch.Tensor) -> str:
    digest = hashlib.sha256(window_WYL.cpu().numpy().tobytes()).hexdigest()[:16]
    return f"{list(window_WYL.shape)} {digest}"
