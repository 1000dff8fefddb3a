"""``inspect``: show the load and the placement in a checkpoint."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightning_eplb.checkpoint.without_weights import read_without_weights
from lightning_eplb.cli.terminal import aligned
from lightning_eplb.functional import balancedness, load_entropy
from lightning_eplb.placement import EMPTY, ExpertPlacement
from lightning_eplb.policies.token_split import level_tokens

HELP = "show the load and the placement that a checkpoint holds"
DESCRIPTION = """\
Show what EPLBCallback saved in a checkpoint: the load of its window, and where
the experts were. Weights are not read into memory. A run that resumes on as
many ranks starts from this placement, and on others plans one by the window."""
EPILOG = """\
for example:
  %(prog)s checkpoints/last.ckpt
  %(prog)s checkpoints/last.ckpt --layer 3
  %(prog)s checkpoints/last.ckpt --model generator --layer 3
"""
MEANINGS = """
Times even: tokens of the hottest expert over the mean of its layer. Entropy: of the experts' shares, 1 is even.
Balancedness: mean over ranks / fullest rank, had this placement served the window at once, or the first one.
Moved: primaries that are on another rank than where training starts."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a file, or the folder of a sharded one")
    parser.add_argument("--layer", type=int, metavar="N", help="show rank by rank what this MoE layer's slots hold")
    parser.add_argument("--model", metavar="NAME", help="show this one of several models; all if not given")


def run(arguments: argparse.Namespace) -> int:
    checkpoint = read_without_weights(arguments.checkpoint)
    state = _state_of_callback(checkpoint, arguments.checkpoint)
    models = _chosen(state, arguments.model, arguments.layer)
    print(
        f"{arguments.checkpoint}: optimizer step {checkpoint.get('global_step', 'unknown')},"
        f" {state.num_rearrangements} rearrangements, {state.rearranged_bytes / 2**20:.1f} MiB moved"
    )
    for name, model in models.items():
        if len(state.models) > 1:
            print(f"\n{name or 'model'}")
        _show(model, arguments.layer, arguments.checkpoint)
    if arguments.layer is None:
        print(MEANINGS)
    return 0


def _chosen(state: "_Saved", name: str | None, layer: int | None) -> "dict[str, _SavedModel]":
    """Return the models to show, by name."""
    names = [known or "model" for known in state.models]
    if name is not None and name not in names:
        raise ValueError(f"--model {name} is not in the checkpoint. Use one of {', '.join(names)}.")
    chosen = {known: model for known, model in state.models.items() if name in (None, known or "model")}
    if layer is not None and len(chosen) > 1:
        raise ValueError(f"--layer {layer} needs --model: the checkpoint has the models {', '.join(names)}")
    for model in chosen.values():
        layers = model.window.shape[1]
        if layer is not None and not 0 <= layer < layers:
            raise ValueError(f"--layer {layer} must be 0 to {layers - 1}: the model has {layers} MoE layers")
    return chosen


def _show(model: "_SavedModel", layer: int | None, checkpoint: Path) -> None:
    load_YL, placement = model.window.sum(axis=0), model.placement
    layers, experts = load_YL.shape
    print(f"window: the last {len(model.window)} steps, {layers} layers of {experts} experts")
    if placement is None:
        print("placement: not in this checkpoint")
    else:
        print(
            f"placement: {placement.num_ranks} ranks, {placement.num_redundant_experts} redundant experts of each layer"
        )
    print()
    if layer is None:
        rows = _layer_by_layer(load_YL, placement)
    else:
        if placement is None:
            raise ValueError(f"{checkpoint} holds no placement: an earlier version saved it, or a model that is whole")
        rows = _rank_by_rank(load_YL[layer], placement, layer)
    for line in aligned(rows):
        print(line)


@dataclass(frozen=True)
class _SavedModel:
    """Checked window of a model, ``[W, Y, L]`` (steps, layers, experts), and its placement."""

    window: np.ndarray
    placement: ExpertPlacement | None


@dataclass(frozen=True)
class _Saved:
    """Checked state of an ``EPLBCallback``: models by name, which is empty for the only one that is distributed."""

    models: dict[str, _SavedModel]
    num_rearrangements: int
    rearranged_bytes: int


