"""The table says of every expert where it is."""

import numpy as np

from lightning_eplb import ExpertPlacement
from lightning_eplb.logging.loggers import COLUMNS, placement_rows


def test_placement_rows_of_four_experts_match_hand_calculation() -> None:
    placement = ExpertPlacement([[0, 3, 2, 1, 2, 0]], num_logical_experts=4, num_ranks=2)
    rows = placement_rows(placement, np.array([[6, 2, 0, 0]]))
    assert rows == [[0, 0, 0, "1", 6, 3.0], [0, 1, 1, "", 2, 1.0], [0, 2, 1, "0", 0, 0.0], [0, 3, 0, "", 0, 0.0]]
    assert len(COLUMNS) == len(rows[0])


def test_placement_rows_of_layer_without_tokens_are_zero() -> None:
    placement = ExpertPlacement.initial(1, 2, 2)
    assert [row[-2:] for row in placement_rows(placement, np.zeros((1, 2), dtype=np.int64))] == [[0, 0.0], [0, 0.0]]
