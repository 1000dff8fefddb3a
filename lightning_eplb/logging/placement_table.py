"""Where the experts are, as a table."""

from typing import Any

import numpy as np

from lightning_eplb.placement import EMPTY, ExpertPlacement

COLUMNS = ("layer", "expert", "rank", "ranks of copies", "tokens", "times even")


def placement_rows(placement: ExpertPlacement, load_YL: np.ndarray) -> list[list[Any]]:
    """A row for each logical expert of each layer, with the columns :data:`COLUMNS`.

    Args:
        placement: Where they are.
        load_YL: Their tokens, ``[Y, L]``.
    """
    mean_Y = np.maximum(load_YL.mean(axis=1), 1e-9)
    rank_YLC = placement.logical_to_physical // placement.slots_per_rank
    rows = []
    for layer, expert in np.ndindex(load_YL.shape):
        primary, *copies = rank_YLC[layer, expert][placement.logical_to_physical[layer, expert] != EMPTY].tolist()
        tokens = int(load_YL[layer, expert])
        rows.append([layer, expert, primary, " ".join(map(str, copies)), tokens, round(tokens / mean_Y[layer], 3)])
    return rows
