"""Plan of a relocation: the primaries that move between two placements. Pure: arrays in, plan out."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from lightning_eplb.placement import ExpertPlacement


@dataclass(frozen=True, eq=False)
class LayerMoves:
    """Primaries of one layer that move, in the order of their logical ids; int64 ``[moves]`` each.

    Rows are positions among a rank's primaries, ``0 ... n-1``. Both placements hold every expert once, so each written
    row has one source, and each read row has one target.
    """

    layer: int
    source_rank: np.ndarray
    source_row: np.ndarray
    target_rank: np.ndarray
    target_row: np.ndarray
    num_rows_between_ranks: int
    max_rows: int
    """Rows that the fullest rank sends or receives, also those that keep their rank."""


def plan_relocation(old: ExpertPlacement, new: ExpertPlacement) -> list[LayerMoves]:
    """Return the moves of primaries that lead from ``old`` to ``new``, for the layers that have any.

    A change of redundant experts moves nothing, since their weights are sent in every forward pass.

    Raises:
        ValueError: The placements differ in layers, experts, slots or ranks.
    """
    if (old.physical_to_logical.shape, old.num_logical_experts, old.num_ranks) != (
        new.physical_to_logical.shape,
        new.num_logical_experts,
        new.num_ranks,
    ):
        raise ValueError(f"a placement must keep its shape: {new!r} can't follow {old!r}")
    old_rank_YL, old_row_YL = _places(old)
    new_rank_YL, new_row_YL = _places(new)
    moved_YL = (old_rank_YL != new_rank_YL) | (old_row_YL != new_row_YL)
    between_Y = (old_rank_YL != new_rank_YL).sum(axis=1).tolist()
    sent_Y, received_Y = (_max_rank_rows(rank_YL, moved_YL, old.num_ranks) for rank_YL in (old_rank_YL, new_rank_YL))
    most_Y = np.maximum(sent_Y, received_Y).tolist()
    plan = []
    for layer in np.flatnonzero(most_Y).tolist():
        experts = np.flatnonzero(moved_YL[layer])
        places = (maps[layer, experts] for maps in (old_rank_YL, old_row_YL, new_rank_YL, new_row_YL))
        plan.append(LayerMoves(layer, *places, num_rows_between_ranks=between_Y[layer], max_rows=most_Y[layer]))
    return plan


def plan_relocations(old: Sequence[ExpertPlacement], new: Sequence[ExpertPlacement]) -> list[LayerMoves]:
    """Return the moves of several models. Layers are numbered through: those of the first model, then the next's.

    Raises:
        ValueError: As in :func:`plan_relocation`.
    """
    plan, first = [], 0
    for before, after in zip(old, new, strict=True):
        plan += [replace(moves, layer=first + moves.layer) for moves in plan_relocation(before, after)]
        first += before.num_layers
    return plan


def _max_rank_rows(rank_YL: np.ndarray, moved_YL: np.ndarray, num_ranks: int) -> np.ndarray:
    """Return the moved primaries of the rank that has most of them, for each layer, ``[Y]``."""
    num_layers = len(rank_YL)
    cell_YL = rank_YL + num_ranks * np.arange(num_layers)[:, None]
    counts = np.bincount(cell_YL[moved_YL], minlength=num_layers * num_ranks)
    return counts.reshape(num_layers, num_ranks).max(axis=1)


def _places(placement: ExpertPlacement) -> tuple[np.ndarray, np.ndarray]:
    primary_YL = placement.primary_slot
    return primary_YL // placement.slots_per_rank, primary_YL % placement.slots_per_rank