def _state_of_callback(checkpoint: dict[str, Any], path: Path) -> _Saved:
    callbacks = checkpoint.get("callbacks")
    for state in callbacks.values() if isinstance(callbacks, dict) else ():
        counts = {"num_rearrangements", "rearranged_bytes"}
        if isinstance(state, dict) and counts <= state.keys() and {"window", "models"} & state.keys():
            try:
                return _checked(state)
            except ValueError as error:
                raise ValueError(f"{path} has a damaged state of an EPLBCallback: {error}") from error
    raise ValueError(f"{path} has no state of an EPLBCallback: it was saved without one, or with weights only")


def _checked(state: dict[str, Any]) -> _Saved:
    counts = state["num_rearrangements"], state["rearranged_bytes"]
    if any(isinstance(count, bool) or not isinstance(count, int) for count in counts):
        raise ValueError("num_rearrangements and rearranged_bytes must be whole numbers")
    others = state.get("models", {})
    if not isinstance(others, dict) or not all(isinstance(each, dict) for each in others.values()):
        raise ValueError("its models must be windows by name")
    parts = ({"": state} if "window" in state else {}) | others
    return _Saved({str(name): _checked_model(part, state.get("num_ranks")) for name, part in parts.items()}, *counts)


def _checked_model(state: dict[str, Any], ranks: Any) -> _SavedModel:
    window: Any = state.get("window")
    if not (_holds_whole_numbers(window, 3) and min(window.shape[1:]) > 0 and not (window < 0).any()):
        raise ValueError("its window must be a tensor [steps, layers, experts] of counted tokens")
    placement = None
    if "physical_to_logical" in state:
        slots = state["physical_to_logical"]
        if not (_holds_whole_numbers(slots, 2) and len(slots) == window.shape[1]):
            raise ValueError("its placement must be a tensor [layers, slots] of experts")
        if isinstance(ranks, bool) or not isinstance(ranks, int):
            raise ValueError("num_ranks must be a whole number")
        placement = ExpertPlacement(slots.numpy(), window.shape[2], ranks)
    return _SavedModel(window.numpy(), placement)


def _holds_whole_numbers(value: Any, ndim: int) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and value.ndim == ndim
        and value.dtype in (torch.int8, torch.int16, torch.int32, torch.int64)
        and value.layout == torch.strided
        and not value.is_meta
    )


def _layer_by_layer(load_YL: np.ndarray, placement: ExpertPlacement | None) -> list[list[str]]:
    head = ["layer", "hottest expert", "times even", "without a token", "entropy"]
    initial = None
    if placement is not None:
        head += ["balancedness", "at first", "moved", "redundant"]
        initial = ExpertPlacement.initial(
            placement.num_layers, placement.num_logical_experts, placement.num_ranks, placement.num_redundant_experts
        )
    rows = [head]
    for layer, load_L in enumerate(load_YL):
        mean = load_L.mean()
        row = [
            str(layer),
            str(load_L.argmax()) if mean else "-",
            f"{load_L.max() / mean:.2f}" if mean else "-",
            str((load_L == 0).sum()),
            f"{load_entropy(load_L[None]):.3f}",
        ]
        if placement is not None and initial is not None:
            row += [_balancedness(load_L, each.by_rank[layer]) for each in (placement, initial)]
            row.append(str((placement.primary_rank[layer] != initial.primary_rank[layer]).sum()))
            row.append(str(placement.replica_count[layer].sum() - placement.num_logical_experts))
        rows.append(row)
    return rows


def _balancedness(load_L: np.ndarray, slots_RS: np.ndarray) -> str:
    return f"{balancedness(level_tokens(load_L[None], slots_RS[None])):.3f}"


def _rank_by_rank(load_L: np.ndarray, placement: ExpertPlacement, layer: int) -> list[list[str]]:
    tokens_R = level_tokens(load_L[None], placement.by_rank[layer][None])[0]
    rows = [["rank", "tokens", "times even", "primaries", "redundant"]]
    for rank, slots_S in enumerate(placement.by_rank[layer]):
        primaries = slots_S[: placement.primaries_per_rank]
        redundant = [expert for expert in slots_S[placement.primaries_per_rank :] if expert != EMPTY]
        rows.append(
            [
                str(rank),
                f"{tokens_R[rank]:,.0f}",
                f"{tokens_R[rank] / tokens_R.mean():.3f}" if tokens_R.any() else "-",
                " ".join(map(str, primaries)),
                " ".join(map(str, redundant)) or "-",
            ]
        )
    return rows
