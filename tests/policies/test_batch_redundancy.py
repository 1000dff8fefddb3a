import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_eplb.placement import ExpertPlacement
from lightning_eplb.policies.batch_redundancy import choose_copies, grow_tree
from lightning_eplb.policies.token_split import rank_weights, split_tokens
from lightning_eplb.simulation.synthetic import synthetic_load


def served(load_L, slots_RS, weight_R=None):
    """Tokens of each rank, all of them sent by rank 0."""
    ranks = len(slots_RS)
    counts_RL = np.zeros((ranks, load_L.size), dtype=np.int64)
    counts_RL[0] = load_L
    weight_R = np.ones(ranks) if weight_R is None else weight_R
    return split_tokens(counts_RL, slots_RS, np.zeros(ranks, dtype=np.int64), weight_R, 0)[2]


@settings(max_examples=200)
@given(st.data())
def test_choose_copies_of_any_batch_is_valid_and_never_worse(data):
    ranks, per_rank, redundant = (data.draw(st.integers(*ends)) for ends in ((1, 6), (1, 4), (0, 3)))
    experts = ranks * per_rank - (data.draw(st.integers(0, ranks - 1)) if per_rank > 1 else 0)
    load_L = np.array(data.draw(st.lists(st.integers(0, 10**6), min_size=experts, max_size=experts)))
    least = data.draw(st.integers(1, 10**5))
    placed_RS = ExpertPlacement.initial(1, experts, ranks, ranks * redundant).by_rank[0]
    slots_RS = choose_copies(load_L, placed_RS, per_rank, np.ones(ranks), least)
    assert (slots_RS == choose_copies(load_L, placed_RS.copy(), per_rank, np.ones(ranks), least)).all()
    assert (slots_RS[:, :per_rank] == placed_RS[:, :per_rank]).all()
    ExpertPlacement(slots_RS.reshape(1, -1), experts, ranks)  # no expert twice on a rank
    alone_R = np.append(load_L, 0)[placed_RS[:, :per_rank]].sum(axis=1)  # -1, a phantom expert, has none
    tokens_R = served(load_L, slots_RS)
    assert tokens_R.max() <= alone_R.max()
    padded_L, numbered_RS = np.append(load_L, np.zeros(ranks * per_rank - experts, dtype=np.int64)), placed_RS.copy()
    numbered_RS[:, :per_rank][placed_RS[:, :per_rank] == -1] = np.arange(experts, ranks * per_rank)
    as_experts_RS = choose_copies(padded_L, numbered_RS, per_rank, np.ones(ranks), least)
    assert (as_experts_RS[:, per_rank:] == slots_RS[:, per_rank:]).all()
    if load_L.max() < least:  # no expert has so many to give away
        assert (slots_RS[:, per_rank:] == -1).all()


def test_choose_copies_with_a_fuller_rank_takes_over_more_than_the_excess():
    """121 tokens above the mean; 131 are given away, as another rank stays above the mean and these two share."""
    placed_RS = ExpertPlacement.initial(1, 6, 3, 3).by_rank[0]
    load_L = np.array([0, 0, 0, 262, 161, 0])
    slots_RS = choose_copies(load_L, placed_RS, 2, np.ones(3), 128)
    assert slots_RS[:, 2].tolist() == [3, -1, -1]
    assert served(load_L, slots_RS).tolist() == [131, 131, 161]


def test_choose_copies_of_level_or_empty_batch_leaves_slots_empty():
    placed_RS = ExpertPlacement.initial(1, 8, 4, 8).by_rank[0]
    for load_L in (np.full(8, 100), np.zeros(8, dtype=np.int64)):
        assert (choose_copies(load_L, placed_RS, 2, np.ones(4), 1)[:, 2:] == -1).all()


def test_choose_copies_of_skewed_batch_copies_heaviest_expert_to_emptiest_rank():
    placed_RS = ExpertPlacement.initial(1, 4, 2, 2).by_rank[0]
    assert choose_copies(np.array([50, 10, 10, 10]), placed_RS, 2, np.ones(2), 1).tolist() == [[0, 1, -1], [2, 3, 0]]
    assert choose_copies(np.array([50, 10, 10, 10]), placed_RS, 2, np.ones(2), 20)[1, 2] == 0
    assert choose_copies(np.array([50, 10, 10, 10]), placed_RS, 2, np.ones(2), 21)[1, 2] == -1


def test_choose_copies_with_a_slow_rank_gives_it_fewer_tokens():
    placed_RS = ExpertPlacement.initial(1, 4, 2, 4).by_rank[0]
    load_L = np.array([30, 30, 30, 30])
    weight_R = rank_weights(np.array([2, 1]))
    slots_RS = choose_copies(load_L, placed_RS, 2, weight_R, 1)
    assert served(load_L, slots_RS, weight_R).tolist() == [80, 40]


@pytest.mark.parametrize("ranks", [4, 8])
@pytest.mark.parametrize(
    "name", ["balanced", "lognormal-0.7", "lognormal-1.2", "zipf", "hot-expert", "rotating", "burst", "one-expert"]
)
def test_choose_copies_with_two_slots_a_rank_levels_within_one_percent(name, ranks):
    """At 64 tokens a rank and expert: the fullest rank has at most 1 % more than the mean."""
    experts = 8 * ranks
    for load_L in synthetic_load(name, 60, 1, experts, tokens_per_step=64 * ranks * experts, num_ranks=ranks)[:, 0]:
        slots_RS = ExpertPlacement.initial(1, experts, ranks, 2 * ranks).by_rank[0]
        tokens_R = served(load_L, choose_copies(load_L, slots_RS, 8, np.ones(ranks), 1))
        assert tokens_R.max() <= 1.01 * tokens_R.mean()


def test_choose_copies_with_a_rank_without_capacity_empties_it():
    weight_R = rank_weights(np.array([1, 0, 1]))
    slots_RS = choose_copies(np.array([4, 7, 17]), np.array([[2, -1], [0, 2], [1, 2]]), 1, weight_R, 1)
    assert served(np.array([4, 7, 17]), slots_RS, weight_R).tolist() == [14, 0, 14]


def test_grow_tree_that_closes_a_ring_copies_to_no_rank_its_own_expert():
    load_L = np.array([116, 42, 56, 113, 1, 44, 58, 81, 21, 88, 129, 121]) * 1000
    slots_RS = np.array([[0, 1, 2, 3, -1], [4, 5, 6, 7, -1], [8, 9, 10, 11, -1]])
    grow_tree(load_L, slots_RS, 4, np.full(3, load_L.sum() // 3 + 1), 1, (1 / 16, 0.5))
    assert [len(set(of_rank)) for of_rank in slots_RS.tolist()] == [5, 5, 5]
