"""Log pictures, histograms and tables to Weights & Biases and TensorBoard."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from lightning_eplb.placement import EMPTY, ExpertPlacement

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EXPERT_LOAD, SLOT_LOAD, RANK_LOAD = PICTURES = ("eplb/expert_load", "eplb/slot_load", "eplb/rank_load")
HISTOGRAM = "eplb/load_histogram"
TABLE = "eplb/placement"
COLUMNS = ("layer", "expert", "rank", "ranks of redundant experts", "tokens", "times even")
"""Columns of the table."""


def of_model(name: str, prefix: str) -> str:
    """Return the name of a picture or table of one model, such as ``eplb/generator/rank_load``.

    Args:
        name: Name without a model, such as ``eplb/rank_load``.
        prefix: Part that tells the model, such as ``generator/``. Empty for the only one.
    """
    return name.replace("eplb/", f"eplb/{prefix}", 1)


def takes_pictures(loggers: Iterable[Logger]) -> bool:
    """Return ``True`` if :func:`log_heatmaps` would write anything, so that nothing is drawn in vain.

    That is on rank 0 with a ``WandbLogger`` or a ``TensorBoardLogger``. Performs no communication. Collectives, such as
    ``ExpertLoad.compute``, must not depend on the answer, which differs between ranks.
    """
    return rank_zero_only.rank == 0 and any(isinstance(logger, (WandbLogger, TensorBoardLogger)) for logger in loggers)


def log_heatmaps(loggers: Iterable[Logger], step: int, figures: "Mapping[str, Figure]") -> None:
    """Log figures as pictures to each ``WandbLogger`` and ``TensorBoardLogger``. Other loggers are skipped.

    May be called on every rank; only rank 0 writes.

    Args:
        loggers: ``trainer.loggers``.
        step: Value of ``trainer/global_step``, the axis of ``WandbLogger``. To share the step with values of
            ``self.log`` in the same batch, it is the number of optimizer steps *before* that batch, as Lightning
            counts for its loggers: ``trainer.global_step - 1`` in ``on_train_batch_end`` with one optimizer.
        figures: Figures of the ``draw_`` functions of :mod:`lightning_eplb.logging.heatmap`, by their name in the run,
            such as ``eplb/expert_load``.
    """
    if not takes_pictures(loggers):
        return
    pictures = {name: _picture(figure) for name, figure in figures.items()}
    for logger in loggers:
        # Lightning imports wandb in methods of WandbLogger, so runs without one never import it.
        if isinstance(logger, WandbLogger):
            from PIL.Image import fromarray

            for name, picture in pictures.items():
                # Not `experiment.log(..., step=...)`: that step is W&B's own counter of rows, which drops late rows.
                # `log_image` writes `step` into the row as `trainer/global_step`.
                logger.log_image(key=name, images=[fromarray(picture)], step=step)
        elif isinstance(logger, TensorBoardLogger):
            for name, picture in pictures.items():
                logger.experiment.add_image(name, picture, step, dataformats="HWC")


def log_histogram(loggers: Iterable[Logger], step: int, load_YL: Any, prefix: str = "") -> None:
    """Log a histogram of the experts' shares to each ``WandbLogger`` and ``TensorBoardLogger``.

    A share is an expert's tokens divided by the mean of its layer. May be called on every rank; only rank 0 writes.

    Args:
        loggers: ``trainer.loggers``.
        step: As in :func:`log_heatmaps`.
        load_YL: Tokens of each logical expert, ``[Y, L]`` int64 on the CPU. Layers without a token are left out.
        prefix: As in :func:`of_model`. Defaults to none.
    """
    if not takes_pictures(loggers):
        return
    load = np.asarray(load_YL, dtype=np.float64)
    load = load[load.any(axis=1)]
    share_N = (load / load.mean(axis=1, keepdims=True)).ravel()
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            import wandb

            histogram = wandb.Histogram(np_histogram=np.histogram(share_N, bins=64))
            logger.log_metrics({of_model(HISTOGRAM, prefix): histogram}, step=step)  # type: ignore[dict-item]
        elif isinstance(logger, TensorBoardLogger):
            logger.experiment.add_histogram(of_model(HISTOGRAM, prefix), share_N, step)


def log_placement(
    loggers: Iterable[Logger], step: int, placement: ExpertPlacement, load_YL: np.ndarray, prefix: str = ""
) -> None:
    """Log a table of the experts' places and tokens to each ``WandbLogger``.

    May be called on every rank; only rank 0 writes.

    Args:
        loggers: ``trainer.loggers``.
        step: As in :func:`log_heatmaps`.
        placement: Placement of the experts.
        load_YL: Tokens of each logical expert, ``[Y, L]``.
        prefix: As in :func:`of_model`. Defaults to none.
    """
    if rank_zero_only.rank != 0:
        return
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            rows = placement_rows(placement, load_YL)
            logger.log_table(key=of_model(TABLE, prefix), columns=list(COLUMNS), data=rows, step=step)


def placement_rows(placement: ExpertPlacement, load_YL: np.ndarray) -> list[list[Any]]:
    """Return a row with :data:`COLUMNS` for each logical expert of each layer.

    Args:
        placement: Placement of the experts.
        load_YL: Tokens of each logical expert, ``[Y, L]``.
    """
    mean_Y = np.maximum(load_YL.mean(axis=1), 1e-9)
    rank_YLC = placement.logical_to_physical // placement.slots_per_rank
    rows = []
    for layer, expert in np.ndindex(load_YL.shape):
        primary, *redundant = rank_YLC[layer, expert][placement.logical_to_physical[layer, expert] != EMPTY].tolist()
        tokens = int(load_YL[layer, expert])
        rows.append([layer, expert, primary, " ".join(map(str, redundant)), tokens, round(tokens / mean_Y[layer], 3)])
    return rows


def _picture(figure: "Figure") -> np.ndarray:
    """Render a figure as RGB, ``[height, width, 3]`` uint8. W&B would patch matplotlib if it got the figure itself."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3].copy()
