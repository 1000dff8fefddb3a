import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from lightning_eplb.placement import ExpertPlacement
from lightning_eplb.policies.token_split import (
    even_quotas,
    find_replicas,
    level_quotas,
    level_tokens,
    rank_weights,
    split_tokens,
)


def split_of_all(counts_RL, slots_RS, node_R=None, weight_R=None):
    """Return what each rank sends, ``[source, target, slot]``, and the ranks' tokens, once all ranks agree."""
    ranks = len(slots_RS)
    node_R = np.zeros(ranks, dtype=np.int64) if node_R is None else np.array(node_R)
    weight_R = np.ones(ranks) if weight_R is None else np.array(weight_R)
    parts = [split_tokens(counts_RL, slots_RS, node_R, weight_R, rank) for rank in range(ranks)]
    sent = np.stack([sent_RS for sent_RS, _, _ in parts])
    received = np.stack([received_RS for _, received_RS, _ in parts], axis=1)
    assert (sent == received).all()
    for _, _, tokens_R in parts:
        assert (sent.sum(axis=(0, 2)) == tokens_R).all()
    return sent, parts[0][2]


@settings(max_examples=100)
@given(st.data())
def test_split_tokens_of_any_batch_sends_each_token_once_and_levels_ranks(data):
    ranks = data.draw(st.integers(1, 5))
    experts = ranks * data.draw(st.integers(1, 3))
    slots_RS = ExpertPlacement.initial(1, experts, ranks, ranks * data.draw(st.integers(0, 3))).by_rank[0]
    counts = st.integers(0, 20) | st.integers(0, 3000)
    counts_RL = np.array(
        data.draw(st.lists(st.lists(counts, min_size=experts, max_size=experts), min_size=ranks, max_size=ranks))
    )
    sent, tokens_R = split_of_all(counts_RL, slots_RS, data.draw(st.permutations([0, 0, 1, 1, 1]))[:ranks])
    assert (sent >= 0).all()
    assert (sent[:, slots_RS < 0] == 0).all()
    for expert in range(experts):
        assert (sent[:, slots_RS == expert].sum(axis=1) == counts_RL[:, expert]).all()
    best = level_tokens(counts_RL.sum(axis=0)[None], slots_RS[None])[0].max()
    enough = (1 + 1 / 1024) * counts_RL.sum() / ranks  # of the mean: a batch is divided no further
    assert tokens_R.max() <= max(best, enough) + 2 + 0.01 * best


