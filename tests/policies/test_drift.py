import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_eplb.functional import balancedness
from lightning_eplb.policies.drift import NORMAL, REACH, STEPS, swap_copies
from lightning_eplb.policies.spill import spill
from lightning_eplb.policies.split import level_tokens


def grow_tree(load_L, level_R=None, node_R=None, depth=0.6):
    """The tree that spill() makes for ranks of one expert each: slots, level, nodes and quotas."""
    ranks = load_L.size
    if level_R is None:
        level_R = np.full(ranks, -(-load_L.sum() // ranks))
    node_R = np.arange(ranks) // 8 if node_R is None else node_R
    slots_RS = np.stack([np.arange(ranks), np.full(ranks, -1)], axis=1)
    quota_RS, tokens_R = np.zeros_like(slots_RS), np.empty_like(load_L)
    spill(
        load_L, load_L // 10, slots_RS[:, :1], level_R, node_R, np.int64(1), depth, slots_RS[:, 1:], quota_RS[:, :1],
        quota_RS[:, 1:], tokens_R,
    )  # fmt: skip
    return slots_RS, level_R, node_R, quota_RS


def draw_load(ranks, seed, sigma=1.2):
    load_L = np.random.default_rng(seed).lognormal(0, sigma, ranks)
    return (load_L / load_L.sum() * 2**30).astype(np.int64)


def test_the_table_is_that_of_the_normal_distribution():
    assert len(NORMAL) == 2 * REACH * STEPS + 1
    for entry, (excess, step, variance, below) in enumerate(NORMAL):
        z = entry / STEPS - REACH
        density, above = math.exp(-z * z / 2) / math.sqrt(2 * math.pi), math.erfc(z / math.sqrt(2)) / 2
        assert below == pytest.approx(1 - above, abs=1e-9)
        assert excess == pytest.approx(density - z * above, abs=1e-9)
        square = 1 - above - z * density + z * z * above
        assert variance == pytest.approx(square - (density - z * above) ** 2, abs=1e-8)
        if entry + 1 < len(NORMAL):
            assert excess + step == pytest.approx(NORMAL[entry + 1, 0], abs=1e-15)


@settings(max_examples=200)
@given(st.integers(2, 40), st.integers(0, 2**32), st.sampled_from([0.3, 1.2, 2.5]), st.sampled_from([0.3, 0.6, 1.0]))
def test_exchanges_leave_the_ranks_level_and_copies_possible(ranks, seed, sigma, depth):
    generator = np.random.default_rng(seed)
    load_L = draw_load(ranks, seed, sigma)
    speed_R = generator.choice([1.0, 1.0, 0.5], ranks)
    level_R = np.int64(np.ceil(load_L.sum() * (speed_R / speed_R.sum())))
    node_R = generator.integers(0, 3, ranks)
    slots_RS, level_R, node_R, quota_RS = grow_tree(load_L, level_R, node_R, depth)
    before_RS, quota_before_RS = slots_RS.copy(), quota_RS.copy()
    swap_copies(load_L, load_L // 10, slots_RS, level_R, node_R, quota_RS)
    assert (slots_RS[:, 0] == before_RS[:, 0]).all()
    assert sorted(slots_RS[:, 1]) == sorted(before_RS[:, 1])
    assert (slots_RS[:, 0] != slots_RS[:, 1]).all()
    assert (quota_RS >= 0).all()
    served_L = quota_RS[:, 0].copy()
    np.add.at(served_L, slots_RS[:, 1], quota_RS[:, 1])
    assert (served_L == load_L).all()
    highest_R = np.maximum(level_R, quota_before_RS.sum(axis=1))
    assert (quota_RS.sum(axis=1) <= highest_R).all()
    near = [(node_R[slots[:, 1]] == node_R)[slots[:, 1] >= 0].sum() for slots in (slots_RS, before_RS)]
    assert near[0] >= near[1]


def test_a_drift_finds_the_ranks_more_level():
    # On the mean of layers and drifts; among so many ranks it is so in nearly every layer.
    gains = []
    for seed in range(4):
        load_L = draw_load(512, seed)
        slots_RS, level_R, node_R, quota_RS = grow_tree(load_L)
        before_RS = slots_RS.copy()
        swap_copies(load_L, load_L // 10, slots_RS, level_R, node_R, quota_RS)
        assert balancedness(level_tokens(load_L[None], slots_RS[None])) > 0.997
        moved_YL = (load_L * np.random.default_rng(seed).lognormal(0, 0.1, (40, 512))).astype(np.int64)
        after, before = (
            balancedness(level_tokens(moved_YL, np.broadcast_to(slots, (40, 512, 2)).copy()))
            for slots in (slots_RS, before_RS)
        )
        gains.append(after - before)
    assert min(gains) > 0
    assert np.mean(gains) > 0.001


def test_a_ring_and_ranks_above_their_level_are_left_alone():
    load_L = np.array([10, 10, 10, 10])
    level_R, node_R = np.full(4, 10), np.zeros(4, dtype=np.int64)
    ring_RS = np.array([[0, 1], [1, 2], [2, 0], [3, 0]])
    for load_L, quota_RS in (
        (np.full(4, 10), np.array([[5, 5], [5, 5], [0, 5], [5, 5]])),
        (np.array([40, 0, 0, 0]), np.array([[20, 0], [0, 0], [0, 10], [0, 10]])),
    ):
        slots_RS, quota_after_RS = ring_RS.copy(), quota_RS.copy()
        swap_copies(load_L, load_L // 10, slots_RS, level_R, node_R, quota_after_RS)
        assert (slots_RS == ring_RS).all()
        assert (quota_after_RS == quota_RS).all()


def test_no_rank_loses_a_copy_of_its_own_node():
    # As many copies as possible are on the node of their primary at first, so that chance can't keep them there.
    load_L = draw_load(64, 3)
    for seed in range(3):
        node_R = np.random.default_rng(seed).integers(0, 2, 64)
        slots_RS, level_R, node_R, quota_RS = grow_tree(load_L, node_R=node_R)
        before = (node_R[slots_RS[:, 1]] == node_R).sum()
        alike_RS = slots_RS.copy()
        swap_copies(load_L, load_L // 10, alike_RS, level_R, np.zeros(64, dtype=np.int64), quota_RS.copy())
        swap_copies(load_L, load_L // 10, slots_RS, level_R, node_R, quota_RS)
        assert (alike_RS != grow_tree(load_L, node_R=node_R)[0]).any()
        assert (node_R[slots_RS[:, 1]] == node_R).sum() >= before
