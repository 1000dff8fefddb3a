"""Scalars, pictures and tables of the load, for loggers and the terminal."""

from lightning_eplb.logging.heatmap import draw_before_after, draw_expert_load, draw_rank_load
from lightning_eplb.logging.loggers import log_heatmaps, log_histogram, log_placement, takes_pictures

__all__ = [
    "draw_before_after",
    "draw_expert_load",
    "draw_rank_load",
    "log_heatmaps",
    "log_histogram",
    "log_placement",
    "takes_pictures",
]
