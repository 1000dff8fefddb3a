import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_eplb.functional import balancedness, rank_tokens
from lightning_eplb.placement import ExpertPlacement
from lightning_eplb.policies import BalancedPolicy, Costs, DeepSeekPolicy, Outlook, Topology
from lightning_eplb.policies.forecast import Forecast, plain_mean
from lightning_eplb.policies.pack import replicate
from lightning_eplb.policies.token_split import level_tokens
from tests.policies.digest import printed_by, start


def shuffled_placement(generator, layers, ranks, per_rank, redundant):
    """Primaries anywhere; some redundant slots hold copies, in any of the slots, and some are empty."""
    experts = ranks * per_rank
    slots = np.full((layers, ranks, per_rank + redundant), -1)
    for layer in range(layers):
        slots[layer, :, :per_rank] = generator.permutation(experts).reshape(ranks, per_rank)
        for rank in range(ranks):
            others = np.setdiff1d(np.arange(experts), slots[layer, rank])
            held = np.concatenate([generator.permutation(others)[:redundant], np.full(redundant, -1)])
            held[generator.random(held.size) < 0.3] = -1
            slots[layer, rank, per_rank:] = generator.permutation(held[:redundant])
    return ExpertPlacement(slots.reshape(layers, -1), experts, ranks)


@st.composite
def situations(draw):
    """A load, a shuffled placement with empty slots, and its ranks."""
    ranks, layers = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    per_rank, redundant = draw(st.integers(1, 4)), draw(st.integers(0, 3))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    placement = shuffled_placement(generator, layers, ranks, per_rank, redundant)
    load = []
    for _ in range(layers):
        kind = draw(st.sampled_from(["skewed", "few", "none", "one", "huge", "any"]))
        most = {"few": 3, "none": 0, "one": 0, "huge": 2**62, "any": 10**6}.get(kind, 0)
        counts = generator.integers(0, most, ranks * per_rank, endpoint=True)
        if kind == "skewed":
            counts = np.int64(generator.lognormal(0, 1.2, counts.size) * 10 ** generator.integers(1, 9))
        if kind == "one":
            counts[generator.integers(counts.size)] = 10 ** generator.integers(0, 18)
        load.append(counts)
    return np.array(load), placement, Topology.even(ranks)


def fullest_rank(load_YL, placement):
    """Tokens of each layer's fullest rank, fractions kept: as if they were divided as finely as one likes."""
    total_Y = np.maximum(load_YL.astype(float).sum(axis=1), 1)
    fine_YL = np.int64(load_YL / total_Y[:, None] * 2**48)
    return level_tokens(fine_YL, placement.by_rank, sweeps=2000).max(axis=1) / 2.0**48 * total_Y


def moved_primaries(before, after):
    return int((before.primary_rank != after.primary_rank).sum())


def same_layers(before, after):
    return (before.physical_to_logical == after.physical_to_logical).all(axis=1)


def outlook(load_YL, costs=None, interval=10):
    return Outlook(load_YL, num_steps=10, forecast=plain_mean(load_YL), interval=interval, costs=costs)


def lognormal_load(layers, experts, tokens=10**6, seed=0):
    return np.int64(np.random.default_rng(seed).lognormal(0, 1.2, (layers, experts)) * tokens)


@settings(max_examples=100)
@given(situation=situations())
def test_rearrange_in_any_situation_is_valid_and_repeatable(situation):
    load_YL, before, topology = situation
    load_before, slots_before = load_YL.copy(), before.physical_to_logical.copy()
    after = BalancedPolicy().rearrange(load_YL, before, topology)
    checked = ExpertPlacement(after.physical_to_logical, before.num_logical_experts, before.num_ranks)
    assert (after.replica_count == checked.replica_count).all()
    assert after.physical_to_logical.shape == before.physical_to_logical.shape
    assert (after.num_ranks, after.num_logical_experts) == (before.num_ranks, before.num_logical_experts)
    for layer in range(before.num_layers):
        assert np.bincount(after.primary_rank[layer]).tolist() == [before.primaries_per_rank] * before.num_ranks
    assert after == BalancedPolicy().rearrange(load_YL.copy(), before, topology)
    assert (load_YL == load_before).all()
    assert (before.physical_to_logical == slots_before).all()
    assert (after is before) == (after == before)


