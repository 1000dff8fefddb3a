"""Placement of the experts as a table."""

from typing import Any

import numpy as np

from lightning_eplb.placement import EMPTY, ExpertPlacement

COLUMNS = ("layer", "expert", "rank", "ranks of copies", "tokens", "times even")


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
        primary, *copies = rank_YLC[layer, expert][placement.logical_to_physical[layer, expert] != EMPTY].tolist()
        tokens = int(load_YL[layer, expert])
        rows.append([layer, expert, primary, " ".join(map(str, copies)), tokens, round(tokens / mean_Y[layer], 3)])
    return rows
