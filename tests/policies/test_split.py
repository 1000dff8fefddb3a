import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_eplb.placement import ExpertPlacement
from lightning_eplb.policies.split import split_evenly


def copy_of_slot(placement: ExpertPlacement) -> np.ndarray:
    copy_P = np.full(placement.num_physical_experts, -1)
    for slots_C in placement.logical_to_physical[0]:
        for copy, slot in enumerate(slots_C[slots_C >= 0]):
            copy_P[slot] = copy
    return copy_P


def test_remainders_start_at_another_copy_on_every_rank():
    placement = ExpertPlacement([[0, 1, -1, 2, 3, 1]], num_logical_experts=4, num_ranks=2)
    tokens_RP = split_evenly(
        np.array([[4, 5, 0, 1], [4, 5, 0, 1]]),
        placement.physical_to_logical[0],
        copy_of_slot(placement),
        placement.replica_count[0],
    )
    assert tokens_RP.tolist() == [[4, 3, 0, 0, 1, 2], [4, 2, 0, 0, 1, 3]]
    assert tokens_RP.dtype == np.int64


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_rows_sum_to_the_counts_and_follow_the_formula(data):
    ranks = data.draw(st.integers(1, 4))
    experts = ranks * data.draw(st.integers(1, 3))
    placement = ExpertPlacement.initial(1, experts, ranks, ranks * data.draw(st.integers(0, 3)))
    counts_RL = np.array(
        data.draw(st.lists(st.lists(st.integers(0, 20), min_size=experts, max_size=experts), min_size=1, max_size=5))
    )
    slots_P, copies_P, replicas_L = (
        placement.physical_to_logical[0],
        copy_of_slot(placement),
        placement.replica_count[0],
    )
    tokens_RP = split_evenly(counts_RL, slots_P, copies_P, replicas_L)
    for rank, slot in np.ndindex(tokens_RP.shape):
        expert, copies = slots_P[slot], replicas_L[slots_P[slot]]
        if expert < 0:
            assert tokens_RP[rank, slot] == 0
        else:
            over = counts_RL[rank, expert] % copies
            more = (copies_P[slot] - rank) % copies < over
            assert tokens_RP[rank, slot] == counts_RL[rank, expert] // copies + more
    for expert in range(experts):
        assert (tokens_RP[:, slots_P == expert].sum(axis=1) == counts_RL[:, expert]).all()
