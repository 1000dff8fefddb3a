import sys
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_eplb.functional import balancedness, rank_tokens
from lightning_eplb.placement import ExpertPlacement
from lightning_eplb.policies import Costs, DeepSeekPolicy, Outlook, Topology
from lightning_eplb.policies.deepseek import _match_primaries, order_slots, rebalance_experts
from lightning_eplb.policies.forecast import plain_mean

README_WEIGHT = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]
README_PHY2LOG = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]


def pack_plainly(weights, num_bins):
    """Lists of items, one for each bin."""
    size = len(weights) // num_bins
    if size == 1:
        return [[item] for item in range(num_bins)]
    bins, totals = [[] for _ in range(num_bins)], [np.float32(0)] * num_bins
    for item in sorted(range(len(weights)), key=lambda i: (-weights[i], i)):
        best = min((b for b in range(num_bins) if len(bins[b]) < size), key=lambda b: (totals[b], b))
        bins[best].append(item)
        totals[best] = np.float32(totals[best] + weights[item])
    return bins


def rebalance_plainly(weights, num_replicas, num_groups, num_nodes, num_gpus):
    """One layer of the published algorithm in loops: the (expert, replica) of every slot."""
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    size = len(weights) // num_groups
    groups = [np.float32(sum(float(w) for w in weights[g * size : g * size + size])) for g in range(num_groups)]
    slots = []
    for node_groups in pack_plainly(groups, num_nodes):
        experts = [g * size + i for g in node_groups for i in range(size)]
        count = dict.fromkeys(experts, 1)
        items = [(expert, 0) for expert in experts]
        while len(items) < num_replicas // num_nodes:
            hottest = max(experts, key=lambda e: weights[e] / np.float32(count[e]))  # max() takes the first of equals
            items.append((hottest, count[hottest]))
            count[hottest] += 1
        shares = [weights[expert] / np.float32(count[expert]) for expert, _ in items]
        slots += [items[i] for of_gpu in pack_plainly(shares, num_gpus // num_nodes) for i in of_gpu]
    return slots


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor, lambda w: torch.tensor(w, dtype=torch.bfloat16)])
def test_rebalance_experts_of_published_example_equals_its_result(kind):
    weight = kind(README_WEIGHT) if kind is not list else README_WEIGHT
    phy2log, log2phy, logcnt = rebalance_experts(weight, num_replicas=16, num_groups=4, num_nodes=2, num_gpus=8)
    assert phy2log.tolist() == README_PHY2LOG
    assert {phy2log.dtype, log2phy.dtype, logcnt.dtype} == {torch.int64}
    assert logcnt.sum(dim=1).tolist() == [16, 16]
    assert log2phy.shape == (2, 12, 2)


SHAPES = [  # experts, replicas, groups, nodes, gpus
    (12, 16, 4, 2, 8),
    (16, 16, 1, 1, 4),
    (16, 32, 4, 2, 4),
    (16, 24, 4, 4, 8),
    (8, 16, 3, 2, 4),
    (64, 72, 8, 1, 8),
    (64, 64, 8, 8, 8),
    (60, 96, 4, 2, 6),
    (4, 24, 1, 1, 2),
]


@settings(max_examples=50)
@given(st.sampled_from(SHAPES), st.sampled_from([1, 2, 10, 1000, 10**9, 0.5]), st.integers(0, 2**32))
def test_rebalance_experts_of_any_load_equals_a_plain_reference(shape, scale, seed):
    generator = np.random.default_rng(seed)
    if isinstance(scale, float):
        weight = generator.lognormal(0, 1.2, (3, shape[0]))
    else:
        weight = generator.integers(0, scale + 1, (3, shape[0]))
    phy2log, log2phy, logcnt = rebalance_experts(weight, *shape[1:])
    for layer in range(3):
        slots = rebalance_plainly([np.float32(w) for w in weight[layer]], *shape[1:])
        assert phy2log[layer].tolist() == [expert for expert, _ in slots]
        assert [log2phy[layer, expert, replica].item() for expert, replica in slots] == list(range(len(slots)))
        assert logcnt[layer].tolist() == np.bincount([e for e, _ in slots], minlength=shape[0]).tolist()
        assert ((log2phy[layer] >= 0).sum(dim=1) == logcnt[layer]).all()


