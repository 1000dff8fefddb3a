"""Local search: exchange experts of the fullest rank, and drop replicas that cost more than they bring. Compiled.

Shape suffixes: ``C`` scenarios, ``L`` logical experts, ``R`` ranks, ``S`` slots of a rank.
"""

from typing import NamedTuple

import numpy as np

from lightning_eplb._compiled import compiled
from lightning_eplb.policies.objective import LEAST_GAIN, Layer, busiest, count_moved, divide, judge, price_of
from lightning_eplb.policies.token_split import copy_slots, find_replicas, heaviest_first


class _State(NamedTuple):
    """A plan as the search sees it: tokens of an expert are divided evenly among its replicas.

    Attributes:
        slots_RS: The plan.
        held_RL: Experts of each rank.
        each_LC: Load of one replica in each scenario, times the scenario's weight; a last row of zeros for an empty
            slot.
        full_RC: Load of each rank.
        arrived_R: Cost of the primaries that arrive.
    """

    slots_RS: np.ndarray
    held_RL: np.ndarray
    each_LC: np.ndarray
    full_RC: np.ndarray
    arrived_R: np.ndarray


@compiled
def exchange(layer: Layer, slots_RS: np.ndarray, scenario_weight_C: np.ndarray, most_moved: int) -> None:
    """Exchange experts between the fullest rank and another while the cost falls, in place.

    Primaries are exchanged for primaries, replicas for replicas or into an empty slot. The exchange that is made is the
    best of all of the rank that is fullest over the scenarios; where none helps, the next fullest rank has its turn.

    Args:
        layer: To plan.
        slots_RS: Plan; primaries first.
        scenario_weight_C: Weights of the first scenarios, float64; the others are not looked at.
        most_moved: Primaries that may change ranks.
    """
    state = _start(layer, slots_RS, scenario_weight_C)
    num_ranks, num_experts = state.held_RL.shape
    moved = count_moved(layer, slots_RS)
    is_done_R, over_R = np.zeros(num_ranks, dtype=np.bool_), np.empty(num_ranks)
    for _ in range(num_experts):
        now = 0.0
        over_R[:] = 0.0  # above the mean, in the scenarios in which the rank is the fullest
        for scenario in range(scenario_weight_C.size):
            fullest = np.int64(0)
            for rank in range(1, num_ranks):
                if state.full_RC[rank, scenario] > state.full_RC[fullest, scenario]:
                    fullest = np.int64(rank)
            now += state.full_RC[fullest, scenario]
            over_R[fullest] += state.full_RC[fullest, scenario] - scenario_weight_C[scenario]
        hot, most = np.int64(-1), 0.0
        for rank in range(num_ranks):
            if over_R[rank] > most and not is_done_R[rank]:
                hot, most = np.int64(rank), over_R[rank]
        if hot < 0:
            return
        rank, mine, theirs = _best_exchange(layer, state, hot, now, most_moved - moved)
        if rank < 0:
            is_done_R[hot] = True
            continue
        is_done_R[:] = False
        given, taken = slots_RS[hot, mine], slots_RS[rank, theirs]
        slots_RS[hot, mine], slots_RS[rank, theirs] = taken, given
        state.held_RL[hot, given], state.held_RL[rank, given] = False, True
        if taken >= 0:
            state.held_RL[rank, taken], state.held_RL[hot, taken] = False, True
        if mine < layer.num_primaries:
            state.arrived_R[hot] += price_of(layer, taken, hot) - price_of(layer, given, hot)
            state.arrived_R[rank] += price_of(layer, given, rank) - price_of(layer, taken, rank)
            moved += _newly_moved(layer, given, taken, hot, rank)
        taken = taken if taken >= 0 else num_experts
        for scenario in range(scenario_weight_C.size):
            change = state.each_LC[given, scenario] - state.each_LC[taken, scenario]
            state.full_RC[hot, scenario] -= change * layer.weight_R[hot]
            state.full_RC[rank, scenario] += change * layer.weight_R[rank]


@compiled
def _start(layer: Layer, slots_RS: np.ndarray, scenario_weight_C: np.ndarray) -> _State:
    num_ranks, num_slots = slots_RS.shape
    num_scenarios, num_experts = scenario_weight_C.size, layer.home_L.size
    count_L = np.zeros(num_experts, dtype=np.int64)
    held_RL = np.zeros((num_ranks, num_experts), dtype=np.bool_)
    arrived_R = np.zeros(num_ranks)
    for rank in range(num_ranks):
        for slot in range(num_slots):
            expert = slots_RS[rank, slot]
            if expert >= 0:
                count_L[expert] += 1
                held_RL[rank, expert] = True
                if slot < layer.num_primaries:
                    arrived_R[rank] += price_of(layer, expert, rank)
    each_LC = np.zeros((num_experts + 1, num_scenarios))
    for scenario in range(num_scenarios):
        for expert in range(num_experts):
            share = layer.share_CL[scenario, expert] / count_L[expert]
            each_LC[expert, scenario] = share * scenario_weight_C[scenario]
    full_RC = np.zeros((num_ranks, num_scenarios))
    for rank in range(num_ranks):
        for slot in range(num_slots):
            expert = slots_RS[rank, slot]
            if expert >= 0:
                for scenario in range(num_scenarios):
                    full_RC[rank, scenario] += each_LC[expert, scenario] * layer.weight_R[rank]
    return _State(slots_RS, held_RL, each_LC, full_RC, arrived_R)