@settings(max_examples=100)
@given(situation=situations())
def test_rearrange_in_any_situation_makes_no_layer_worse(situation):
    load_YL, before, topology = situation
    after = BalancedPolicy().rearrange(load_YL, before, topology)
    peak_before, peak_after = fullest_rank(load_YL, before), fullest_rank(load_YL, after)
    # A plan that is more robust may be less level, by 1/128 of a rank's mean.
    mean = load_YL.astype(float).sum(axis=1) / before.num_ranks
    assert (peak_after <= peak_before + mean / 128 + 1 + 1e-6 * peak_before).all()
    is_same = same_layers(before, after)
    assert (is_same | load_YL.any(axis=1)).all()


@settings(max_examples=60)
@given(situation=situations(), max_moves=st.sampled_from([0, 1, 2, 3, 5, 8]), nodes=st.integers(1, 3))
def test_max_moves_in_any_situation_bounds_moved_primaries_over_all_layers(situation, max_moves, nodes):
    load_YL, before, topology = situation
    nodes = nodes if before.num_ranks % nodes == 0 else 1
    topology = Topology.even(before.num_ranks, nodes)
    after = BalancedPolicy(max_moves).rearrange(load_YL, before, topology)
    assert moved_primaries(before, after) <= max_moves


@pytest.mark.parametrize("max_moves", [0, 1, 2, 5, 6])
def test_max_moves_with_groups_on_nodes_bounds_moves_over_all_nodes(max_moves):
    before = ExpertPlacement.initial(3, 32, 4)
    topology = Topology.even(4, 2)
    load_YL = lognormal_load(3, 32)
    assert moved_primaries(before, BalancedPolicy(None, 4).rearrange(load_YL, before, topology)) > 6
    after = BalancedPolicy(max_moves, 4).rearrange(load_YL, before, topology)
    assert moved_primaries(before, after) <= max_moves


def test_max_moves_when_raised_levels_ranks_further():
    before, topology = ExpertPlacement.initial(4, 32, 4), Topology.even(4)
    load_YL = lognormal_load(4, 32)
    reached = []
    for most in (0, 2, 8, None):
        after = BalancedPolicy(most).rearrange(load_YL, before, topology)
        reached.append(balancedness(rank_tokens(load_YL, after)))
    assert reached == sorted(set(reached))


def test_max_moves_of_zero_changes_replicas_only():
    before, topology = ExpertPlacement.initial(2, 32, 4, 8), Topology.even(4)
    load_YL = lognormal_load(2, 32)
    after = BalancedPolicy(0).rearrange(load_YL, before, topology)
    assert (after.primaries == before.primaries).all()
    assert not same_layers(before, after).any()
    assert (fullest_rank(load_YL, after) < fullest_rank(load_YL, before)).all()


@pytest.mark.parametrize("policy", [BalancedPolicy(), DeepSeekPolicy()])
@settings(max_examples=60)
@given(situation=situations())
def test_rearrange_in_any_situation_keeps_slots_of_experts_that_stay(policy, situation):
    load_YL, before, topology = situation
    after = policy.rearrange(load_YL, before, topology)
    n = before.primaries_per_rank
    for layer, rank in np.ndindex(before.num_layers, before.num_ranks):
        for part in (slice(0, n), slice(n, None)):
            then, now = before.by_rank[layer, rank, part], after.by_rank[layer, rank, part]
            stays = np.isin(then, now) & (then >= 0)
            assert (then[stays] == now[stays]).all()


def test_rearrange_without_load_returns_the_placement():
    before = ExpertPlacement.initial(2, 8, 4, 8)
    load_YL = np.zeros((2, 8), dtype=np.int64)
    assert BalancedPolicy().rearrange(load_YL, before, Topology.even(4)) is before


def test_rearrange_without_load_with_groups_on_nodes_returns_the_placement():
    before = ExpertPlacement.initial(2, 8, 4, 8)  # its copies are on other nodes as well
    load_YL = np.zeros((2, 8), dtype=np.int64)
    assert BalancedPolicy(num_groups=2).rearrange(load_YL, before, Topology.even(4, 2)) is before


