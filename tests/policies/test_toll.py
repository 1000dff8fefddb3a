from itertools import combinations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lightning_eplb.forecast import Forecast
from lightning_eplb.placement import ExpertPlacement
from lightning_eplb.policies import BalancedPolicy, Costs, Outlook, Topology
from lightning_eplb.policies.split import even_quotas, level_quotas
from lightning_eplb.policies.toll import CHANGE, busiest, drop_copies, likely_peak, thin_out, weigh_copies

BOTH = pytest.mark.parametrize("split", ["even", "level"])


def shuffled_layer(seed, most_ranks=5, most_slots=3):
    """A load of some million parts, its spread, shuffled slots, some of them empty, and the primaries of a rank."""
    generator = np.random.default_rng(seed)
    ranks, own = int(generator.integers(2, most_ranks + 1)), int(generator.integers(1, 4))
    redundant = int(generator.integers(1, most_slots + 1))
    experts = ranks * own
    load_L = np.int64(generator.lognormal(0, generator.choice([0.0, 0.5, 1.2]), experts) * 10**6)
    load_L[generator.random(experts) < generator.choice([0.0, 0.3])] = 0
    slots_RS = np.full((ranks, own + redundant), -1)
    slots_RS[:, :own] = generator.permutation(experts).reshape(ranks, own)
    for rank in range(ranks):
        others = np.setdiff1d(np.arange(experts), slots_RS[rank])
        copies = generator.permutation(others)[:redundant]
        slots_RS[rank, own : own + len(copies)] = copies
        slots_RS[rank, own:][generator.random(redundant) < 0.2] = -1
    return load_L, np.int64(load_L * generator.choice([0.0, 0.02, 0.2])), slots_RS, own


layers = st.integers(0, 2**32).map(shuffled_layer)
COPIES = [1e3, 1e5, 4e5, 1e6, 1e9]


def divide(load_L, slots_RS, weight_R, is_even):
    quota_RS, tokens_R = np.empty_like(slots_RS), np.empty(len(slots_RS), dtype=np.int64)
    even_quotas(load_L, slots_RS, quota_RS, tokens_R)
    if not is_even:
        level_quotas(load_L, slots_RS, weight_R, 100, 0.0, 0.0, quota_RS, tokens_R)
    return quota_RS, tokens_R


def weigh(layer, slots_RS, copy, present, is_even):
    load_L, likely_L, _, own = layer
    weight_R = np.ones(len(slots_RS))
    quotas = divide(load_L, slots_RS, weight_R, is_even)
    return weigh_copies(load_L, likely_L, slots_RS, own, weight_R, copy, present, is_even, *quotas)


def drop(layer, copy, present, is_even, limit=np.inf):
    load_L, likely_L, slots_RS, own = layer
    weight_R, left_RS = np.ones(len(slots_RS)), slots_RS.copy()
    quota_RS, tokens_R = divide(load_L, left_RS, weight_R, is_even)
    enough = float(load_L.sum() / len(slots_RS))
    time = drop_copies(
        load_L, likely_L, left_RS, own, weight_R, copy, present, np.bool_(is_even), limit, enough, quota_RS, tokens_R
    )
    return time, left_RS, quota_RS, tokens_R


@settings(max_examples=150)
@given(layer=layers, is_even=st.booleans(), copy=st.sampled_from(COPIES))
def test_what_is_left_is_a_part_and_its_time_is_told(layer, is_even, copy):
    load_L, likely_L, slots_RS, own = layer
    present = busiest(slots_RS, own)
    time, left_RS, quota_RS, tokens_R = drop(layer, copy, present, is_even)
    assert ((left_RS == slots_RS) | (left_RS == -1)).all()
    assert (left_RS[:, :own] == slots_RS[:, :own]).all()
    assert (quota_RS >= 0).all()
    assert (quota_RS[left_RS < 0] == 0).all()
    assert (quota_RS.sum(axis=1) == tokens_R).all()
    served_L = np.zeros_like(load_L)
    np.add.at(served_L, left_RS[left_RS >= 0], quota_RS[left_RS >= 0])
    assert (served_L == load_L).all()
    arguments = (load_L, likely_L, left_RS, own, np.ones(len(left_RS)), copy, present, is_even, quota_RS, tokens_R)
    assert time == weigh_copies(*arguments)
    nothing_RS = np.where(np.arange(slots_RS.shape[1]) < own, slots_RS, -1)
    for other_RS in (slots_RS, nothing_RS):
        assert time <= 1.01 * weigh(layer, other_RS, copy, present, is_even)


