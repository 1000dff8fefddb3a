import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_eplb.policies.spill import scale_to_parts, spill
from lightning_eplb.policies.split import level_tokens

COUNTS = st.integers(0, 2**63 - 1) | st.integers(0, 100) | st.integers(0, 62).map(lambda bits: 2**bits)


def run_spill(load_L, own_RN, slots, spread_L=None, level_R=None, node_R=None, least=1, depth=0.7):
    """What spill() fills in: the copies, their quotas, what each primary keeps, and what each rank serves."""
    ranks = len(own_RN)
    load_L = np.asarray(load_L, dtype=np.int64)
    spread_L = load_L // 10 if spread_L is None else np.asarray(spread_L, dtype=np.int64)
    if level_R is None:
        level_R = np.full(ranks, -(-load_L.sum() // ranks))
    node_R = np.zeros(ranks, dtype=np.int64) if node_R is None else np.asarray(node_R, dtype=np.int64)
    slots_RS, quota_RS = np.full((2, ranks + 1, len(own_RN[0]) + slots + 1), 99)
    slots_RS[:-1, : len(own_RN[0])] = own_RN
    own_RN, held_RE = np.split(slots_RS[:-1, :-1], [len(own_RN[0])], axis=1)
    left_RN, quota_RE = np.split(quota_RS[:-1, :-1], [own_RN.shape[1]], axis=1)
    left_L, tokens_R = np.full(load_L.size, 99), np.full(ranks, 99)
    spill(load_L, spread_L, own_RN, level_R, node_R, np.int64(least), depth, held_RE, left_RN, quota_RE, tokens_R)
    left_L[own_RN] = left_RN
    for around in (slots_RS, quota_RS):  # nothing outside is overwritten
        assert (around[:, -1] == 99).all()
        assert (around[-1] == 99).all()
    return held_RE, quota_RE, left_L, tokens_R


@st.composite
def layers(draw):
    """A load in parts, and primaries."""
    ranks, per_rank = draw(st.integers(1, 8)), draw(st.integers(1, 5))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    sigma = draw(st.sampled_from([0.0, 0.3, 1.2, 3.0]))
    weight = generator.lognormal(0, sigma, ranks * per_rank) * (generator.random(ranks * per_rank) < 0.9)
    total = draw(st.sampled_from([10, 1000, 2**31 - 1]))
    load_L = np.int64(weight / max(weight.sum(), 1e-9) * total)
    return load_L, generator.permutation(ranks * per_rank).reshape(ranks, per_rank), generator


@settings(max_examples=200)
@given(layers(), st.integers(0, 3), st.integers(0, 3), st.sampled_from([0.0, 0.01, 0.3]))
def test_tokens_are_conserved_and_copies_are_possible(layer, slots, nodes, least):
    load_L, own_RN, generator = layer
    ranks = len(own_RN)
    speed_R = generator.choice([0.0, 0.5, 1.0, 1.0], ranks) + (1e-9 if nodes else 1.0)
    level_R = np.int64(np.ceil(load_L.sum() * (speed_R / speed_R.sum())))
    node_R = np.arange(ranks) % (nodes + 1)
    spread_L = np.int64(load_L * generator.choice([0.0, 0.1, 0.5], load_L.size))
    least = max(int(least * load_L.sum() / ranks), 1)
    held_RE, quota_RE, left_L, tokens_R = run_spill(load_L, own_RN, slots, spread_L, level_R, node_R, least)
    served_L = left_L.copy()
    for rank, slot in np.ndindex(held_RE.shape):
        expert, quota = held_RE[rank, slot], quota_RE[rank, slot]
        assert -1 <= expert < load_L.size
        assert quota == 0 or quota >= least
        assert quota == 0 or expert >= 0
        if expert >= 0:
            served_L[expert] += quota
    assert (left_L >= 0).all()
    assert (served_L == load_L).all()
    assert (tokens_R == left_L[own_RN].sum(axis=1) + quota_RE.sum(axis=1)).all()
    for rank in range(ranks):
        copies = held_RE[rank][held_RE[rank] >= 0]
        assert len(set(copies)) == copies.size
        assert not np.isin(copies, own_RN[rank]).any()
    again = run_spill(load_L, own_RN, slots, spread_L, level_R, node_R, least)
    assert all((one == other).all() for one, other in zip((held_RE, quota_RE, left_L, tokens_R), again, strict=True))


@settings(max_examples=200)
@given(st.integers(2, 12), st.integers(0, 2**32), st.integers(1, 2))
def test_ranks_of_one_expert_each_are_level_with_one_slot_a_rank(ranks, seed, slots):
    # Whatever is above the level can go to one gap after the other: that is the alias method.
    load_L = np.int64(np.random.default_rng(seed).lognormal(0, 1.5, ranks) * 10**6)
    own_RN = np.arange(ranks)[:, None]
    held_RE = run_spill(load_L, own_RN, slots, depth=1.0)[0]
    tokens_YR = level_tokens(load_L[None], np.hstack([own_RN, held_RE])[None], sweeps=2000)
    assert tokens_YR.max() <= 1.0001 * load_L.sum() / ranks


@settings(max_examples=200)
@given(st.integers(1, 10), st.integers(2, 4), st.integers(0, 2**32), st.integers(1, 2))
def test_ranks_are_level_where_one_slot_a_rank_suffices(others, per_rank, seed, slots):
    # One rank holds an expert that alone could fill all gaps; the other ranks are below the level.
    generator = np.random.default_rng(seed)
    load_L = generator.integers(1000, 2000, (others + 1) * per_rank)
    own_RN = generator.permutation(load_L.size).reshape(-1, per_rank)
    load_L[own_RN[generator.integers(len(own_RN)), 0]] = 2000 * load_L.size
    tokens_R = run_spill(load_L, own_RN, slots)[3]
    assert tokens_R.max() <= -(-load_L.sum() // len(own_RN))


def test_one_copy_takes_what_is_above_the_level():
    held_RE, quota_RE, left_L, tokens_R = run_spill([50, 10, 10, 10], [[0, 1], [2, 3]], 1, spread_L=[0] * 4)
    assert held_RE[1].tolist() == [0]
    assert quota_RE[1].tolist() == [20]
    assert left_L.tolist() == [30, 10, 10, 10]
    assert tokens_R.tolist() == [40, 40]


def test_without_slots_every_primary_keeps_its_tokens():
    _, _, left_L, tokens_R = run_spill([50, 10, 10, 10], [[0, 1], [2, 3]], 0)
    assert left_L.tolist() == [50, 10, 10, 10]
    assert tokens_R.tolist() == [60, 20]


def test_a_copy_that_would_serve_too_few_is_not_made():
    load_L, own_RN = [50, 10, 10, 10], [[0, 1], [2, 3]]
    assert run_spill(load_L, own_RN, 1, least=20)[3].tolist() == [40, 40]
    held_RE, quota_RE, _, tokens_R = run_spill(load_L, own_RN, 1, least=26)
    assert held_RE.tolist() == [[-1], [-1]]
    assert quota_RE.tolist() == [[0], [0]]
    assert tokens_R.tolist() == [60, 20]


def test_of_equal_gaps_the_one_on_the_givers_node_is_filled():
    # Ranks 1 and 2 lack as much, and so do 3 and 4; one copy of expert 0 or 1 goes to each.
    load_L = [700, 700, 200, 200, 200, 200]
    own_RN = [[0, 1], [2, 3], [4, 5]]
    for near in (1, 2):
        node_R = [1 if rank == near else 0 for rank in range(3)]
        node_R[0] = 1
        held_RE, quota_RE, _, tokens_R = run_spill(load_L, own_RN, 1, [0] * 6, node_R=node_R)
        assert tokens_R.max() <= 734
        assert held_RE[near, 0] == 0  # the first to be filled gets the first expert
        assert quota_RE[near, 0] > 0


@settings(max_examples=300)
@given(st.lists(COUNTS, min_size=1, max_size=12))
def test_any_counts_are_scaled_to_a_total_of_nearly_as_many_bits(counts):
    load_L = np.array(counts, dtype=np.int64)
    parts_L = np.empty_like(load_L)
    shift = scale_to_parts(load_L, parts_L)
    total = sum(parts_L.tolist())
    assert total < 2**31
    assert total >= 2**29 - len(counts) if any(counts) else total == 0
    assert [count << shift if shift >= 0 else count >> -shift for count in counts] == parts_L.tolist()


@pytest.mark.parametrize("counts", [[1], [2**63 - 1] * 4096, [1] * 4096, [2**20 - 1] * 3, [2**20, 1], [0, 2**63 - 1]])
def test_scaling_at_the_edges(counts):
    load_L = np.array(counts, dtype=np.int64)
    parts_L = np.empty_like(load_L)
    scale_to_parts(load_L, parts_L)
    assert 2**29 - len(counts) <= sum(parts_L.tolist()) < 2**31
