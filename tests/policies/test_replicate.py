from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_eplb.policies.replicate import balance_counts, deal, deal_in_order, replicate, sorted_by


def lognormal_layer(seed, ranks, per_rank):
    generator = np.random.default_rng(seed)
    load_L = np.int64(generator.lognormal(0, 1.2, ranks * per_rank) * 10**6)
    return load_L, generator.permutation(ranks * per_rank).reshape(ranks, per_rank)


def lowest_deal(load_L, own_RN, copies_L):
    """The fullest rank of the best deal with one slot a rank, all tried."""
    share_L = load_L // copies_L
    copies = np.repeat(share_L, copies_L - 1)
    copies = np.concatenate([copies, np.zeros(len(own_RN) - copies.size, dtype=np.int64)])
    return min((share_L[own_RN].sum(axis=1) + deal).max() for deal in permutations(copies))


@settings(max_examples=200)
@given(st.integers(0, 2**32), st.integers(1, 8), st.integers(1, 3), st.integers(0, 3), st.sampled_from([0, 10**6]))
def test_copies_are_possible_and_large_enough(seed, ranks, per_rank, redundant, least):
    load_L, own_RN = lognormal_layer(seed, ranks, per_rank)
    slots_RS = np.full((ranks, per_rank + redundant), 99)
    slots_RS[:, :per_rank] = own_RN
    replicate(load_L, slots_RS, per_rank, np.ones(ranks), np.int64(least))
    assert (slots_RS[:, :per_rank] == own_RN).all()
    for held in slots_RS:
        assert len(set(held[held >= 0])) == (held >= 0).sum()
    copies_L = np.bincount(slots_RS[slots_RS >= 0], minlength=load_L.size)
    assert (load_L // copies_L >= least)[copies_L > 1].all()
    again_RS = slots_RS.copy()
    replicate(load_L, again_RS, per_rank, np.ones(ranks), np.int64(least))
    assert (again_RS == slots_RS).all()


@settings(max_examples=100)
@given(st.integers(0, 2**32), st.integers(2, 6), st.integers(1, 2))
def test_other_counts_lower_the_fullest_rank_of_the_best_deal(seed, ranks, per_rank):
    load_L, own_RN = lognormal_layer(seed, ranks, per_rank)
    copies_L = np.ones(load_L.size, dtype=np.int64)
    for expert in np.random.default_rng(seed).integers(0, load_L.size, ranks):
        copies_L[expert] += copies_L[expert] < ranks
    before_L = copies_L.copy()
    share_L = load_L // copies_L
    balance_counts(load_L, own_RN, np.int64(0), copies_L, share_L)
    assert (share_L == load_L // copies_L).all()
    assert copies_L.min() >= 1
    assert copies_L.max() <= ranks
    assert (copies_L - 1).sum() <= ranks
    before, after = lowest_deal(load_L, own_RN, before_L), lowest_deal(load_L, own_RN, copies_L)
    assert after < before or (copies_L == before_L).all()


@settings(max_examples=300)
@given(st.integers(0, 2**32), st.integers(1, 8))
def test_copies_in_order_are_those_dealt_to_the_emptiest(seed, ranks):
    """No two loads are equal, so that both have no choice."""
    generator = np.random.default_rng(seed)
    load_L, own_RN = generator.permutation(ranks) + 10**6 * generator.integers(1, 9, ranks) ** 2, np.arange(ranks)
    copies_L = np.ones(ranks, dtype=np.int64)
    for expert in generator.integers(0, ranks, int(generator.integers(0, ranks + 1))):
        copies_L[expert] += copies_L[expert] < ranks
    share_L = load_L // copies_L
    slots_RS = np.stack([own_RN, np.full(ranks, -1)], axis=1)
    expected_RS = slots_RS.copy()
    deal(load_L, expected_RS, 1, np.ones(ranks), copies_L, share_L)
    in_order = sorted_by(share_L)
    deal_in_order(slots_RS, in_order, in_order[copies_L[in_order] > 1], copies_L)
    if len(set(share_L)) == ranks:
        assert (slots_RS == expected_RS).all()
    copied, held = slots_RS[:, 1], slots_RS[:, 1] >= 0
    assert (copied[held] != own_RN[held]).all()
    assert held.sum() >= (copies_L - 1).sum() - 1  # the last rank may own the expert


@pytest.mark.parametrize(("sigma", "at_least"), [(0.7, 0.96), (1.2, 0.91)])
def test_ranks_of_one_expert_each_are_nearly_level(sigma, at_least):
    load_L = np.int64(np.random.default_rng(0).lognormal(0, sigma, 512) * 10**5)
    slots_RS = np.full((512, 2), -1)
    slots_RS[:, 0] = np.arange(512)
    replicate(load_L, slots_RS, 1, np.ones(512), np.int64(0))
    share_L = load_L / np.bincount(slots_RS[slots_RS >= 0], minlength=512)
    tokens_R = np.where(slots_RS >= 0, share_L[slots_RS], 0).sum(axis=1)
    assert tokens_R.mean() / tokens_R.max() >= at_least
