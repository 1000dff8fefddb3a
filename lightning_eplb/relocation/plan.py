"""Plan of a relocation: the primaries that move between two placements. Pure: arrays in, plan out.

Rows of phantom experts move as others do, so that every row has one source and zeros are where the placement says.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from lightning_eplb.placement import EMPTY, ExpertPlacement


@dataclass(frozen=True, eq=False)
class LayerMoves:
    """Primaries of one layer that move, by logical id, and then phantom experts; int64 ``[moves]`` each.

    Rows are positions among a rank's primaries, ``0 ... n-1``. Both placements hold every expert once, so each written
    row has one source, and each read row has one target.
    """

    layer: int
    source_rank: np.ndarray
    source_row: np.ndarray
    target_rank: np.ndarray
    target_row: np.ndarray
    num_experts_between_ranks: int
    """Primaries that change ranks, without phantom experts."""
    num_rows_between_ranks: int
    """Rows that change ranks, those of phantom experts too."""
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
    old_order_YX = old.row_order
    old_rank_YX, old_row_YX = _places(old_order_YX, old.primaries_per_rank)
    new_rank_YX, new_row_YX = _places(_keep_phantoms(old_order_YX, old, new), old.primaries_per_rank)
    moved_YX = (old_rank_YX != new_rank_YX) | (old_row_YX != new_row_YX)
    is_between_YX = old_rank_YX != new_rank_YX
    experts_Y = is_between_YX[:, : old.num_logical_experts].sum(axis=1).tolist()
    between_Y = is_between_YX.sum(axis=1).tolist()
    sent_Y, received_Y = (_max_rank_rows(rank_YX, moved_YX, old.num_ranks) for rank_YX in (old_rank_YX, new_rank_YX))
    most_Y = np.maximum(sent_Y, received_Y).tolist()
    plan = []
    for layer in np.flatnonzero(most_Y).tolist():
        experts = np.flatnonzero(moved_YX[layer])
        places = (maps[layer, experts] for maps in (old_rank_YX, old_row_YX, new_rank_YX, new_row_YX))
        plan.append(
            LayerMoves(
                layer,
                *places,
                num_experts_between_ranks=experts_Y[layer],
                num_rows_between_ranks=between_Y[layer],
                max_rows=most_Y[layer],
            )
        )
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


def _max_rank_rows(rank_YX: np.ndarray, moved_YX: np.ndarray, num_ranks: int) -> np.ndarray:
    """Return the moved primaries of the rank that has most of them, for each layer, ``[Y]``."""
    num_layers = len(rank_YX)
    cell_YX = rank_YX + num_ranks * np.arange(num_layers)[:, None]
    counts = np.bincount(cell_YX[moved_YX], minlength=num_layers * num_ranks)
    return counts.reshape(num_layers, num_ranks).max(axis=1)


def _keep_phantoms(old_order_YX: np.ndarray, old: ExpertPlacement, new: ExpertPlacement) -> np.ndarray:
    """Return the new order of rows in which phantom experts that find their slot empty again stay there."""
    new_order_YX = new.primaries.copy()
    was_YX, is_YX = old.primaries == EMPTY, new_order_YX == EMPTY
    new_order_YX[was_YX & is_YX] = old_order_YX[was_YX & is_YX]
    new_order_YX[is_YX & ~was_YX] = old_order_YX[was_YX & ~is_YX]  # as many in each layer
    return new_order_YX


def _places(order_YX: np.ndarray, num_primaries: int) -> tuple[np.ndarray, np.ndarray]:
    """Return rank and row of each expert from the order of rows."""
    place_YX = np.argsort(order_YX, axis=1)
    return place_YX // num_primaries, place_YX % num_primaries