def test_rearrange_with_a_layer_without_tokens_changes_only_the_other():
    before = ExpertPlacement.initial(2, 4, 2, 0)
    load_YL = np.array([[0, 0, 0, 0], [9, 9, 0, 0]]) * 1000
    after = BalancedPolicy().rearrange(load_YL, before, Topology.even(2))
    assert same_layers(before, after).tolist() == [True, False]
    assert balancedness(rank_tokens(load_YL, after)) == 1.0


def test_rearrange_of_level_load_returns_the_placement():
    before = ExpertPlacement.initial(1, 8, 4, 0)
    load_YL = np.full((1, 8), 50_000)
    assert BalancedPolicy().rearrange(load_YL, before, Topology.even(4)) is before


def test_rearrange_of_load_within_sampling_noise_returns_the_placement():
    before = ExpertPlacement.initial(1, 8, 4, 0)
    load_YL = np.array([[100, 102, 101, 100, 99, 101, 100, 100]])
    assert BalancedPolicy().rearrange(load_YL, before, Topology.even(4)) is before


def test_max_moves_of_two_finds_the_swap_that_levels():
    load_YL, before = np.array([[6, 6, 2, 2, 2, 2]]) * 10**6, ExpertPlacement.initial(1, 6, 3)
    after = BalancedPolicy(max_moves=2).rearrange(load_YL, before, Topology.even(3))
    assert rank_tokens(load_YL, after).max() == 8 * 10**6
    assert moved_primaries(before, after) == 2


def test_replicate_with_equal_experts_copies_the_lower_index():
    count_L = np.ones(4, dtype=np.int64)
    replicate(np.array([6.0, 6.0, 1.0, 1.0]), 2, 1, count_L)
    assert count_L.tolist() == [2, 1, 1, 1]


def test_look_ahead_where_replicas_level_as_well_moves_no_primary():
    # Half of expert 0 on rank 1 levels the ranks, and no primary needs to move, which takes as long as 2,000 tokens.
    before = ExpertPlacement([[0, 1, -1, 2, 3, -1]], 4, 2)
    look = outlook(np.array([[30, 10, 5, 5]]) * 1000, Costs(token=1.0, row_within_node=2000.0))
    after = BalancedPolicy().look_ahead(look, before, Topology.even(2))
    assert after.physical_to_logical.tolist() == [[0, 1, -1, 2, 3, 0]]


def test_rearrange_with_two_redundant_slots_a_rank_levels_without_moves():
    load_YL = lognormal_load(4, 64)
    before = ExpertPlacement.initial(4, 64, 8, 16)
    after = BalancedPolicy(max_moves=0).rearrange(load_YL, before, Topology.even(8))
    assert (fullest_rank(load_YL, after) <= 1.001 * load_YL.sum(axis=1) / 8).all()


