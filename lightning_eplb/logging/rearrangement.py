"""Report a rearrangement: a line in the log, pictures, and warnings."""

import sys
from collections.abc import Sequence

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_eplb.balancer.step_stats import RearrangementResult
from lightning_eplb.functional import rank_tokens, slot_tokens
from lightning_eplb.logging.heatmap import draw_before_after, draw_expert_load, draw_slot_load
from lightning_eplb.logging.loggers import EXPERT_LOAD, RANK_LOAD, SLOT_LOAD, log_heatmaps, takes_pictures


def report_rearrangement(trainer: "pl.Trainer", done: RearrangementResult, layers: Sequence[str]) -> None:
    """Write a line to the log of rank 0, and pictures to its loggers. All ranks may call it.

    Args:
        trainer: Trainer with the loggers and the progress bar.
        done: Rearrangement to report.
        layers: Names of the MoE layers.
    """
    _warn_of_idle_layers(layers, done.load)
    if done.before == done.after:
        _tell(trainer, f"step {trainer.global_step}: no expert moved, in no layer would it pay")
        return
    _tell(trainer, f"step {trainer.global_step}: {_in_words(done)}")
    if takes_pictures(trainer.loggers):
        before_YR, after_YR = rank_tokens(done.load, done.before), rank_tokens(done.load, done.after)
        before_YP, after_YP = slot_tokens(done.load, done.before), slot_tokens(done.load, done.after)
        figures = {
            EXPERT_LOAD: draw_expert_load(done.load),
            SLOT_LOAD: draw_slot_load(before_YP, after_YP),
            RANK_LOAD: draw_before_after(before_YR, after_YR),
        }
        log_heatmaps(trainer.loggers, max(trainer.global_step - 1, 0), figures)  # before the first step: with it


def _tell(trainer: "pl.Trainer", line: str) -> None:
    """Print a line on rank 0: in the log or, if a progress bar would be drawn over it, above the bar."""
    bar = trainer.progress_bar_callback
    if bar is None or not sys.stderr.isatty():
        rank_zero_info(line)
    elif trainer.is_global_zero:
        bar.print(line)


def _in_words(done: RearrangementResult) -> str:
    moved = "no expert changed ranks"
    if done.num_rows:
        moved = f"{_count(done.num_rows, 'expert')} in {_count(done.num_layers, 'layer')} changed ranks"
    redundant = ""
    if done.num_copies:  # balancedness may fall: replicas that cost more than they save are dropped
        redundant_YRE = done.after.by_rank[:, :, done.after.primaries_per_rank :]
        filled = int((redundant_YRE >= 0).sum())
        redundant = (
            f", {_count(done.num_copies, 'redundant slot')} changed ({filled} of {redundant_YRE.size} filled now)"
        )
    return (
        f"{moved}{redundant}, {done.num_bytes / 2**20:.1f} MiB in {done.seconds:.2f} s; balancedness of the window"
        f" {done.balancedness_before:.3f} -> {done.balancedness_after:.3f}"
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _warn_of_idle_layers(names: Sequence[str], load_YL: np.ndarray) -> None:
    """Warn of layers without a token. A copy of a model, such as an average, would be placed by a load of its own."""
    tokens_Y = load_YL.sum(axis=1)
    idle = [name for name, tokens in zip(names, tokens_Y, strict=True) if not tokens]
    if idle and tokens_Y.any():
        rank_zero_warn(
            f"{len(idle)} of {len(names)} MoE layers got no token in the window, {idle[0]} first. If they belong to a"
            " copy of the model, such as an average of its weights: experts of model and copy change ranks apart, so"
            " average what state_dict() returns, not parameters"
        )
