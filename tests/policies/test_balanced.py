import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_eplb.functional import balancedness, rank_tokens
from lightning_eplb.placement import ExpertPlacement
from lightning_eplb.policies import BalancedPolicy, Topology
from lightning_eplb.policies.balanced import keep_ranks, pack_primaries, spill


@st.composite
def situations(draw, most=10**6):
    """A load, a shuffled placement with empty slots, and its ranks."""
    ranks, layers = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    per_rank, redundant = draw(st.integers(1, 4)), draw(st.integers(0, 3))
    experts = ranks * per_rank
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    slots = np.full((layers, ranks, per_rank + redundant), -1)
    for layer in range(layers):
        slots[layer, :, :per_rank] = generator.permutation(experts).reshape(ranks, per_rank)
        for rank in range(ranks):
            others = generator.permutation(np.setdiff1d(np.arange(experts), slots[layer, rank]))
            some = others[: generator.integers(0, redundant + 1)]
            slots[layer, rank, per_rank : per_rank + some.size] = some
    counts = st.integers(0, most) | st.integers(0, 3)
    load = draw(
        st.lists(st.lists(counts, min_size=experts, max_size=experts), min_size=layers, max_size=layers).map(np.array)
    )
    return load, ExpertPlacement(slots.reshape(layers, -1), experts, ranks), Topology.even(ranks)


@settings(max_examples=50, deadline=None)
@given(situations())
def test_plan_is_valid_repeatable_and_never_worse(situation):
    load_YL, before, topology = situation
    after = BalancedPolicy().rearrange(load_YL, before, topology)  # ExpertPlacement checks that it is one
    assert after == BalancedPolicy().rearrange(load_YL.copy(), before, topology)
    assert after.physical_to_logical.shape == before.physical_to_logical.shape
    assert (after.num_ranks, after.num_logical_experts) == (before.num_ranks, before.num_logical_experts)
    peak_before, peak_after = rank_tokens(load_YL, before).max(axis=1), rank_tokens(load_YL, after).max(axis=1)
    for layer in range(before.num_layers):
        is_same = (after.physical_to_logical[layer] == before.physical_to_logical[layer]).all()
        assert is_same or peak_after[layer] < peak_before[layer]
        assert is_same or load_YL[layer].any()


@settings(max_examples=25, deadline=None)
@given(situations())
def test_copies_never_make_it_worse_than_primaries_alone(situation):
    load_YL, before, topology = situation
    n = before.primaries_per_rank
    bare = ExpertPlacement(
        before.by_rank[:, :, :n].reshape(before.num_layers, -1), before.num_logical_experts, before.num_ranks
    )
    alone = BalancedPolicy().rearrange(load_YL, bare, topology)
    with_copies = BalancedPolicy().rearrange(load_YL, before, topology)
    assert (rank_tokens(load_YL, with_copies).max(axis=1) <= rank_tokens(load_YL, alone).max(axis=1) + 1e-6).all()


@settings(max_examples=25, deadline=None)
@given(situations(most=2**62))
def test_loads_near_overflow(situation):
    load_YL, before, topology = situation
    after = BalancedPolicy().rearrange(load_YL, before, topology)
    peak_before, peak_after = rank_tokens(load_YL, before).max(axis=1), rank_tokens(load_YL, after).max(axis=1)
    assert (peak_after <= peak_before * (1 + 1e-12)).all()


def test_zero_load_changes_nothing():
    before = ExpertPlacement.initial(2, 8, 4, 8)
    assert BalancedPolicy().rearrange(np.zeros((2, 8), dtype=np.int64), before, Topology.even(4)) is before


def test_a_layer_without_tokens_stays_while_another_moves():
    before = ExpertPlacement.initial(2, 4, 2, 2)
    after = BalancedPolicy().rearrange(np.array([[0, 0, 0, 0], [9, 9, 0, 0]]), before, Topology.even(2))
    assert (after.physical_to_logical[0] == before.physical_to_logical[0]).all()
    assert balancedness(rank_tokens(np.array([[0, 0, 0, 0], [9, 9, 0, 0]]), after)) == 1.0


def test_a_level_layer_stays():
    before = ExpertPlacement.initial(1, 8, 4, 0)
    assert BalancedPolicy().rearrange(np.full((1, 8), 5), before, Topology.even(4)) is before


