import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_eplb.policies.trade import take_stock, trade_copies


def stock(load_L, slots_RS, weight_R):
    """Everything that take_stock fills in."""
    of_experts = [np.full(load_L.size, 99) for _ in range(5)]
    copies_L, head_L, share_L, fewer_L, more_L = of_experts
    next_P, tokens_R, line_R = np.full(slots_RS.size, 99), np.full(len(slots_RS), 99), np.full(len(slots_RS), 9.0)
    order = np.full(len(slots_RS), 99)
    kept = (copies_L, head_L, next_P, share_L, fewer_L, more_L, tokens_R, line_R, order)
    take_stock(load_L, slots_RS, weight_R, *kept)
    return kept


def slots_of(head_L, next_P):
    lists = []
    for place in head_L:
        places = []
        while place >= 0:
            places.append(int(place))
            place = next_P[place]
        lists.append(sorted(places))
    return lists


@st.composite
def layers(draw):
    """A load, slots with copies and empty ones, and what a part costs on each rank."""
    ranks, per_rank, redundant = draw(st.integers(1, 7)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    slots_RS = np.full((ranks, per_rank + redundant), -1)
    slots_RS[:, :per_rank] = generator.permutation(ranks * per_rank).reshape(ranks, per_rank)
    for rank in range(ranks):
        others = generator.permutation(np.setdiff1d(np.arange(ranks * per_rank), slots_RS[rank]))[:redundant]
        slots_RS[rank, per_rank : per_rank + others.size] = np.where(generator.random(others.size) < 0.2, -1, others)
    load_L = np.int64(generator.lognormal(0, 1.2, ranks * per_rank) * 10 ** draw(st.integers(1, 7)))
    weight_R = np.ones(ranks) if draw(st.booleans()) else generator.choice([0.5, 1.0, 2.0], ranks)
    return load_L, slots_RS, per_rank, weight_R


@settings(max_examples=200)
@given(layers(), st.sampled_from([0, 1, 1000]), st.sampled_from([0, 10**6]))
def test_trades_lower_the_fullest_rank_and_the_books_are_kept(layer, most_changes, least):
    load_L, slots_RS, own, weight_R = layer
    before_RS, before = slots_RS.copy(), stock(load_L, slots_RS, weight_R)
    kept = stock(load_L, slots_RS, weight_R)
    peak = trade_copies(load_L, slots_RS, own, weight_R, np.int64(least), most_changes, *kept)
    assert peak == kept[7].max() == kept[7][kept[8][-1]]
    assert peak <= before[7].max()
    if most_changes == 0:
        assert (slots_RS == before_RS).all()
    assert (slots_RS[:, :own] == before_RS[:, :own]).all()
    for held in slots_RS:
        assert len(set(held[held >= 0])) == (held >= 0).sum()
    anew = stock(load_L, slots_RS, weight_R)
    for index in (0, 3, 4, 5, 6, 7):
        assert (kept[index] == anew[index]).all()
    assert slots_of(kept[1], kept[2]) == slots_of(anew[1], anew[2])
    assert sorted(kept[8]) == list(range(len(slots_RS)))
    assert (np.diff(kept[7][kept[8]]) >= 0).all()
    grown = kept[0] > before[0]
    assert (kept[3][grown] >= least).all()


@settings(max_examples=200)
@given(layers())
def test_no_exchange_of_two_copies_is_left_that_lowers_the_fullest_rank(layer):
    load_L, slots_RS, own, _ = layer
    weight_R = np.ones(len(slots_RS))
    kept = stock(load_L, slots_RS, weight_R)
    peak = trade_copies(load_L, slots_RS, own, weight_R, np.int64(0), 10**4, *kept)
    full = kept[8][-1]
    for rank in range(len(slots_RS)):
        for mine in range(own, slots_RS.shape[1]):
            for theirs in range(own, slots_RS.shape[1]):
                other_RS = slots_RS.copy()
                other_RS[full, mine], other_RS[rank, theirs] = slots_RS[rank, theirs], slots_RS[full, mine]
                if slots_RS[full, mine] < 0 or any(len(set(h[h >= 0])) < (h >= 0).sum() for h in other_RS):
                    continue
                assert stock(load_L, other_RS, weight_R)[7][[full, rank]].max() >= peak


def test_an_expert_leaves_its_copies_to_one_that_needs_them_more():
    load_L, slots_RS = np.array([400, 40, 40, 40]), np.array([[0, -1], [1, 3], [2, 3], [3, -1]])
    peak = trade_copies(load_L, slots_RS, 1, np.ones(4), np.int64(0), 100, *stock(load_L, slots_RS, np.ones(4)))
    assert peak == 400 // 3 + 40 // 2
    assert np.bincount(slots_RS[slots_RS >= 0]).tolist()[0] == 3