@settings(max_examples=100)
@given(layer=layers, is_even=st.booleans(), copies=st.integers(0, 3))
def test_more_copies_than_their_travel_allows_are_not_tried(layer, is_even, copies):
    load_L, _, slots_RS, own = layer
    present, copy = busiest(slots_RS, own), 1e5
    limit = load_L.sum() / len(slots_RS) + (copies + 0.5) * copy
    left_RS = drop(layer, copy, present, is_even, limit)[1]
    assert (left_RS == slots_RS).all() or busiest(left_RS, own) <= copies


@pytest.mark.parametrize(("split", "worst"), [("even", 0.4), ("level", 0.2)])
def test_trying_all_sets_of_copies_finds_little_more(split, worst):
    """Of copies by chance; a plan's are chosen better."""
    is_even = split == "even"
    excess = []
    for seed in range(150):
        layer = shuffled_layer(seed, most_ranks=4, most_slots=2)
        _, _, slots_RS, own = layer
        present, copy = busiest(slots_RS, own), COPIES[seed % len(COPIES)]
        places = [(rank, own + slot) for rank, slot in np.argwhere(slots_RS[:, own:] >= 0)]
        best = np.inf
        for size in range(len(places) + 1):
            for chosen in combinations(places, size):
                fewer_RS = slots_RS.copy()
                fewer_RS[tuple(np.array(chosen, dtype=int).reshape(-1, 2).T)] = -1
                best = min(best, weigh(layer, fewer_RS, copy, present, is_even))
        excess.append(drop(layer, copy, present, is_even)[0] / max(best, 1.0) - 1)
    assert np.mean(excess) <= 0.01
    assert max(excess) <= worst


