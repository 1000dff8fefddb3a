import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_eplb.policies.excess import must_exceed
from lightning_eplb.policies.split import level_tokens, rank_weights


def shuffled_layer(seed):
    """A load, slots of which some are empty, and the capacities of the ranks."""
    generator = np.random.default_rng(seed)
    ranks, per_rank, redundant = generator.integers([2, 1, 1], [9, 4, 3])
    load_L = (generator.lognormal(0, generator.choice([0.3, 1.2]), ranks * per_rank) * 10**6).astype(np.int64)
    slots_RS = np.full((ranks, per_rank + redundant), -1)
    slots_RS[:, :per_rank] = generator.permutation(load_L.size).reshape(ranks, per_rank)
    for rank in range(ranks):
        others = np.setdiff1d(np.arange(load_L.size), slots_RS[rank])
        held = np.concatenate([generator.permutation(others)[:redundant], np.full(redundant, -1)])[:redundant]
        slots_RS[rank, per_rank:] = np.where(generator.random(redundant) < 0.2, -1, held)
    capacity_R = generator.choice([0.5, 1.0, 1.0], ranks)
    return load_L, slots_RS, per_rank, capacity_R


@settings(max_examples=200)
@given(seed=st.integers(0, 2**32), limit=st.sampled_from([0.9, 1.0, 1.01, 1.1, 1.5, 3.0]))
def test_what_must_exceed_a_limit_does_so_whatever_the_quotas(seed, limit):
    load_L, slots_RS, own, capacity_R = shuffled_layer(seed)
    weight_R = rank_weights(capacity_R)
    limit *= load_L.sum() / len(slots_RS)
    peak = (level_tokens(load_L[None], slots_RS[None], capacity_R, sweeps=2000)[0] * weight_R).max()
    if must_exceed(load_L, slots_RS, own, weight_R, limit):
        assert peak > limit


def test_of_trees_it_is_told_exactly():
    """With a copy for each rank but one, and no rank that gets two, ranks are linked as a tree or a forest."""
    close = 0
    for seed in range(300):
        generator = np.random.default_rng(seed)
        ranks = int(generator.integers(2, 9))
        load_L = (generator.lognormal(0, 1.0, 2 * ranks) * 10**6).astype(np.int64)
        slots_RS = np.full((ranks, 3), -1)
        slots_RS[:, :2] = generator.permutation(2 * ranks).reshape(ranks, 2)
        copied = set()
        for rank in range(1, ranks):
            expert = slots_RS[generator.integers(rank), generator.integers(2)]
            if expert not in copied:  # two copies of an expert share what it has
                slots_RS[rank, 2] = expert
                copied.add(expert)
        peak = int(level_tokens(load_L[None], slots_RS[None], sweeps=5000).max())
        assert must_exceed(load_L, slots_RS, 2, np.ones(ranks), 0.99 * peak)
        assert not must_exceed(load_L, slots_RS, 2, np.ones(ranks), 1.01 * peak)
        close += peak <= 1.05 * load_L.sum() / ranks
    assert close > 0  # of these some are level
