"""Places of pairs on the way, for any counts and any slots."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_eplb.parallel.dispatch_plan import lay_out_pairs


@st.composite
def plans(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray, int, int]:
    """Slots, pairs of each rank for each slot ``[R, R, S]`` and for each expert, primaries, where a part may begin."""
    ranks, primaries, redundant = draw(st.integers(1, 4)), draw(st.integers(1, 5)), draw(st.integers(0, 2))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    experts = ranks * primaries
    slots_RS = np.full((ranks, primaries + redundant), -1)
    slots_RS[:, :primaries] = random.permutation(experts).reshape(ranks, primaries)
    for rank in range(ranks):
        others = random.permutation(np.setdiff1d(np.arange(experts), slots_RS[rank]))[:redundant]
        slots_RS[rank, primaries : primaries + len(others)] = np.where(random.random(len(others)) < 0.7, others, -1)
    sent_RRS = random.integers(0, draw(st.sampled_from([1, 2, 9])), (ranks, *slots_RS.shape)) * (slots_RS >= 0)
    counts_RL = np.zeros((ranks, experts), dtype=np.int64)
    for rank in range(ranks):
        np.add.at(counts_RL[rank], slots_RS[slots_RS >= 0], sent_RRS[rank][slots_RS >= 0])
    return slots_RS, sent_RRS, counts_RL, primaries, draw(st.integers(0, primaries - 1))


@settings(max_examples=300)
@given(plans())
def test_lay_out_pairs_of_any_plan_computes_each_pair_once_in_its_slot(
    plan: tuple[np.ndarray, np.ndarray, np.ndarray, int, int],
) -> None:
    """Pairs are sent as laid out, by hand, and each rank checks what it serves."""
    slots_RS, sent_RRS, counts_RL, primaries, middle = plan
    num_ranks, starts = len(slots_RS), np.array(sorted({0, middle}))
    sent_of, taken_of, ends_of, counts_of, orders = [], [], [], [], []
    for rank in range(num_ranks):
        redundant = np.flatnonzero(slots_RS[rank, primaries:] >= 0)[::-1]  # weights can arrive in any order
        order = np.concatenate((np.arange(primaries), primaries + redundant))
        received_RS = sent_RRS[:, rank, :]
        table, counts = lay_out_pairs(counts_RL[rank], slots_RS, sent_RRS[rank], received_RS, order, primaries, starts)
        runs = (len(table) - len(order)) // 2
        index = np.repeat(table[:runs], table[runs : 2 * runs]) + np.arange(table[runs : 2 * runs].sum())
        pairs = [(rank, expert, i) for expert in range(counts_RL.shape[1]) for i in range(counts_RL[rank, expert])]
        num_sent = counts[0].sum()
        sent_of.append([pairs[i] for i in index[:num_sent]])
        taken_of.append(index[num_sent:])
        ends_of.append(table[2 * runs :])
        counts_of.append(counts)
        orders.append(order)
        assert sorted(sent_of[rank]) == pairs

    for rank in range(num_ranks):
        taken = taken_of[rank]
        for part, start in enumerate(starts):
            arrived = []
            for source in range(num_ranks):
                first = counts_of[source][0, :part].sum() + counts_of[source][0, part, :rank].sum()
                length = counts_of[source][0, part, rank]
                assert length == counts_of[rank][1, part, source]
                arrived += sent_of[source][first : first + length]
            served, taken = [arrived[i] for i in taken[: len(arrived)]], taken[len(arrived) :]
            assert sorted(served) == sorted(arrived)
            stop = starts[part + 1] if part + 1 < len(starts) else len(orders[rank])
            place, ends = 0, ends_of[rank]
            for turn in range(start, stop):
                before = 0 if turn in (start, primaries) else ends[turn - 1]
                slot = orders[rank][turn]
                run = served[place : place + ends[turn] - before]
                assert [pair[1] for pair in run] == [slots_RS[rank, slot]] * len(run)
                assert len(run) == sent_RRS[:, rank, slot].sum()
                place += len(run)
            assert place == len(served)
        assert not len(taken)