def test_rearrange_of_load_on_one_rank_levels_it():
    # 60 % of the tokens on the four experts of rank 0 of four.
    load_YL = np.full((1, 16), 40 * 1000 // 12)
    load_YL[0, :4] = 60 * 1000 // 4
    before = ExpertPlacement.initial(1, 16, 4, 0)
    after = BalancedPolicy().rearrange(load_YL, before, Topology.even(4))
    assert balancedness(rank_tokens(load_YL, before)) == pytest.approx(0.4167, abs=1e-3)
    assert balancedness(rank_tokens(load_YL, after)) > 0.99


@pytest.mark.parametrize(("sigma", "at_least"), [(0.7, 0.96), (1.2, 0.99)])
def test_rearrange_with_one_redundant_slot_a_rank_levels_without_moves(sigma, at_least):
    load_YL = np.int64(np.random.default_rng(0).lognormal(0, sigma, (16, 384)) * 1e5)
    before = ExpertPlacement.initial(16, 384, 64, 64)
    after = BalancedPolicy(max_moves=0).rearrange(load_YL, before, Topology.even(64))
    assert balancedness(level_tokens(load_YL, after.by_rank)) > at_least


@pytest.mark.parametrize(
    ("experts", "redundant", "ranks", "at_least"),
    [(256, 32, 32, 0.99), (256, 0, 16, 0.9), (64, 8, 8, 0.998), (64, 16, 8, 0.998), (16, 2, 2, 0.998)],
)
def test_rearrange_of_lognormal_load_reaches_balancedness(experts, redundant, ranks, at_least):
    load_YL = lognormal_load(8, experts)
    before = ExpertPlacement.initial(8, experts, ranks, redundant)
    after = BalancedPolicy().rearrange(load_YL, before, Topology.even(ranks))
    assert load_YL.sum() / ranks / fullest_rank(load_YL, after).sum() > at_least


def test_capacity_of_half_gets_half_the_tokens():
    before = ExpertPlacement.initial(3, 64, 4, 8)
    capacity = (1.0, 0.5, 1.0, 1.0)
    load_YL = lognormal_load(3, 64)
    after = BalancedPolicy().rearrange(load_YL, before, Topology((0,) * 4, capacity))
    tokens_YR = level_tokens(load_YL, after.by_rank, capacity)
    wanted_YR = load_YL.sum(axis=1)[:, None] * np.array(capacity) / 3.5
    assert (tokens_YR <= wanted_YR * 1.01).all()
    assert (tokens_YR[:, 1] >= wanted_YR[:, 1] * 0.99).all()


def test_capacity_of_zero_gets_no_token_that_others_can_compute():
    before = ExpertPlacement.initial(3, 16, 4, 16)
    load_YL = lognormal_load(3, 16)
    capacity = (1.0, 1.0, 0.0, 1.0)
    after = BalancedPolicy().rearrange(load_YL, before, Topology((0,) * 4, capacity))
    tokens_YR = level_tokens(load_YL, after.by_rank, capacity)
    total_Y = load_YL.sum(axis=1)
    assert (tokens_YR[:, 2] <= 0.01 * total_Y).all()
    assert (tokens_YR <= 1.01 * total_Y[:, None] / 3).all()


def test_capacity_of_zero_without_redundancy_holds_the_coldest_primaries():
    load_YL = np.array([[9, 8, 1, 2, 7, 8]]) * 10**5
    before = ExpertPlacement.initial(1, 6, 3)
    topology = Topology((0, 0, 0), (0.0, 1.0, 1.0))
    after = BalancedPolicy().rearrange(load_YL, before, topology)
    assert rank_tokens(load_YL, after)[0, 0] == 3 * 10**5


def test_num_groups_on_nodes_keeps_groups_and_replicas_on_their_nodes():
    before = ExpertPlacement.initial(3, 32, 4, 8)
    load_YL = lognormal_load(3, 32)
    for topology in (Topology.even(4, 2), Topology((0, 1, 1, 1))):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            after = BalancedPolicy(num_groups=4).rearrange(load_YL, before, topology)
        assert after != before
        node_of = np.array(topology.node_of_rank)
        for layer, rank in np.ndindex(3, 4):
            held = after.by_rank[layer, rank]
            for expert in held[held >= 0]:
                assert node_of[before.primary_rank[layer, expert]] == node_of[rank]


def test_num_groups_spread_over_nodes_warns_once_and_plans_globally():
    generator = np.random.default_rng(0)
    before, topology = shuffled_placement(generator, 2, 4, 4, 1), Topology.even(4, 2)
    load_YL = lognormal_load(2, 16)
    policy = BalancedPolicy(num_groups=4)
    with pytest.warns(UserWarning, match=r"num_groups=4 and the nodes, of \[2, 2\] ranks"):
        first = policy.rearrange(load_YL, before, topology)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert policy.rearrange(load_YL, before, topology) == first
    assert first == BalancedPolicy().rearrange(load_YL, before, topology)
    assert first != before


def test_rearrange_on_nodes_of_unequal_size_levels_ranks():
    before, topology = ExpertPlacement.initial(2, 40, 5, 5), Topology((0, 0, 1, 1, 1))
    load_YL = lognormal_load(2, 40)
    after = BalancedPolicy().rearrange(load_YL, before, topology)
    assert (fullest_rank(load_YL, after) <= 1.1 * load_YL.sum(axis=1) / 5).all()


def test_costs_between_nodes_alone_keep_moves_within_nodes():
    before, topology = ExpertPlacement.initial(2, 32, 4), Topology.even(4, 2)
    load_YL = lognormal_load(2, 32)
    costs = Costs(token=1.0, row_between_nodes=1e12)
    after = BalancedPolicy().look_ahead(outlook(load_YL, costs), before, topology)
    assert moved_primaries(before, after) > 0
    assert (after.primary_rank // 2 == before.primary_rank // 2).all()


def test_costs_above_any_gain_return_the_placement():
    before, topology = ExpertPlacement.initial(2, 32, 4), Topology.even(4, 2)
    costs = Costs(token=1e-6, row_within_node=1e3, row_between_nodes=1e3)
    assert BalancedPolicy().look_ahead(outlook(lognormal_load(2, 32), costs), before, topology) is before


def test_interval_when_longer_moves_more_primaries():
    before, topology = ExpertPlacement.initial(4, 32, 4), Topology.even(4)
    load_YL = lognormal_load(4, 32)
    moved = []
    for interval in (1, 10, 10_000):
        costs = Costs(token=1.0, row_within_node=load_YL.sum() / 40)
        after = BalancedPolicy().look_ahead(outlook(load_YL, costs, interval), before, topology)
        moved.append(moved_primaries(before, after))
    assert moved == sorted(moved)
    assert 0 == moved[0] < moved[-1]


@pytest.mark.parametrize("copy", [1e9, 1e15, 1e30, float("inf")])
def test_costs_of_replicas_above_their_gain_leave_slots_empty(copy):
    slots = np.full((1, 4, 10), -1)
    slots[:, :, :8] = np.arange(32).reshape(4, 8)
    before = ExpertPlacement(slots.reshape(1, -1), 32, 4)
    look = outlook(lognormal_load(1, 32), Costs(token=1.0, copy=copy))
    after = BalancedPolicy().look_ahead(look, before, Topology.even(4))
    assert (after.by_rank[:, :, 8:] == -1).all()
    assert moved_primaries(before, after) > 0
    free = BalancedPolicy().look_ahead(outlook(lognormal_load(1, 32)), before, Topology.even(4))
    assert (free.by_rank[:, :, 8:] >= 0).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_moves": -1}, "max_moves=-1"),
        ({"num_groups": 0}, "num_groups=0"),
        ({"num_groups": "8"}, "num_groups='8' must be a whole number"),
        ({"max_moves": "a"}, "max_moves='a' must be a whole number"),
        ({"split": "even"}, "split='even' was removed: .* `simulate --split even` judges plans by an even split"),
    ],
)
def test_balanced_policy_with_bad_arguments_raises(arguments, message):
    with pytest.raises(ValueError, match=message):
        BalancedPolicy(**arguments)