@compiled
def _newly_moved(layer: Layer, given: int, taken: int, hot: int, rank: int) -> int:
    """Count the primaries that an exchange moves away from where they are now, less those that it brings back."""
    home_of_given, home_of_taken = layer.home_L[given], layer.home_L[taken]
    return (
        np.int64(home_of_given == hot)
        + np.int64(home_of_taken == rank)
        - np.int64(home_of_given == rank)
        - np.int64(home_of_taken == hot)
    )


@compiled
def _best_exchange(layer: Layer, state: _State, hot: int, now: float, may_move: int) -> tuple[int, int, int]:
    """Find the exchange of rank ``hot`` that lowers the cost most: the other rank and both slots; -1 if none does."""
    num_ranks, num_slots = state.slots_RS.shape
    num_scenarios, n = state.full_RC.shape[1], layer.num_primaries
    num_experts = layer.home_L.size
    first_C, second_C, other_C = np.zeros(num_scenarios), np.zeros(num_scenarios), np.empty(num_scenarios)
    at_C = np.empty(num_scenarios, dtype=np.int64)  # the rank that is the fullest beside this one
    for rank in range(num_ranks):
        for scenario in range(num_scenarios):
            full = state.full_RC[rank, scenario]
            if rank != hot and full > first_C[scenario]:
                second_C[scenario], first_C[scenario], at_C[scenario] = first_C[scenario], full, rank
            elif rank != hot and full > second_C[scenario]:
                second_C[scenario] = full
    paid = 0.0
    for arrived in state.arrived_R:
        paid = max(paid, arrived)
    lowest = now - LEAST_GAIN
    best_rank, best_mine, best_theirs = -1, -1, -1
    for rank in range(num_ranks):
        if rank == hot:
            continue
        others = 0.0  # of the fullest ranks but these two
        for scenario in range(num_scenarios):
            other_C[scenario] = second_C[scenario] if rank == at_C[scenario] else first_C[scenario]
            others += other_C[scenario]
        if others >= lowest:
            continue
        for mine in range(num_slots):
            given = state.slots_RS[hot, mine]
            if given < 0 or state.held_RL[rank, given]:
                continue
            first, last = (0, n) if mine < n else (n, num_slots)
            for theirs in range(first, last):
                taken = state.slots_RS[rank, theirs]
                if taken >= 0 and state.held_RL[hot, taken]:
                    continue
                cost = others
                if mine < n:
                    newly_moved = _newly_moved(layer, given, taken, hot, rank)
                    if newly_moved > may_move:
                        continue
                    here = state.arrived_R[hot] + price_of(layer, taken, hot) - price_of(layer, given, hot)
                    there = state.arrived_R[rank] + price_of(layer, given, rank) - price_of(layer, taken, rank)
                    cost += max(max(here, there) - paid, 0.0) + layer.least_gain * newly_moved
                taken = taken if taken >= 0 else num_experts
                for scenario in range(num_scenarios):
                    change = state.each_LC[given, scenario] - state.each_LC[taken, scenario]
                    full = max(
                        state.full_RC[hot, scenario] - change * layer.weight_R[hot],
                        state.full_RC[rank, scenario] + change * layer.weight_R[rank],
                    )
                    cost += max(full - other_C[scenario], 0.0)
                    if cost >= lowest:
                        break
                if cost < lowest:
                    lowest = cost
                    best_rank, best_mine, best_theirs = rank, mine, theirs
    return best_rank, best_mine, best_theirs


@compiled
def drop_replicas(layer: Layer, slots_RS: np.ndarray) -> tuple[float, float]:
    """Drop the replicas whose travel costs more than they bring, in place, by the scenarios of the search.

    The busiest ranks go without the replicas that serve least until they send and receive half as many, and so on. The
    plan that costs least is kept.

    Returns:
        What :func:`judge` returns for it.
    """
    cost, expected = judge(layer, slots_RS, np.inf, layer.weight_X.size)
    num_ranks, num_experts, n = slots_RS.shape[0], layer.home_L.size, layer.num_primaries
    most = busiest(layer, slots_RS) if layer.copy > 0.0 else 0
    trial_RS, num_redundant = slots_RS.copy(), slots_RS.shape[1] - n
    served_RS = np.empty((num_ranks, num_redundant), dtype=np.int64)
    sent_R, received_R = np.empty(num_ranks, dtype=np.int64), np.empty(num_ranks, dtype=np.int64)
    owner_L = np.empty(num_experts, dtype=np.int64)
    for rank in range(num_ranks):
        for slot in range(n):
            owner_L[slots_RS[rank, slot]] = rank
    while most > 0:
        most //= 2
        replicas = find_replicas(trial_RS, num_experts, layer.weight_R)
        divide(layer, replicas, 0)
        sent_R[:] = 0
        received_R[:] = 0
        served_RS[:] = 0
        for place in range(replicas.quota_P.size):
            if replicas.slot_P[place] >= n:
                served_RS[replicas.rank_P[place], replicas.slot_P[place] - n] = replicas.quota_P[place]
        for place in heaviest_first(served_RS.ravel()):  # those are kept while there is room
            rank, slot = place // num_redundant, n + place % num_redundant
            if trial_RS[rank, slot] < 0:
                continue
            owner = owner_L[trial_RS[rank, slot]]
            if received_R[rank] < most and sent_R[owner] < most:
                received_R[rank] += 1
                sent_R[owner] += 1
            else:
                trial_RS[rank, slot] = -1
        trial_cost, trial_expected = judge(layer, trial_RS, cost, layer.weight_X.size)
        if trial_cost < cost:
            cost, expected = trial_cost, trial_expected
            copy_slots(trial_RS, slots_RS)
    return cost, expected
