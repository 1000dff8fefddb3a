"""Contents of a report, counted by hand."""

import numpy as np
import pytest

from lightning_eplb import BalancedPolicy, StaticPolicy
from lightning_eplb.report import prepare
from lightning_eplb.report.content import MOST_BINS, MOST_CELLS, sizes_to_try, time_bins, try_other_sizes
from lightning_eplb.simulation.replay import Setting, replay

LOAD_WYL = 1000 * np.tile(np.array([[[20, 16, 14, 10, 12, 12, 8, 8], [8] * 8]]), (400, 1, 1))


def replayed(load_WYL: np.ndarray, **numbers: int):
    static = replay(load_WYL, StaticPolicy(), Setting(2, **numbers), name="static")
    balanced = replay(load_WYL, BalancedPolicy(), Setting(2, **numbers), name="balanced")
    return prepare(load_WYL, [static, balanced], static, source="by hand", num_ranks=2, **numbers)


def test_content_of_skewed_load_matches_hand_calculation() -> None:
    content = replayed(LOAD_WYL, step_interval=16)
    assert content.num_steps == 400
    assert (np.diff(content.edges) > 0).all()
    assert content.total[0, 0] == 400 * 20_000
    assert content.best.name == "balanced"
    assert np.allclose(content.balancedness["static"], (50 + 32) / (60 + 32))
    assert np.allclose(content.balancedness_by_layer["static"], np.array([[50 / 60], [1.0]]))
    assert content.balancedness_by_layer["balanced"][0, -1] > 0.95
    assert np.allclose(content.share[0, :, 0], LOAD_WYL[0, 0] / 12_500)
    assert np.allclose(content.share[1], 1)


def test_content_of_many_steps_adds_up_bins() -> None:
    load_WYL = np.zeros((320, 1, 2), dtype=np.int64)
    load_WYL[:, 0] = [3, 1]
    load_WYL[161, 0] = [0, 8]  # in a bin with one other step
    content = replayed(load_WYL, step_interval=1000)
    assert len(content.edges) == MOST_BINS + 1
    column = int(np.searchsorted(content.edges, 161, side="right")) - 1
    assert np.allclose(content.share[0, :, column], [0.5, 1.5])  # 3 and 9 of 12 tokens
    assert content.balancedness["static"][column] == pytest.approx((4 / 6 + 8 / 16) / 2)
    assert content.balancedness_by_layer["static"][0, column] == pytest.approx(6 / 11)


def test_content_without_tokens_is_nan() -> None:
    load_WYL = LOAD_WYL.copy()
    load_WYL[:100] = 0
    load_WYL[:, 1] = 0
    content = replayed(load_WYL, step_interval=16)
    assert np.isnan(content.balancedness["static"][0])
    assert np.isnan(content.share[1]).all()
    assert np.isnan(content.balancedness_by_layer["balanced"][1]).all()


@pytest.mark.parametrize("size", [(1, 1, 1), (3, 2, 8), (10_000, 32, 64), (10_000, 61, 256), (500, 100, 1024)])
def test_time_bins_of_any_size_are_few_enough(size: tuple[int, int, int]) -> None:
    steps, layers, experts = size
    edges = time_bins(*size)
    assert (edges[0], edges[-1]) == (0, steps)
    assert (np.diff(edges) > 0).all()
    assert len(edges) - 1 <= min(steps, MOST_BINS)
    assert (len(edges) - 1) * layers * experts <= max(MOST_CELLS, 24 * layers * experts)


def test_sizes_to_try_are_at_most_one_rank_for_each_expert() -> None:
    sizes = [(ranks, redundant) for ranks in (2, 4, 8) for redundant in (0, 1, 2)]
    assert sizes_to_try(12, 4) == sizes  # 16 ranks are too many
    assert sizes_to_try(8, 1) == [(2, 0), (2, 1), (2, 2), (4, 0), (4, 1), (4, 2)]


def test_try_other_sizes_with_redundant_experts_levels_more() -> None:
    setting = Setting(2, window_size=16, step_interval=16)
    found = try_other_sizes(LOAD_WYL, [(2, 0), (4, 0), (4, 2)], setting)
    assert [(size.num_ranks, size.redundant_per_rank) for size in found] == [(2, 0), (4, 0), (4, 2)]
    assert found[2].balancedness > found[1].balancedness - 1e-9
    assert all(0 < size.balancedness <= 1 and size.speed_up >= 1 for size in found)


def test_try_other_sizes_without_decision_is_empty() -> None:
    assert try_other_sizes(LOAD_WYL[:3], [(2, 0)], Setting(2, window_size=9, step_interval=90)) == []