def test_rearrange_with_groups_that_do_not_divide_experts_raises():
    before = ExpertPlacement.initial(1, 4, 2)
    with pytest.raises(ValueError, match="num_groups=3 must divide the 4 logical experts"):
        BalancedPolicy(num_groups=3).rearrange(np.ones((1, 4), dtype=np.int64), before, Topology.even(2))


@pytest.mark.slow
def test_plans_with_other_threads_and_processor_instructions_are_the_same(digest_on_plain_processor):
    default, threads = (printed_by(start(name)) for name in ("default", "threads"))
    assert len(default) == 64
    assert threads == digest_on_plain_processor == default


@pytest.mark.parametrize("num_groups", [1, 8, 32])
def test_warm_up_with_any_groups_succeeds(num_groups):
    policy = BalancedPolicy(num_groups=num_groups)
    placement = ExpertPlacement.initial(1, 64, 8, 8)
    policy.warm_up(placement)
    load_YL = lognormal_load(1, 64)
    assert policy.rearrange(load_YL, placement, Topology.even(8, 2)) != placement


def test_warm_up_with_groups_on_nodes_leaves_nothing_to_compile(fresh_interpreter):
    program = """
import numpy as np
from numba.core.event import install_recorder
from lightning_eplb import BalancedPolicy, ExpertPlacement, Topology
for ranks, per_rank, redundant in (4, 1, 1), (4, 1, 0), (2, 1, 0), (4, 2, 1):
    experts = ranks * per_rank
    placement = ExpertPlacement.initial(2, experts, ranks, ranks * redundant)
    policy = BalancedPolicy(num_groups=2)
    policy.warm_up(placement)
    load_YL = np.int64(np.random.default_rng(0).lognormal(0, 1.2, (2, experts)) * 10**6)
    with install_recorder("numba:compiler_lock") as recorder:
        policy.rearrange(load_YL, placement, Topology.even(ranks, 2))
    print(len(recorder.buffer))
"""
    assert fresh_interpreter.run(program).split() == ["0"] * 4


