"""How far plans are from the best there are, found by mixed-integer programming."""

from itertools import combinations

import numpy as np
from scipy.optimize import LinearConstraint, milp
from scipy.sparse import csr_array

from lightning_eplb.placement import ExpertPlacement
from lightning_eplb.policies import BalancedPolicy, Topology
from lightning_eplb.policies.token_split import level_tokens

NUM_LOADS = 200
CLOSE = 1e-4
"""A fullest rank that is so close to a lower bound, in parts of it, is the best."""


def lowest_fullest_rank(load_L, ranks, redundant, known):
    """The tokens of the fullest rank of the best plan, in parts of the mean: a lower bound within ``CLOSE`` of it.

    Args:
        known: What some plan reaches.
    """
    experts, per_rank = load_L.size, load_L.size // ranks
    load_L = np.sort(load_L)[::-1] * ranks / load_L.sum()
    lowest = 1.0
    if redundant == 0:
        lowest = max(lowest, load_L[0] + load_L[experts - per_rank + 1 :].sum())
    if known <= lowest * (1 + CLOSE):
        return lowest
    # Variables: is expert l's primary on rank r, has rank r a copy of it, what part of its tokens does it serve; peak.
    size = experts * ranks
    primary, copy, served = np.arange(3 * size).reshape(3, experts, ranks)
    peak, rows = 3 * size, []

    def require(low, high, *terms):
        rows.append((low, high, [(np.ravel(where), np.broadcast_to(value, np.size(where))) for where, value in terms]))

    for expert in range(experts):
        require(1, 1, (primary[expert], 1.0))
        require(1, 1, (served[expert], 1.0))
        for rank in range(ranks):
            holds = [(primary[expert, rank], 1.0), (copy[expert, rank], 1.0)]
            require(0, 1, *holds)
            require(0, np.inf, *holds, (served[expert, rank], -1.0))
    for rank in range(ranks):
        require(per_rank, per_rank, (primary[:, rank], 1.0))
        require(0, redundant, (copy[:, rank], 1.0))
        require(0, np.inf, (peak, 1.0), (served[:, rank], -load_L))
    upper = np.ones(3 * size + 1)
    upper[copy.ravel()] = min(redundant, 1)
    upper[peak] = known * (1 + CLOSE)
    lower = np.zeros(3 * size + 1)
    lower[peak] = lowest
    for expert in range(min(experts, ranks)):  # ranks are alike: name them in the order of their hottest primaries
        upper[primary[expert, expert + 1 :]] = 0
    matrix = csr_array(
        (
            np.concatenate([value for *_, terms in rows for _, value in terms]),
            (
                np.int32(np.concatenate([np.full(where.size, i) for i, (*_, t) in enumerate(rows) for where, _ in t])),
                np.int32(np.concatenate([where for *_, terms in rows for where, _ in terms])),
            ),
        ),
        shape=(len(rows), 3 * size + 1),
    )
    objective = np.zeros(3 * size + 1)
    objective[peak] = 1.0
    is_integer = np.ones(3 * size + 1)
    is_integer[served.ravel()] = is_integer[peak] = 0
    found = milp(
        objective,
        integrality=is_integer,
        bounds=(lower, upper),
        constraints=LinearConstraint(matrix, [low for low, *_ in rows], [high for _, high, _ in rows]),
        options={"mip_rel_gap": CLOSE, "time_limit": 5.0},
    )
    assert found.status in (0, 1), found.message  # optimal, or out of time with a bound
    return max(lowest, found.mip_dual_bound)


def test_integer_program_of_small_loads_finds_what_enumeration_finds():
    generator = np.random.default_rng(1)
    for _ in range(10):
        load_L = np.int64(generator.lognormal(0, 1.2, 9) * 10**6)
        peak = min(
            max(load_L[list(first)].sum(), load_L[list(second)].sum(), load_L.sum() - load_L[[*first, *second]].sum())
            for first in combinations(range(9), 3)
            for second in combinations(sorted(set(range(9)) - set(first)), 3)
        )
        assert abs(lowest_fullest_rank(load_L, 3, 0, known=3.0) - peak / (load_L.sum() / 3)) <= 2 * CLOSE
    # Four ranks, one expert each: of all plans with one copy a rank, some level the ranks; without copies none does.
    assert abs(lowest_fullest_rank(np.array([9, 1, 1, 1]), 4, 1, known=3.0) - 1.0) <= 2 * CLOSE
    assert abs(lowest_fullest_rank(np.array([9, 1, 1, 1]), 4, 0, known=4.0) - 3.0) <= 2 * CLOSE


def test_rearrange_of_random_loads_is_close_to_the_optimum():
    generator = np.random.default_rng(0)
    policy = BalancedPolicy()
    excess = []
    for _ in range(NUM_LOADS):
        ranks, redundant, layers = generator.integers(2, 5), generator.integers(0, 3), generator.integers(1, 4)
        experts = int(ranks * generator.integers(2, 16 // ranks + 1))
        sigma = generator.choice([0.5, 1.2, 1.2, 2.0])
        load_YL = np.int64(generator.lognormal(0, sigma, (layers, experts)) * 10**8)
        before = ExpertPlacement.initial(layers, experts, ranks, ranks * redundant)
        after = policy.rearrange(load_YL, before, Topology.even(ranks))
        peak_Y = level_tokens(load_YL, after.by_rank, sweeps=2000).max(axis=1) / (load_YL.sum(axis=1) / ranks)
        layer = generator.integers(layers)
        best = lowest_fullest_rank(load_YL[layer], ranks, redundant, peak_Y[layer])
        excess.append(peak_Y[layer] / best - 1)
    assert np.mean(excess) <= 0.01
    assert np.max(excess) <= 0.04