def test_split_tokens_on_two_nodes_prefers_own_rank_then_own_node():
    # Expert 0 on ranks 0, 2 and 3, of two nodes; the others' tokens fill the ranks so that it gets 4 on each.
    slots_RS = np.array([[0, 1, -1], [2, 3, -1], [4, 5, 0], [6, 7, 0]])
    counts_RL = np.array([[6, 0, 0, 0, 0, 0, 0, 0], [0, 0, 4, 0, 0, 0, 0, 0], [3, 0, 0, 0, 0, 0, 0, 0], [3] + [0] * 7])
    sent, tokens_R = split_of_all(counts_RL, slots_RS, node_R=[0, 0, 1, 1])
    assert tokens_R.tolist() == [4, 4, 4, 4]
    assert sent[0].tolist() == [[4, 0, 0], [0, 0, 0], [0, 0, 1], [0, 0, 1]]
    assert sent[2].tolist() == [[0, 0, 0], [0, 0, 0], [0, 0, 3], [0, 0, 0]]
    assert sent[3].tolist() == [[0, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 3]]
    # Rank 1 has tokens of expert 0 instead of rank 2: rank 0, on its node, serves them before those of other nodes.
    sent, _ = split_of_all(counts_RL[[2, 0, 1, 3]], slots_RS, node_R=[0, 0, 1, 1])
    assert sent[0].tolist() == [[3, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert sent[1, 0, 0] == 1


def test_split_tokens_with_weights_gives_slow_ranks_less():
    slots_RS = np.array([[0, 1], [1, 0]])
    counts_RL = np.array([[300, 300], [300, 300]])
    assert split_of_all(counts_RL, slots_RS, weight_R=rank_weights(np.array([1, 0.5])))[1].tolist() == [800, 400]
    assert split_of_all(counts_RL, slots_RS, weight_R=rank_weights(np.array([1, 0])))[1].tolist() == [1200, 0]


@st.composite
def layers(draw):
    """A layer's load and slots: every expert somewhere, copies and empty slots anywhere."""
    ranks, per_rank, redundant = draw(st.integers(1, 5)), draw(st.integers(1, 3)), draw(st.integers(0, 3))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    slots_RS = np.full((ranks, per_rank + redundant), -1)
    slots_RS[:, :per_rank] = generator.permutation(ranks * per_rank).reshape(ranks, per_rank)
    for rank in range(ranks):
        others = np.setdiff1d(np.arange(ranks * per_rank), slots_RS[rank])
        copies = generator.permutation(others)[: generator.integers(redundant + 1)]
        slots_RS[rank, per_rank : per_rank + copies.size] = copies
        slots_RS[rank, per_rank:] = generator.permutation(slots_RS[rank, per_rank:])
    most = draw(st.sampled_from([3, 1000, 2**40]))
    load_L = np.int64(generator.lognormal(0, 1.5, ranks * per_rank) / 10 * most)
    return load_L, slots_RS, generator


def lowest_fullest_rank(load_L, slots_RS, weight_R):
    """The weighted tokens of the fullest rank where tokens are divided in the best way, by linear programming."""
    ranks = len(slots_RS)
    places = np.argwhere(slots_RS >= 0)
    of_expert = np.zeros((load_L.size, len(places) + 1))
    on_rank = np.zeros((ranks, len(places) + 1))
    for column, (rank, slot) in enumerate(places):
        of_expert[slots_RS[rank, slot], column] = 1
        on_rank[rank, column] = weight_R[rank]
    on_rank[:, -1] = -1
    unit = max(load_L.sum(), 1)
    objective = np.eye(len(places) + 1)[-1]
    return linprog(objective, on_rank, np.zeros(ranks), of_expert, load_L / unit).fun * unit


def assert_quotas_add_up(load_L, replicas):
    assert (replicas.quota_P >= 0).all()
    for expert, load in enumerate(load_L):
        assert quotas_of(expert, replicas).sum() == load
    assert (np.bincount(replicas.rank_P, replicas.quota_P, len(replicas.tokens_R)) == replicas.tokens_R).all()


def quotas_of(expert, replicas):
    return replicas.quota_P[replicas.first_L[expert] : replicas.first_L[expert + 1]]


@settings(max_examples=50)
@given(layers())
def test_find_replicas_of_any_slots_lists_them_by_expert_then_rank(layer):
    load_L, slots_RS, _ = layer
    replicas = find_replicas(slots_RS, load_L.size, np.ones(len(slots_RS)))
    for expert in range(load_L.size):
        of_expert = slice(replicas.first_L[expert], replicas.first_L[expert + 1])
        places = zip(replicas.rank_P[of_expert].tolist(), replicas.slot_P[of_expert].tolist(), strict=True)
        assert list(places) == [tuple(place) for place in np.argwhere(slots_RS == expert).tolist()]
    counts = np.diff(replicas.first_L)
    assert replicas.several_X.tolist() == np.flatnonzero(counts > 1).tolist()


@settings(max_examples=100)
@given(layers())
def test_even_quotas_of_any_load_differ_by_one_token_at_most(layer):
    load_L, slots_RS, _ = layer
    replicas = find_replicas(slots_RS, load_L.size, np.ones(len(slots_RS)))
    for _ in range(2):  # whatever was there before
        even_quotas(load_L, replicas)
        assert_quotas_add_up(load_L, replicas)
    for expert in range(load_L.size):
        quotas = quotas_of(expert, replicas)
        assert quotas.max() - quotas.min() <= 1
        assert (np.diff(quotas) <= 0).all()  # the first slots get what does not divide


@settings(max_examples=100)
@given(layers(), st.booleans())
def test_level_quotas_with_more_sweeps_raise_the_fullest_rank_by_rounding_at_most(layer, is_alike):
    load_L, slots_RS, generator = layer
    ranks = len(slots_RS)
    weight_R = np.ones(ranks) if is_alike else generator.choice([0.5, 1.0, 1.7, 4.0], ranks)
    replicas = find_replicas(slots_RS, load_L.size, weight_R)
    even_quotas(load_L, replicas)
    peak = (replicas.tokens_R * weight_R).max()
    for _ in range(5):
        after = level_quotas(load_L, replicas, 1, 0.0)
        assert_quotas_add_up(load_L, replicas)
        assert after == (replicas.tokens_R * weight_R).max()
        assert after <= peak + slots_RS.size * weight_R.max()  # a token a slot
        peak = after


def test_level_quotas_that_are_level_enough_stay():
    load_L, slots_RS = np.array([100, 90]), np.array([[0, 1], [1, 0]])
    replicas = find_replicas(slots_RS, 2, np.ones(2))
    replicas.quota_P[:], replicas.tokens_R[:] = [100, 0, 0, 90], [100, 90]
    assert level_quotas(load_L, replicas, 10, 100.0) == 100
    assert replicas.quota_P.tolist() == [100, 0, 0, 90]
    assert level_quotas(load_L, replicas, 10, 99.0) == 95
    assert replicas.tokens_R.tolist() == [95, 95]


@settings(max_examples=150)
@given(layers(), st.booleans())
def test_level_tokens_of_any_layer_have_the_lowest_fullest_rank(layer, has_capacity):
    load_L, slots_RS, generator = layer
    ranks = len(slots_RS)
    capacity_R = generator.choice([0.25, 0.5, 0.6, 1.0, 2.0], ranks) if has_capacity else None
    weight_R = 1 / capacity_R if has_capacity else np.ones(ranks)
    tokens_YR = level_tokens(np.stack([load_L, load_L * 0]), np.stack([slots_RS, slots_RS]), capacity_R, sweeps=1000)
    assert tokens_YR.sum(axis=1).tolist() == [load_L.sum(), 0]
    best = lowest_fullest_rank(load_L, slots_RS, weight_R)
    peak = (tokens_YR[0] * weight_R).max()
    rounding = slots_RS.size * weight_R.max()  # a token a slot
    assert best * (1 - 1e-6) - 1e-6 <= peak <= best * (1 + 1e-3) + rounding


def test_level_tokens_with_a_rank_without_capacity_leave_it_out():
    slots_YRS = np.array([[[0, 1], [1, 0], [2, 3], [3, 2]]])
    load_YL = np.array([[1000, 3000, 500, 700]])
    tokens_R = level_tokens(load_YL, slots_YRS, np.array([1.0, 0.0, 1.0, 1.0]))[0]
    assert tokens_R[1] <= 1  # by rounding
    assert tokens_R[:2].sum() == 4000
    assert tokens_R[2:].tolist() == [600, 600]


@pytest.mark.parametrize(
    ("load", "capacity", "message"),
    [
        ([[10, 10]], None, "load_YL has shape"),
        ([[1] * 8, [1] * 8], None, "load_YL has shape"),
        ([[1] * 8], [1, 2, 3], "capacity_R="),
        ([[1] * 8], [-1, 2], "capacity_R="),
        ([[1] * 8], [0, 0], "capacity_R="),
    ],
)
def test_level_tokens_of_load_or_capacity_that_does_not_fit_raise(load, capacity, message):
    slots_YRS = ExpertPlacement.initial(1, 8, 2, 2).by_rank
    with pytest.raises(ValueError, match=message):
        level_tokens(np.array(load), slots_YRS, capacity)