def test_capacity_in_any_unit_gives_the_same_plan():
    load_YL, placement = lognormal_load(2, 16), ExpertPlacement.initial(2, 16, 4, 4)
    plans = [
        BalancedPolicy().rearrange(load_YL, placement, Topology((0, 0, 0, 0), capacity=(unit,) * 4))
        for unit in (1.0, 2.0, 1e308)
    ]
    assert plans[0] == plans[1] == plans[2] != placement


@pytest.mark.parametrize("part", ["load", "first", "spread"])
def test_look_ahead_with_forecast_that_does_not_fit_raises(part):
    load_YL = lognormal_load(1, 4)
    placement = ExpertPlacement.initial(1, 4, 2, 2)
    for wrong_YL in (-load_YL, load_YL[:, :3], load_YL.astype(float)):
        parts = {"load": load_YL, "first": load_YL, "spread": load_YL // 10, part: wrong_YL}
        with pytest.raises(ValueError, match="load_YL"):
            BalancedPolicy().look_ahead(Outlook(load_YL, 4, Forecast(**parts), 10), placement, Topology.even(2))


@pytest.mark.parametrize("max_moves", [2.5, float("inf"), 10**20])
def test_max_moves_of_no_whole_number_raises(max_moves):
    with pytest.raises(ValueError, match="max_moves="):
        BalancedPolicy(max_moves=max_moves)


@pytest.mark.parametrize("policy", [BalancedPolicy, DeepSeekPolicy])
def test_warm_up_with_groups_that_do_not_divide_experts_raises(policy):
    with pytest.raises(ValueError, match=r"num_groups=3 must divide the 4 logical experts; one of \[1, 2, 4\]"):
        policy(num_groups=3).warm_up(ExpertPlacement.initial(1, 4, 2, 2))


def outlook_of(load_YL: list[list[int]]) -> Outlook:
    load = np.array(load_YL)
    return Outlook(load, 1, plain_mean(load), 1)


def test_max_moves_of_several_models_is_shared_and_goes_where_it_saves_most() -> None:
    """Two swaps would level each model; the limit allows one, for the model with more tokens."""
    skewed = [[400, 400, 100, 100]]
    outlooks = {"small": outlook_of(skewed), "large": outlook_of([[10 * tokens for tokens in skewed[0]]])}
    placements = {name: ExpertPlacement.initial(1, 4, 2) for name in outlooks}
    topology = Topology.even(2)

    def moved(policy: BalancedPolicy) -> dict[str, int]:
        planned = policy.rearrange_models(outlooks, placements, topology)
        return {name: int((planned[name].primary_rank != placements[name].primary_rank).sum()) for name in planned}

    assert moved(BalancedPolicy()) == {"small": 2, "large": 2}
    assert moved(BalancedPolicy(max_moves=4)) == {"small": 2, "large": 2}
    assert moved(BalancedPolicy(max_moves=3)) == {"small": 0, "large": 2}
    assert moved(BalancedPolicy(max_moves=2)) == {"small": 0, "large": 2}
    assert moved(BalancedPolicy(max_moves=1)) == {"small": 0, "large": 0}


@given(st.integers(0, 12), st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_max_moves_of_models_of_any_shapes_bounds_the_sum(max_moves: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    shapes = {"main": (3, 8, 2), "draft": (1, 16, 4), "other": (2, 4, 0)}
    placements = {name: ExpertPlacement.initial(layers, num, 2, extra) for name, (layers, num, extra) in shapes.items()}
    outlooks = {name: outlook_of(random.integers(0, 1000, shape[:2]).tolist()) for name, shape in shapes.items()}
    planned = BalancedPolicy(max_moves=max_moves).rearrange_models(outlooks, placements, Topology.even(2))
    assert list(planned) == list(shapes)
    assert sum(int((planned[n].primary_rank != placements[n].primary_rank).sum()) for n in shapes) <= max_moves
    for name, (layers, num, extra) in shapes.items():  # it is a placement of the same shape
        again = ExpertPlacement(planned[name].physical_to_logical, num, 2)
        assert (again.num_layers, again.num_redundant_experts) == (layers, extra)