@settings(max_examples=100)
@given(layer=layers, most=st.integers(0, 3))
def test_no_rank_sends_or_receives_more_and_no_more_is_dropped_than_must_be(layer, most):
    load_L, _, slots_RS, own = layer
    left_RS = slots_RS.copy()
    quota_RS, tokens_R = divide(load_L, left_RS, np.ones(len(left_RS)), False)
    owner_L = np.empty_like(load_L)
    for rank, slot in np.ndindex(len(slots_RS), own):
        owner_L[slots_RS[rank, slot]] = rank * slots_RS.shape[1] + slot
    copies = [(rank, expert) for rank, row in enumerate(slots_RS[:, own:]) for expert in row if expert >= 0]
    sent_R = np.bincount([owner_L[e] // slots_RS.shape[1] for _, e in copies], minlength=len(slots_RS))
    received_R = np.bincount([rank for rank, _ in copies], minlength=len(slots_RS))
    assert busiest(slots_RS, own) == max(sent_R.max(), received_R.max())
    had_most = max(sent_R.max(), received_R.max())
    thin_out(left_RS, own, owner_L, most, sent_R, received_R, quota_RS, tokens_R)
    assert max(sent_R.max(), received_R.max()) == busiest(left_RS, own) == min(most, had_most)
    assert tokens_R.sum() == load_L.sum()
    if had_most <= most:
        assert (left_RS == slots_RS).all()


def test_a_spread_that_copies_can_take_does_not_count():
    """Two ranks with an expert each of 100 parts, its standard deviation 20: of two draws the larger is 20 above."""
    load_L, likely_L, weight_R = np.array([100, 100]), np.array([20, 20]), np.ones(2)
    for slots, grown in (([[0, -1], [1, -1]], 120.0), ([[0, 1], [1, 0]], 100.0)):
        slots_RS = np.array(slots)
        quotas = divide(load_L, slots_RS, weight_R, False)
        assert likely_peak(load_L, likely_L, slots_RS, weight_R, False, *quotas) == grown
    # Divided evenly, nothing can be left to the other copy; but half of each expert is on each rank.
    quotas = divide(load_L, slots_RS, weight_R, True)
    assert likely_peak(load_L, likely_L, slots_RS, weight_R, True, *quotas) == pytest.approx(100 + 200**0.5)


def known(load_YL):
    """Ten steps, and sure that ten like them will follow."""
    load_YL = np.asarray(load_YL)
    return Forecast(load_YL, load_YL, np.zeros_like(load_YL))


def plan(load_YL, before, costs, split="level", nodes=1, **arguments):
    ahead = load_YL if isinstance(load_YL, Forecast) else known(load_YL)
    outlook = Outlook(ahead.first, 10, ahead, 10, costs)
    return BalancedPolicy(split=split, **arguments).look_ahead(outlook, before, Topology.even(before.num_ranks, nodes))


def num_copies(placement):
    return int((placement.by_rank[:, :, placement.primaries_per_rank :] >= 0).sum())


@BOTH
def test_a_level_layer_loses_the_copies_that_it_started_with(split):
    """A ten-thousandth of a rank's tokens is cost enough, as nothing is saved; but it must cost something."""
    before = ExpertPlacement.initial(2, 16, 4, 8)
    load_YL = np.full((2, 16), 50_000)
    after = plan(load_YL, before, Costs(1.0, 1e3, 1e3, copy=20.0), split)
    assert num_copies(after) == 0
    assert (after.primaries == before.primaries).all()
    for costs in (Costs(1.0, 1e3, 1e3, copy=0.0), None):
        assert num_copies(plan(load_YL, before, costs, split)) == 16


@BOTH
@pytest.mark.parametrize("copy", [1e-12, 1e-25, 5e-324])
def test_a_copy_that_costs_next_to_nothing_is_as_one_that_costs_little(split, copy):
    load_YL = np.random.default_rng(0).integers(1, 10**6, (1, 32))
    before = ExpertPlacement.initial(1, 32, 4, 8)
    cheap, cheaper = (plan(load_YL, before, Costs(1.0, 1e9, 1e9, copy=each), split) for each in (1e-6, copy))
    assert num_copies(cheaper) == num_copies(cheap) > 0


@BOTH
@pytest.mark.parametrize(("copy", "is_added", "is_kept"), [(1.30, 1, 1), (1.36, 0, 1), (1.68, 0, 1), (1.74, 0, 0)])
def test_a_copy_must_save_an_eighth_more_than_it_costs_to_be_added_and_as_much_less_to_be_dropped(
    split, copy, is_added, is_kept
):
    """Rank 0 serves 40,000 tokens in ten steps, 25,000 where rank 1 has a copy of expert 0: 1,500 less in a step."""
    load_YL = np.array([[30_000, 10_000, 5_000, 5_000]])
    costs = Costs(1.0, copy=1e3 * copy)
    without = ExpertPlacement([[0, 1, -1, 2, 3, -1]], 4, 2)
    with_one = ExpertPlacement([[0, 1, -1, 2, 3, 0]], 4, 2)
    assert num_copies(plan(load_YL, without, costs, split, max_moves=0)) == is_added
    assert num_copies(plan(load_YL, with_one, costs, split, max_moves=0)) == is_kept


@BOTH
@pytest.mark.parametrize(
    ("copy", "expected"), [(1.0, 7), (150.0, 7), (410.0, 3), (900.0, 2), (2_500.0, 1), (6_000.0, 0)]
)
def test_a_rank_sends_its_copies_one_after_the_other(split, copy, expected):
    """One expert has all 8,000 tokens of a step: with n copies 8,000 / (n + 1) and n times a copy's travel."""
    load_YL = np.zeros((1, 8), dtype=np.int64)
    load_YL[0, 0] = 80_000
    slots_YP = np.stack([np.arange(8), [-1] + [0] * 7], axis=1).reshape(1, -1)
    time = [8_000 / (n + 1) + n * copy + copy / 8 * (n != 7) for n in range(8)]
    assert int(np.argmin(time)) == expected
    after = plan(load_YL, ExpertPlacement(slots_YP, 8, 8), Costs(1.0, 1e9, 1e9, copy), split)
    assert num_copies(after) == expected


def test_what_copies_cost_is_saved_by_moves_where_those_are_cheap():
    """A swap of experts 1 and 2 levels the ranks for good, half of expert 1 on rank 1 in each step anew."""
    before = ExpertPlacement([[0, 1, -1, 2, 3, -1]], 4, 2)
    load_YL = np.array([[30_000, 30_000, 10_000, 10_000]])
    after = plan(load_YL, before, Costs(1.0, 50.0, 50.0, copy=500.0))
    assert num_copies(after) == 0
    assert (np.sort(after.primary_rank[0][:2]) == [0, 1]).all()
    dear = plan(load_YL, before, Costs(1.0, 1e6, 1e6, copy=500.0))
    assert num_copies(dear) == 1
    assert (dear.primaries == before.primaries).all()


def test_copies_stay_for_what_may_come():
    """Ranks that are level as expected, but need not stay so: copies for a hundredth of their tokens are worth it."""
    load_YL = np.full((1, 16), 40_000)
    before = ExpertPlacement.initial(1, 16, 4, 8)
    for spread, expected in ((0, 0), (8_000, 4)):
        ahead = Forecast(load_YL, load_YL, np.full_like(load_YL, spread))
        after = plan(ahead, before, Costs(1.0, 1e9, 1e9, copy=160.0))
        assert (num_copies(after) >= expected) if expected else (num_copies(after) == 0)


@BOTH
@settings(max_examples=60, derandomize=True)
@given(seed=st.integers(0, 2**32), copy=st.sampled_from([10.0, 300.0, 3e3, 1e5]), row=st.sampled_from([0.0, 1e3, 1e9]))
@example(seed=9017, copy=10.0, row=0.0)  # a few sweeps over the quotas of what was planned leave it 7 % above the level
@example(seed=354_229_732, copy=10.0, row=1e9)
@example(seed=1_763_599_815, copy=10.0, row=1e9)
def test_plans_settle(split, seed, copy, row):
    """As long as the forecast is the same, the copies do not come and go: soon nothing changes any more.

    One layer in some ten thousands goes on, between two plans that are nearly as good: the quotas of each are swept
    over too few times to tell. So the examples are the same in each run.
    """
    generator = np.random.default_rng(seed)
    ranks, own, redundant = (int(generator.integers(low, high)) for low, high in ((2, 6), (1, 5), (1, 3)))
    load_YL = np.int64(generator.lognormal(0, generator.choice([0.1, 1.2]), (1, ranks * own)) * 10**5)
    placement = ExpertPlacement.initial(1, ranks * own, ranks, ranks * redundant)
    seen = [placement]
    for _ in range(8):
        seen.append(plan(load_YL, seen[-1], Costs(1.0, row, row, copy), split))
    assert seen[-1] is seen[-2]


@BOTH
def test_noise_does_not_make_copies_come_and_go(split):
    """Loads for which a copy saves as much as it costs, but for a little noise."""
    generator = np.random.default_rng(0)
    placement = ExpertPlacement([[0, 1, -1, 2, 3, 0]], 4, 2)
    counts = set()
    for _ in range(50):
        load_YL = np.int64(np.array([[30_000, 10_000, 5_000, 5_000]]) * generator.lognormal(0, 0.01, (1, 4)))
        placement = plan(load_YL, placement, Costs(1.0, 1e9, 1e9, copy=1_500.0), split)
        counts.add(num_copies(placement))
    assert counts == {1}
    assert CHANGE * 1_500 > 0.01 * 3_000


def test_copies_are_weighed_for_each_node_where_groups_stay_on_theirs():
    """Node 0 is level without copies, node 1 is not."""
    before = ExpertPlacement.initial(1, 16, 4, 4)
    load_YL = np.full((1, 16), 10_000)
    load_YL[0, 8:] = [40_000, 30_000, 20_000, 10_000, 2_000, 2_000, 2_000, 2_000]
    after = plan(load_YL, before, Costs(1.0, 1e9, 1e9, copy=500.0), nodes=2, num_groups=2)
    assert (after.by_rank[0, :2, 4:] == -1).all()
    assert (after.by_rank[0, 2:, 4:] >= 0).any()
