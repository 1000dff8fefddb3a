"""Give pictures to the loggers that take them."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image


def takes_pictures(loggers: Iterable[Logger]) -> bool:
    """Whether :func:`log_heatmaps` would write anything, so that nothing is drawn in vain.

    True on rank zero when there is a ``WandbLogger``. It communicates with nobody: what needs a collective, such as
    ``ExpertLoad.compute``, must be done on every rank before this is asked.
    """
    return rank_zero_only.rank == 0 and any(isinstance(logger, WandbLogger) for logger in loggers)


def log_heatmaps(loggers: Iterable[Logger], step: int, figures: "Mapping[str, Figure]") -> None:
    """Give each figure to each ``WandbLogger`` as a picture. Other loggers are passed over.

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
    if rank_zero_only.rank != 0:
        return
    for logger in loggers:
        # Lightning imports wandb in the logger's methods: whoever has no WandbLogger never imports it.
        if isinstance(logger, WandbLogger):
            for name, figure in figures.items():
                # Not `experiment.log(..., step=...)`: that step is W&B's own counter of rows, and rows that are late
                # by it are dropped. `log_image` writes `step` into the row as `trainer/global_step`.
                logger.log_image(key=name, images=[_picture(figure)], step=step)


def _picture(figure: "Figure") -> "Image":
    """The figure as an RGB image. Given the figure itself, W&B would patch matplotlib before it draws."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL.Image import fromarray

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
