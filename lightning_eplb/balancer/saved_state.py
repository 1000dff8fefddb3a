"""State of a balancer in a checkpoint: windows and counters, as tensors and numbers."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lightning_eplb.balancer.models import ModelLayers
from lightning_eplb.parallel.consensus import check_same_on_all_ranks
from lightning_eplb.parallel.groups import ExpertGroups


def save_windows(models: Sequence[ModelLayers]) -> dict[str, Any]:
    """Return the window and the placement of the only model, or those of each model by name under ``models``.

    ``ExpertLoadBalancer.resume_placement`` uses the placement on the same number of ranks.
    """
    states = {
        model.name: {
            "window": model.load.steps().cpu(),
            "physical_to_logical": torch.tensor(model.placement.physical_to_logical, dtype=torch.int32),
            "num_steps": model.num_steps,
        }
        for model in models
    }
    if len(states) > 1:
        return {"models": states}
    (state,) = states.values()
    return {key: state[key] for key in ("window", "physical_to_logical")}  # the steps are those of the run


def load_windows(state: Mapping[str, Any], models: Sequence[ModelLayers]) -> None:
    """Load the windows of a state that :func:`check_saved_state` has checked."""
    saved = _saved_models(state)
    for model in models:
        its = saved[model.name] if len(models) > 1 else next(iter(saved.values()))
        model.reset_window(list(its["window"]), its["num_steps"])


def check_saved_state(state: Mapping[str, Any], models: Sequence[ModelLayers], groups: ExpertGroups) -> None:
    """Check the state that ``load_state_dict()`` was given. Every rank of the default group must call it.

    Args:
        state: State as ``ExpertLoadBalancer.state_dict()`` returns it.
        models: Models of the balancer.
        groups: Process groups of the experts.

    Raises:
        ValueError: Ranks were given different states, or a window has other layers or experts.
    """
    saved = _saved_models(state)
    values = {key: state[key] for key in ("num_steps", "steps_to_go", "num_rearrangements")}
    for name, its in saved.items():
        digest = hashlib.sha256(its["window"].cpu().numpy().tobytes()).hexdigest()[:16]
        values[f"window of {name}" if "models" in state else "window"] = f"{list(its['window'].shape)} {digest}"
    names = ", ".join(saved) if "models" in state else ""  # first: values of other names can't be compared
    reason = "load_state_dict() of the balancer compares the states of the ranks"
    check_same_on_all_ranks({"models": names}, reason, groups)
    check_same_on_all_ranks(values, reason, groups)
    expected = {model.name: list(model.load.ring.shape[1:]) for model in models}
    if len(saved) == len(models) == 1:
        saved = dict(zip(expected, saved.values(), strict=True))
    if set(saved) != set(expected):
        raise ValueError(
            f"the saved state is of the models {_names(state)}, and the balancer has {list(expected)}. Resume with the"
            " models that were saved, or without the balancer's state."
        )
    for name, shape in expected.items():
        if list(saved[name]["window"].shape[1:]) != shape:
            of_model = f" of {name}" if len(expected) > 1 else ""
            raise ValueError(
                f"the saved window{of_model} has {list(saved[name]['window'].shape[1:])} layers and experts, the model"
                f" has {shape}. Resume with the model that was saved."
            )


def _saved_models(state: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return dict(state.get("models", {"model": state}))


def _names(state: Mapping[str, Any]) -> str:
    return str(list(state["models"])) if "models" in state else "of one, without a name,"