def test_copies_alone_are_preferred_when_they_level_as_well():
    # Half of expert 0 on rank 1 levels the ranks, and no primary needs to move. New primaries could do no better.
    before = ExpertPlacement([[0, 1, -1, 2, 3, -1]], 4, 2)
    after = BalancedPolicy().rearrange(np.array([[30, 10, 5, 5]]), before, Topology.even(2))
    assert after.primaries.tolist() == before.primaries.tolist()
    assert after.physical_to_logical.tolist() == [[0, 1, -1, 2, 3, 0]]


def test_skew_to_one_rank_is_levelled():
    # 60 % of the tokens on the four experts of rank 0 of four.
    load = np.full((1, 16), 40 * 100 // 12)
    load[0, :4] = 60 * 100 // 4
    before = ExpertPlacement.initial(1, 16, 4, 0)
    after = BalancedPolicy().rearrange(load, before, Topology.even(4))
    assert balancedness(rank_tokens(load, before)) == pytest.approx(0.4167, abs=1e-3)
    assert balancedness(rank_tokens(load, after)) > 0.99


@pytest.mark.parametrize(
    ("experts", "redundant", "ranks", "at_least"),
    [(256, 32, 32, 0.88), (256, 64, 32, 0.9), (384, 64, 64, 0.85), (64, 8, 8, 0.88), (16, 2, 2, 0.95)],
)
def test_lognormal_load(experts, redundant, ranks, at_least):
    load = np.random.default_rng(0).lognormal(0, 1.2, (4, experts))
    load_YL = np.round(load * 100_000).astype(np.int64)
    before = ExpertPlacement.initial(4, experts, ranks, redundant)
    after = BalancedPolicy().rearrange(load_YL, before, Topology.even(ranks))
    reached = balancedness(rank_tokens(load_YL, after))
    assert reached > balancedness(rank_tokens(load_YL, before))
    assert reached > at_least


def test_ties_go_to_the_lower_index():
    assert pack_primaries(np.array([3, 3, 3, 3, 3, 3]), 3).tolist() == [0, 1, 2, 0, 1, 2]
    assert [copy[:2] for copy in spill(np.array([4, 4, 0, 0, 0, 0]), np.array([0, 0, 1, 1, 2, 2]), 3, 1)] == [
        (0, 1),
        (1, 2),
    ]


def test_packing_gives_every_rank_as_many_experts():
    rank_L = pack_primaries(np.array([100, 1, 1, 1, 1, 1]), 2)
    assert np.bincount(rank_L).tolist() == [3, 3]
    assert rank_L.tolist() == [0, 1, 1, 1, 0, 0]


def test_ranks_are_renamed_so_that_experts_stay():
    now = np.array([0, 0, 0, 1, 1, 1, 2, 2, 2])
    plan = np.array([2, 2, 1, 0, 0, 0, 1, 1, 2])
    assert keep_ranks(plan, now, 3).tolist() == [0, 0, 2, 1, 1, 1, 2, 2, 0]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 2**32))
def test_renaming_keeps_who_is_with_whom(ranks, per_rank, seed):
    generator = np.random.default_rng(seed)
    plan = generator.permutation(np.repeat(np.arange(ranks), per_rank))
    named = keep_ranks(plan, generator.permutation(plan), ranks)
    assert ((plan[:, None] == plan) == (named[:, None] == named)).all()
    assert sorted(set(named.tolist())) == list(range(ranks))


def test_spill_levels_the_ranks_and_counts_tokens():
    load, rank = np.array([50, 10, 10, 10]), np.array([0, 0, 1, 1])
    assert spill(load, rank, 2, 1) == [(0, 1, 20)]
    assert spill(load, rank, 2, 0) == []
    assert spill(np.array([20, 20, 20, 20]), rank, 2, 1) == []


@settings(max_examples=50, deadline=None)
@given(situations(), st.integers(0, 3))
def test_spill_copies_are_possible_and_only_lower_the_peak(situation, num_redundant):
    load_YL, placement, topology = situation
    load_L, rank_L, ranks = load_YL[0], placement.primary_rank[0], topology.num_ranks
    copies = spill(load_L, rank_L, ranks, num_redundant)
    tokens_R = np.bincount(rank_L, weights=load_L, minlength=ranks).astype(np.int64)
    peak = tokens_R.max()
    left_L = load_L.copy()
    for expert, rank, tokens in copies:
        assert tokens > 0
        assert rank != rank_L[expert]
        left_L[expert] -= tokens
        tokens_R[rank_L[expert]] -= tokens
        tokens_R[rank] += tokens
    assert (left_L >= 0).all()
    assert tokens_R.max() <= peak
    assert len({copy[:2] for copy in copies}) == len(copies)
    assert np.bincount([copy.rank for copy in copies], minlength=ranks).max() <= num_redundant
