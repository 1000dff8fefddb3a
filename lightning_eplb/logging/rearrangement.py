"""Report a rearrangement: a line in the log, pictures, and warnings."""

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_eplb.balancer.step_stats import PlacementChange, RearrangementResult
from lightning_eplb.functional import rank_tokens, slot_tokens
from lightning_eplb.logging.heatmap import draw_before_after, draw_expert_load, draw_slot_load
from lightning_eplb.logging.loggers import EXPERT_LOAD, RANK_LOAD, SLOT_LOAD, log_heatmaps, of_model, takes_pictures

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def report_rearrangement(trainer: "pl.Trainer", done: RearrangementResult, layers: Mapping[str, Sequence[str]]) -> None:
    """Write a line to the log of rank 0, and pictures to its loggers. All ranks may call it.

    Args:
        trainer: Trainer with the loggers and the progress bar.
        done: Rearrangement to report.
        layers: Names of the MoE layers of each model.
    """
    names = [layer for name in done.models for layer in layers[name]]
    _warn_of_idle_layers(names, np.concatenate([change.load.sum(axis=1) for change in done.models.values()]))
    if not done.has_changed:
        _tell(trainer, f"step {trainer.global_step}: no expert moved, in no layer would it pay")
        return
    _tell(trainer, f"step {trainer.global_step}: {_in_words(done)}")
    if takes_pictures(trainer.loggers):
        figures = {}
        for change in done.models.values():
            if change.has_changed:
                figures |= _pictures(change, is_only=len(done.models) == 1)
        log_heatmaps(trainer.loggers, max(trainer.global_step - 1, 0), figures)  # before the first step: with it


def _pictures(change: PlacementChange, is_only: bool) -> "dict[str, Figure]":
    """Draw the experts, and the slots and ranks before and after a change."""
    before_YR, after_YR = rank_tokens(change.load, change.before), rank_tokens(change.load, change.after)
    before_YP, after_YP = slot_tokens(change.load, change.before), slot_tokens(change.load, change.after)
    prefix, of_name = ("", "") if is_only else (f"{change.name}/", f" of {change.name}")
    figures = {
        EXPERT_LOAD: draw_expert_load(change.load, f"Load of the logical experts{of_name}"),
        SLOT_LOAD: draw_slot_load(before_YP, after_YP, f"Load of the slots{of_name}, rank by rank"),
        RANK_LOAD: draw_before_after(before_YR, after_YR, f"Rearrangement{of_name}"),
    }
    return {of_model(name, prefix): figure for name, figure in figures.items()}


def _tell(trainer: "pl.Trainer", line: str) -> None:
    """Print a line on rank 0: in the log or, if a progress bar would be drawn over it, above the bar."""
    bar = trainer.progress_bar_callback
    if bar is None or not sys.stderr.isatty():
        rank_zero_info(line)
    elif trainer.is_global_zero:
        bar.print(line)


def _in_words(done: RearrangementResult) -> str:
    changes = [_change_in_words(change) for change in done.models.values()]
    if len(changes) > 1:
        changes = ["; ".join(f"{name}: {words}" for name, words in zip(done.models, changes, strict=True)) + "; in all"]
    return (
        f"{changes[0]}{',' if len(done.models) == 1 else ''} {done.num_bytes / 2**20:.1f} MiB in {done.seconds:.2f} s;"
        f" balancedness of the window {done.balancedness_before:.3f} -> {done.balancedness_after:.3f}"
    )


def _change_in_words(change: PlacementChange) -> str:
    moved = "no expert changed ranks"
    if change.num_rows:
        moved = f"{_count(change.num_rows, 'expert')} in {_count(change.num_layers, 'layer')} changed ranks"
    redundant = ""
    if change.num_copies:  # balancedness may fall: replicas that cost more than they save are dropped
        redundant_YRE = change.after.by_rank[:, :, change.after.primaries_per_rank :]
        filled = int((redundant_YRE >= 0).sum())
        redundant = (
            f", {_count(change.num_copies, 'redundant slot')} changed ({filled} of {redundant_YRE.size} filled now)"
        )
    return moved + redundant


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _warn_of_idle_layers(names: Sequence[str], tokens_Y: np.ndarray) -> None:
    """Warn of layers without a token. A copy of a model, such as an average, would be placed by a load of its own."""
    idle = [name for name, tokens in zip(names, tokens_Y, strict=True) if not tokens]
    if idle and tokens_Y.any():
        rank_zero_warn(
            f"{len(idle)} of {len(names)} MoE layers got no token in the window, {idle[0]} first. If they belong to a"
            " copy of the model, such as an average of its weights: experts of model and copy change ranks apart, so"
            " average what state_dict() returns, not parameters"
        )