@pytest.mark.parametrize(
    ("weight", "numbers", "message"),
    [
        ([1, 2], (2, 1, 1, 1), r"weight has shape \[2\]"),
        ([[1, -2]], (2, 1, 1, 1), "weight holds -2"),
        ([[1.0, float("nan")]], (2, 1, 1, 1), "weight holds nan"),
        ([[1] * 6], (8, 1, 1, 0), "num_gpus=0 must be 1 or more"),
        ([[1] * 6], (8, 0, 1, 2), "num_groups=0 must be 1 or more"),
        ([[1] * 6], (8, 1, 0, 2), "num_nodes=0 must be 1 or more"),
        ([[1] * 6], (7, 1, 1, 2), "num_replicas=7 must be a multiple of num_gpus=2 .* 6 or 8 would do"),
        ([[1] * 6], (4, 1, 1, 2), "num_replicas=4 .* no less than the 6 .* 6 or 8 would do"),
        ([[1] * 6], (8, 4, 2, 2), "num_groups=4 must divide the 6 .* 2, 6 would do"),
        ([[1] * 6], (9, 2, 2, 3), "num_gpus=3 must be a multiple of num_nodes=2; 4 would do"),
    ],
)
def test_rebalance_experts_with_numbers_that_do_not_fit_raises(weight, numbers, message):
    with pytest.raises(ValueError, match=message):
        rebalance_experts(weight, *numbers)


@settings(max_examples=50)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 3), st.sampled_from([2, 100, 10**12]), st.data())
def test_rearrange_of_any_load_is_valid_and_repeatable(ranks, per_rank, redundant, most, data):
    experts = ranks * per_rank - (data.draw(st.integers(0, ranks - 1)) if per_rank > 1 else 0)
    row = st.lists(st.integers(0, most), min_size=experts, max_size=experts) | st.just([0] * experts)
    before, topology = ExpertPlacement.initial(2, experts, ranks, redundant * ranks), Topology.even(ranks)
    for _ in range(2):  # the second time from a placement that is in no order, with empty slots
        load_YL = np.array(data.draw(st.lists(row, min_size=2, max_size=2)))
        after = DeepSeekPolicy().rearrange(load_YL, before, topology)  # ExpertPlacement checks that it is one
        assert after == DeepSeekPolicy().rearrange(load_YL.copy(), before, topology)
        assert after.physical_to_logical.shape == before.physical_to_logical.shape
        for layer in np.flatnonzero(~load_YL.any(axis=1)):
            assert (after.physical_to_logical[layer] == before.physical_to_logical[layer]).all()
        before = after


def test_rearrange_of_published_load_keeps_the_published_plan_where_it_can():
    load_YL = np.array(README_WEIGHT)
    before = ExpertPlacement.initial(1, 12, 4, 4)
    topology = Topology.even(4, 2)
    planned = rebalance_experts(load_YL[:1], 16, 4, 2, 4)[0].numpy().reshape(4, 4)
    after = DeepSeekPolicy(num_groups=4).rearrange(load_YL[:1], before, topology)
    for rank in range(4):
        lost = set(planned[rank]) - set(after.by_rank[0, rank])
        assert len(lost) <= 1
    assert balancedness(rank_tokens(load_YL[:1], after)) > balancedness(rank_tokens(load_YL[:1], before))


