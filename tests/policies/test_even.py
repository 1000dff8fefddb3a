"""Copies where tokens are divided evenly among them."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_eplb import BalancedPolicy, ExpertPlacement
from lightning_eplb.policies import Topology
from lightning_eplb.policies.even import pair_up
from lightning_eplb.policies.split import even_quotas


@settings(max_examples=200)
@given(st.integers(2, 12), st.integers(0, 2**32), st.sampled_from([0.0, 0.1, 1.0]))
def test_pairs_hold_the_same_copies_and_no_rank_becomes_fuller(num_ranks: int, seed: int, spread: float) -> None:
    random = np.random.default_rng(seed)
    load_L = 27720 * np.round(1000 * random.lognormal(0.0, spread, num_ranks)).astype(np.int64)  # no remainders
    slots_RS = np.stack([random.permutation(num_ranks), np.full(num_ranks, -1)], axis=1)
    for rank in range(num_ranks):
        if random.random() < 0.8:
            slots_RS[rank, 1] = random.choice(np.setdiff1d(np.arange(num_ranks), slots_RS[rank, 0]))
    before_RS, weight_R = slots_RS.copy(), random.choice([1.0, 1.5], num_ranks)
    quota_RS, tokens_R = np.empty_like(slots_RS), np.empty(num_ranks, dtype=np.int64)
    even_quotas(load_L, slots_RS, quota_RS, tokens_R)
    peak = float((tokens_R * weight_R).max())
    pair_up(slots_RS, quota_RS, tokens_R, weight_R, peak)

    found = np.empty_like(quota_RS), np.empty_like(tokens_R)
    even_quotas(load_L, slots_RS, *found)
    assert np.array_equal(found[0], quota_RS)
    assert np.array_equal(found[1], tokens_R)
    assert (tokens_R * weight_R).max() <= peak
    assert np.array_equal(slots_RS[:, 0], before_RS[:, 0])
    assert np.array_equal(np.sort(slots_RS[:, 1]), np.sort(before_RS[:, 1]))
    assert (slots_RS[:, 0] != slots_RS[:, 1]).all()


def test_ranks_that_are_level_hold_copies_of_each_other() -> None:
    before = ExpertPlacement.initial(1, 8, 8, 8)
    load_YL = np.full((1, 8), 100_000)
    (slots_RS,) = BalancedPolicy(split="even").rearrange(load_YL, before, Topology.even(8)).by_rank
    rank_of_L = np.argsort(slots_RS[:, 0])
    assert np.array_equal(slots_RS[rank_of_L[slots_RS[:, 1]], 1], slots_RS[:, 0])
