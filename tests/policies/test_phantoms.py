"""Policies with experts that the ranks do not divide."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_eplb.placement import ExpertPlacement
from lightning_eplb.policies import BalancedPolicy, Topology
from lightning_eplb.policies.phantoms import drop_phantoms, number_phantoms
from lightning_eplb.policies.token_split import level_tokens


def test_number_phantoms_of_placement_counts_on() -> None:
    placement = ExpertPlacement([[2, -1, 4, 3, 1, -1, 0, 4, -1, -1, -1, 2]], 5, 4)
    assert number_phantoms(placement)[0].tolist() == [[2, 5, 4], [3, 1, -1], [0, 4, -1], [6, 7, 2]]


def test_drop_phantoms_of_plan_moves_last_primary_to_gap() -> None:
    slots_YRS = np.array([[[5, 0, 1, 6, 2], [2, 7, 3, 4, 8]]])
    assert drop_phantoms(slots_YRS, 6, 3)[0].tolist() == [[5, 0, 1, -1, 2], [2, 3, -1, 4, -1]]
    assert drop_phantoms(slots_YRS, 5, 3)[0].tolist() == [[1, 0, -1, -1, 2], [2, 3, -1, 4, -1]]


def test_balanced_policy_leaves_phantom_to_rank_of_heaviest_expert() -> None:
    load_YL = np.array([[90, 30, 30, 30, 30, 30, 30]]) * 1000
    after = BalancedPolicy().rearrange(load_YL, ExpertPlacement.initial(1, 7, 2), Topology.even(2))
    rank = after.primary_rank[0, 0]
    assert (after.by_rank[0, rank] == -1).sum() == 1
    assert level_tokens(load_YL, after.by_rank).max() == 150_000


@settings(max_examples=40)
@given(st.integers(2, 5), st.integers(1, 3), st.integers(1, 2), st.integers(0, 2**32))
def test_balanced_policy_with_groups_keeps_them_on_their_node(nodes: int, per_node: int, n: int, seed: int) -> None:
    """Groups of as many experts on each node, which do not divide over its ranks."""
    ranks, generator = nodes * per_node, np.random.default_rng(seed)
    experts = nodes * (per_node * n + generator.integers(0, per_node))
    topology = Topology.even(ranks, nodes)
    before = ExpertPlacement.initial(2, experts, ranks, ranks)
    load_YL = generator.integers(1, 10**6, (2, experts))
    after = BalancedPolicy(num_groups=nodes).rearrange(load_YL, before, topology)
    node_of_group = np.array(topology.node_of_rank)[before.primary_rank]
    assert (node_of_group.reshape(2, nodes, -1) == np.arange(nodes)[:, None]).all()
    for layer, rank in np.ndindex(2, ranks):
        held = after.by_rank[layer, rank]
        assert (node_of_group[layer, held[held >= 0]] == topology.node_of_rank[rank]).all()


@pytest.mark.parametrize("redundant", [0, 8])
def test_balanced_policy_of_60_experts_on_8_ranks_is_as_level_as_of_64(redundant: int) -> None:
    load_YL = np.int64(np.random.default_rng(0).lognormal(0, 0.7, (4, 64)) * 10**6)

    def fullest(load_YL: np.ndarray) -> float:
        before = ExpertPlacement.initial(4, load_YL.shape[1], 8, redundant)
        after = BalancedPolicy().rearrange(load_YL, before, Topology.even(8))
        tokens_YR = level_tokens(load_YL, after.by_rank)
        return float(tokens_YR.max(axis=1).sum() / tokens_YR.mean(axis=1).sum())

    assert fullest(load_YL[:, :60]) <= fullest(load_YL) + 0.02