def test_rearrange_of_uneven_experts_by_groups_plans_over_all_ranks():
    before, topology = ExpertPlacement.initial(1, 6, 4, 4), Topology.even(4, 2)
    with pytest.warns(UserWarning, match="6 experts are not the same number on each rank"):
        DeepSeekPolicy(num_groups=2).rearrange(np.array([[9, 5, 1, 4, 2, 3]]), before, topology)


def test_rearrange_when_asked_again_moves_nothing():
    load_YL = np.array([[40, 10, 10, 10], [1, 2, 3, 4]])
    once = DeepSeekPolicy().rearrange(load_YL, ExpertPlacement.initial(2, 4, 2, 0), Topology.even(2))
    assert DeepSeekPolicy().rearrange(load_YL, once, Topology.even(2)) == once


def test_rearrange_with_alternating_nodes_keeps_groups_on_one_node():
    load_YL = np.random.default_rng(0).integers(1, 100, (3, 16))
    topology = Topology((0, 1, 0, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        after = DeepSeekPolicy(num_groups=4).rearrange(load_YL, ExpertPlacement.initial(3, 16, 4, 0), topology)
    node_YL = np.array(topology.node_of_rank)[after.primary_rank]
    node_YGL = node_YL.reshape(3, 4, 4)
    assert (node_YGL == node_YGL[:, :, :1]).all()


@pytest.mark.parametrize(("copy", "num_copies"), [(0.0, 3), (0.2, 3), (5.0, 0)])
def test_look_ahead_with_replicas_that_do_not_pay_leaves_them_out(copy, num_copies):
    """One expert with half of the tokens needs copies unless their travel takes longer; an even layer needs none."""
    load_YL = np.array([[70, 10, 10, 10, 10, 10, 10, 10], [10] * 8])
    before = ExpertPlacement.initial(2, 8, 4, 4)
    outlook = Outlook(10 * load_YL, 10, plain_mean(10 * load_YL), 100, Costs(token=0.5, copy=0.5 * 20 * copy))
    planned = DeepSeekPolicy().look_ahead(outlook, before, Topology.even(4))
    published = DeepSeekPolicy().rearrange(10 * load_YL, before, Topology.even(4))
    assert (planned.by_rank[0, :, 2:] >= 0).sum() == num_copies
    assert (planned.by_rank[1, :, 2:] >= 0).sum() == 0
    assert (planned.by_rank[:, :, :2] == published.by_rank[:, :, :2]).all()
    if num_copies:
        assert (planned.by_rank[0] == published.by_rank[0]).all()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("costs", [Costs(1.0), Costs(1.0, copy=float("inf")), Costs(sys.float_info.min, copy=1.0)])
@pytest.mark.parametrize("num_redundant", [0, 4])
def test_look_ahead_with_a_layer_without_tokens_leaves_it_unchanged(costs, num_redundant):
    load_YL = np.array([[0] * 8, [7] * 8])
    before = ExpertPlacement.initial(2, 8, 4, num_redundant)
    outlook = Outlook(load_YL, 1, plain_mean(load_YL), 1, costs)
    planned = DeepSeekPolicy().look_ahead(outlook, before, Topology.even(4))
    assert (planned.by_rank[0] == before.by_rank[0]).all()
    assert (planned.by_rank[1, :, 2:] == -1).all()


def test_look_ahead_with_a_slow_rank_makes_replicas_pay():
    """Ranks that are level by tokens are not when one is slow: its experts' copies are worth their travel."""
    load_YL = np.array([[105, 104, 103, 102, 98, 97, 96, 95]])
    before = ExpertPlacement.initial(1, 8, 4, 4)
    outlook = Outlook(load_YL, 1, plain_mean(load_YL), 100, Costs(token=1.0, copy=10.0))
    copies = [
        (DeepSeekPolicy().look_ahead(outlook, before, Topology((0,) * 4, capacity)).by_rank[0, :, 2:] >= 0).sum()
        for capacity in (None, (0.25, 1.0, 1.0, 1.0))
    ]
    assert copies == [0, 4]


@pytest.mark.parametrize(
    ("num_groups", "topology", "reason"),
    [
        (1, Topology.even(4, 2), "num_groups=1 is no multiple of the 2 nodes"),
        (4, Topology((0, 0, 0, 1)), r"the nodes have \[3, 1\] ranks"),
    ],
)
def test_rearrange_with_groups_that_do_not_fit_nodes_warns_once_and_plans_globally(num_groups, topology, reason):
    load_YL = np.random.default_rng(0).integers(1, 100, (2, 16))
    before = ExpertPlacement.initial(2, 16, 4, 4)
    policy = DeepSeekPolicy(num_groups)
    with pytest.warns(UserWarning, match=reason):
        first = policy.rearrange(load_YL, before, topology)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = policy.rearrange(load_YL, before, topology)
    assert first == second == DeepSeekPolicy().rearrange(load_YL, before, Topology.even(4))


def test_num_groups_that_do_not_fit_raises():
    with pytest.raises(ValueError, match="num_groups=0 must be 1 or more"):
        DeepSeekPolicy(0)
    with pytest.raises(ValueError, match="num_groups=3 must divide the 4 logical experts; one of"):
        DeepSeekPolicy(3).rearrange(np.ones((1, 4), dtype=np.int64), ExpertPlacement.initial(1, 4, 2), Topology.even(2))


def test_match_primaries_of_small_plans_keeps_present_ranks_where_it_can():
    assert _match_primaries([{0, 1}, {0, 1}], [0, 1], per_rank=1) == [0, 1]
    assert _match_primaries([{0, 1}, {0, 1}], [1, 0], per_rank=1) == [1, 0]
    # Expert 1 is on rank 0 alone, where expert 0 is now: expert 0 steps aside to rank 1.
    assert _match_primaries([{0, 1}, {0}], [0, 1], per_rank=1) == [1, 0]
    # Rank 0 holds both experts that nobody else does: one of them stays without.
    assert _match_primaries([{0, 1}, set()], [0, 1], per_rank=1) == [0, None]


@settings(max_examples=50)
@given(st.integers(1, 4), st.integers(1, 2), st.data())
def test_match_primaries_of_any_plan_is_a_maximum_matching(ranks, per_rank, data):
    experts = ranks * per_rank
    held = [set(data.draw(st.lists(st.integers(0, experts - 1), max_size=experts))) for _ in range(ranks)]
    current = data.draw(st.permutations([rank for rank in range(ranks) for _ in range(per_rank)]))
    chosen = _match_primaries(held, current, per_rank)
    for expert, rank in enumerate(chosen):
        assert rank is None or expert in held[rank]
    assert all(sum(at == rank for at in chosen) <= per_rank for rank in range(ranks))

    def most(expert, room):  # by trying everything
        if expert == experts:
            return 0
        options = [most(expert + 1, room)]
        for rank in range(ranks):
            if expert in held[rank] and room[rank]:
                options.append(1 + most(expert + 1, (*room[:rank], room[rank] - 1, *room[rank + 1 :])))
        return max(options)

    assert sum(at is not None for at in chosen) == most(0, (per_rank,) * ranks)


def test_order_slots_of_changed_experts_fills_free_rows_by_index():
    current_RS = np.array([[4, 2, 7, 1], [0, 3, -1, 6]])
    slots_RS = order_slots([[2, 9], [3, 5]], [[1, 8], [6]], current_RS)
    assert slots_RS.tolist() == [[9, 2, 8, 1], [5, 3, -1, 6]]


@pytest.mark.parametrize("name", ["row_within_node", "row_between_nodes", "copy"])
@pytest.mark.parametrize("value", [-1.0, float("nan")])
def test_costs_below_zero_raise(name, value):
    assert getattr(Costs(1.0, **{name: float("inf")}), name) == float("inf")
    with pytest.raises(ValueError, match=f"{name}="):
        Costs(1.0, **{name: value})
