"""The plan from one placement to another."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_eplb import ExpertPlacement
from lightning_eplb.policies import Topology
from lightning_eplb.relocation.plan import plan_relocation
from tests.fidelity import ShufflePolicy


@st.composite
def two_placements(draw: st.DrawFn) -> tuple[ExpertPlacement, ExpertPlacement]:
    ranks, n, e, layers = (draw(st.integers(low, high)) for low, high in ((1, 4), (1, 4), (0, 2), (1, 3)))
    experts = ranks * n - (draw(st.integers(0, ranks - 1)) if n > 1 else 0)
    initial = ExpertPlacement.initial(layers, experts, ranks, ranks * e)
    policy, topology = ShufflePolicy(draw(st.integers(0, 99))), Topology.even(ranks)
    load_YL = np.ones((layers, experts), dtype=np.int64)
    old = policy.rearrange(load_YL, initial, topology)
    return old, policy.rearrange(load_YL, old, topology)


@given(two_placements())
def test_plan_relocation_of_any_placements_leads_to_new(placements: tuple[ExpertPlacement, ExpertPlacement]) -> None:
    old, new = placements
    n = old.primaries_per_rank
    rows_YRn = old.by_rank[:, :, :n].copy()
    for moves in plan_relocation(old, new):
        before = rows_YRn[moves.layer].copy()
        target, source = (moves.target_rank, moves.target_row), (moves.source_rank, moves.source_row)
        assert len(set(zip(*target, strict=True))) == len(set(zip(*source, strict=True))) == len(moves.source_rank)
        moves_phantom = before[source] < 0
        assert (moves.num_experts_between_ranks, moves.num_rows_between_ranks) == (
            ((moves.source_rank != moves.target_rank) & ~moves_phantom).sum(),
            (moves.source_rank != moves.target_rank).sum(),
        )
        rows_YRn[moves.layer, moves.target_rank, moves.target_row] = before[moves.source_rank, moves.source_row]
    assert np.array_equal(rows_YRn, new.by_rank[:, :, :n])


@given(two_placements())
def test_plan_relocation_of_staying_experts_moves_nothing(placements: tuple[ExpertPlacement, ExpertPlacement]) -> None:
    old, new = placements
    assert plan_relocation(old, old) == []
    for moves in plan_relocation(old, new):
        same = (moves.source_rank == moves.target_rank) & (moves.source_row == moves.target_row)
        assert not same.any()
        assert 0 <= moves.num_rows_between_ranks <= len(moves.source_rank)


def test_plan_relocation_of_one_expert_moves_zeros_the_other_way() -> None:
    old = ExpertPlacement([[0, 1, 2, -1, 3, -1]], 4, 3)
    new = ExpertPlacement([[0, -1, 2, 1, 3, -1]], 4, 3)
    (moves,) = plan_relocation(old, new)
    assert (moves.source_rank.tolist(), moves.source_row.tolist()) == ([0, 1], [1, 1])
    assert (moves.target_rank.tolist(), moves.target_row.tolist()) == ([1, 0], [1, 1])
    assert (moves.num_experts_between_ranks, moves.num_rows_between_ranks, moves.max_rows) == (1, 2, 1)


def test_plan_relocation_of_redundant_experts_moves_nothing() -> None:
    old = ExpertPlacement([[0, 1, 2, 2, 3, 0]], 4, 2)
    new = ExpertPlacement([[0, 1, 3, 2, 3, -1]], 4, 2)
    assert plan_relocation(old, new) == []


def test_plan_relocation_to_other_shape_raises() -> None:
    with pytest.raises(ValueError, match="must keep its shape"):
        plan_relocation(ExpertPlacement.initial(1, 4, 2), ExpertPlacement.initial(1, 4, 2, 2))
