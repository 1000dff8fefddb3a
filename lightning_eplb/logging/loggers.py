"""Give pictures, histograms and tables to the loggers that take them."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from lightning_eplb.logging.placement_table import COLUMNS, placement_rows
from lightning_eplb.placement import ExpertPlacement

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EXPERT_LOAD, SLOT_LOAD, RANK_LOAD = PICTURES = ("eplb/expert_load", "eplb/slot_load", "eplb/rank_load")
HISTOGRAM = "eplb/load_histogram"
TABLE = "eplb/placement"


def takes_pictures(loggers: Iterable[Logger]) -> bool:
    """Whether :func:`log_heatmaps` would write anything, so that nothing is drawn in vain.

    True on rank zero when there is a ``WandbLogger`` or a ``TensorBoardLogger``. It communicates with nobody: what
    needs a collective, such as ``ExpertLoad.compute``, must be done on every rank before this is asked.
    """
    return rank_zero_only.rank == 0 and any(isinstance(logger, (WandbLogger, TensorBoardLogger)) for logger in loggers)


def log_heatmaps(loggers: Iterable[Logger], step: int, figures: "Mapping[str, Figure]") -> None:
    """Give each figure as a picture to each ``WandbLogger`` and ``TensorBoardLogger``. Others are passed over.

    May be called on every rank; only rank zero writes.

    Args:
        loggers: Those of the trainer, ``trainer.loggers``.
        step: What the row of the history has as ``trainer/global_step``, which is the axis that ``WandbLogger`` gives
            to everything. To share the row's step with what ``self.log`` wrote in the same batch, it must be what
            Lightning gives its loggers: the number of optimizer steps *before* that batch,
            ``trainer.global_step - 1`` in ``on_train_batch_end`` with one optimizer.
        figures: By the name that they have in the run, such as ``eplb/expert_load``; as the ``draw_`` functions of
            :mod:`lightning_eplb.logging.heatmap` return them.
    """
    if not takes_pictures(loggers):
        return
    pictures = {name: _picture(figure) for name, figure in figures.items()}
    for logger in loggers:
        # Lightning imports wandb in the logger's methods: whoever has no WandbLogger never imports it.
        if isinstance(logger, WandbLogger):
            from PIL.Image import fromarray

            for name, picture in pictures.items():
                # Not `experiment.log(..., step=...)`: that step is W&B's own counter of rows, and rows that are late
                # by it are dropped. `log_image` writes `step` into the row as `trainer/global_step`.
                logger.log_image(key=name, images=[fromarray(picture)], step=step)
        elif isinstance(logger, TensorBoardLogger):
            for name, picture in pictures.items():
                logger.experiment.add_image(name, picture, step, dataformats="HWC")


def log_histogram(loggers: Iterable[Logger], step: int, load_YL: Any) -> None:
    """Give each ``WandbLogger`` and ``TensorBoardLogger`` a histogram of the experts' tokens over the even ones.

    May be called on every rank; only rank zero writes.

    Args:
        loggers: Those of the trainer.
        step: As in :func:`log_heatmaps`.
        load_YL: Tokens of each logical expert, ``[Y, L]`` int64 on the CPU. Layers without a token are left out.
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
            logger.log_metrics({HISTOGRAM: histogram}, step=step)  # type: ignore[dict-item]
        elif isinstance(logger, TensorBoardLogger):
            logger.experiment.add_histogram(HISTOGRAM, share_N, step)


def log_placement(loggers: Iterable[Logger], step: int, placement: ExpertPlacement, load_YL: np.ndarray) -> None:
    """Give each ``WandbLogger`` a table of where the experts are and what they get.

    May be called on every rank; only rank zero writes.

    Args:
        loggers: Those of the trainer.
        step: As in :func:`log_heatmaps`.
        placement: Where the experts are.
        load_YL: Tokens of each logical expert, ``[Y, L]``.
    """
    if rank_zero_only.rank != 0:
        return
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.log_table(key=TABLE, columns=list(COLUMNS), data=placement_rows(placement, load_YL), step=step)


def _picture(figure: "Figure") -> np.ndarray:
    """The figure as RGB, ``[height, width, 3]`` uint8. Given the figure itself, W&B would patch matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3].copy()
