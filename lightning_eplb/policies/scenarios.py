"""Scenarios of the next interval's load, which a plan is judged by.

A plan that is level for the expected load alone breaks with the first change. So plans are judged by their mean over
the expected load, sub-windows of the window (real changes are correlated), and a prior: noise of each expert by itself,
and noise that neighbours share, since neighbouring experts, routing groups and languages become hot together.

Shape suffixes: ``B`` sub-windows, ``C`` scenarios, ``Y`` MoE layers, ``L`` logical experts.
"""

import numpy as np

NUM_SUB_WINDOWS = 3
"""Sub-windows that count, the latest: a decision looks back on 8 blocks, and older ones tell less."""
NUM_PRIORS = 24
"""Scenarios of the prior. With 12, plans without redundant slots were up to 0.018 behind the published algorithm's on
the next load, with 24 up to 0.010."""
OWN_SPREAD, SHARED_SPREAD = 0.25, 0.35
"""Standard deviations of the logarithm, of each expert and of neighbours, where the window tells nothing. Measured
between neighbouring workloads of DeepSeek-V3: 0.03 to 0.49 in all."""
UNKNOWN = float(np.hypot(OWN_SPREAD, SHARED_SPREAD))
"""The same of both together."""
LEAST = 0.1
"""Least size of the prior: where the window was quiet, it need not stay so."""
PARTS_BITS = 31
"""Bits of a layer's parts, so that no sum, product or square of them leaves int64 or is rounded in float64."""
EVENED = 6
"""In real changes popular experts lose, and those without tokens get some: where the window tells nothing, this part of
a scenario's load is even. Without it a layer's idle experts shared a rank; once used, it was 7.5 times as full as the
mean (DeepSeek-V3, from prefill to decode, 256+256 experts on 64 ranks; the published algorithm's: 2.2 to 3.9). With a
quarter, plans without redundant slots were up to 0.0067 behind on the next load, with a sixth up to 0.0043."""
NUM_BLOCKS = 16
"""Blocks of neighbouring experts in a layer."""
_QUANTILES = (-1.534, -0.887, -0.489, -0.157, 0.157, 0.489, 0.887, 1.534)
"""Means of the eighths of a normal distribution."""


def _factors(spread: float) -> np.ndarray:
    """Eight equally likely factors of mean 1 in 1/1024: whole numbers, the same on every machine."""
    factors = np.exp(spread * np.array(_QUANTILES))
    return np.round(1024 * factors / factors.mean()).astype(np.int64)


_OWN, _SHARED = _factors(OWN_SPREAD), _factors(SHARED_SPREAD)


def _draw(scenario: int, index_X: np.ndarray, salt: int) -> np.ndarray:
    """Pseudorandom whole numbers from 0 to 7 (multiplicative hashing, Knuth 6.4), the same on every machine."""
    mixed_X = (index_X.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed_X ^= np.uint64((scenario * 2 + salt + 1) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF)
    mixed_X ^= mixed_X >> np.uint64(31)
    mixed_X *= np.uint64(0x94D049BB133111EB)
    return (mixed_X >> np.uint64(61)).astype(np.int64)


def scale_to_parts(load_YL: np.ndarray) -> np.ndarray:
    """Scale each layer's load by a power of two to a sum below ``2**31``, not far below. Any int64 counts will do."""
    high_Y = (load_YL >> 20).sum(axis=1) + ((load_YL & 0xFFFFF).sum(axis=1) >> 20)
    low_Y = (load_YL & 0xFFFFF).sum(axis=1)
    bits_Y = np.where(high_Y > 0, 20 + np.frexp(high_Y.astype(np.float64))[1], np.frexp(low_Y.astype(np.float64))[1])
    shift_Y1 = (PARTS_BITS - 1 - bits_Y)[:, None]
    return np.where(shift_Y1 >= 0, load_YL << np.maximum(shift_Y1, 0), load_YL >> np.maximum(-shift_Y1, 0))


def strength_of(expected_YL: np.ndarray, spread_YL: np.ndarray) -> np.ndarray:
    """Size of the prior in each layer, ``LEAST`` to 1: the forecast's spread over the one that counts as unknown."""
    expected_Y, spread_Y = (part.astype(np.float64).cumsum(axis=1)[:, -1] for part in (expected_YL, spread_YL))
    return np.clip(spread_Y / np.maximum(expected_Y, 1.0) / UNKNOWN, LEAST, 1.0)


def scenarios(expected_YL: np.ndarray, strength_Y: np.ndarray, sub_windows_BYL: np.ndarray | None) -> np.ndarray:
    """Draw the scenarios.

    Args:
        expected_YL: Expected parts of each expert, int64, a layer's sum below ``2**31``.
        strength_Y: Size of the prior in each layer, 0 to 1.
        sub_windows_BYL: Tokens of each expert in sub-windows, oldest first, int64; ``None``: they are not known.

    Returns:
        Parts of each expert, int64 ``[C, Y, L]``; the expected load first.
    """
    experts = expected_YL.shape[1]
    block_L = np.arange(experts) * min(NUM_BLOCKS, experts) // experts
    drawn = [expected_YL]
    scale_Y1 = (1024 * strength_Y).astype(np.int64)[:, None]
    total_Y1 = expected_YL.sum(axis=1, keepdims=True)
    hedged_YL = expected_YL + (total_Y1 // experts - expected_YL) // 1024 * scale_Y1 // EVENED
    for scenario in range(NUM_PRIORS):
        if sub_windows_BYL is not None and scenario < min(NUM_SUB_WINDOWS, len(sub_windows_BYL)):
            part_YL = sub_windows_BYL[-1 - scenario].astype(np.float64)
            tokens_Y1 = part_YL.cumsum(axis=1)[:, -1:]
            scaled_YL = (part_YL / np.maximum(tokens_Y1, 1.0) * total_Y1).astype(np.int64)
            drawn.append(np.where(tokens_Y1 > 0, scaled_YL, expected_YL))
        own_YL = 1024 + (_OWN[_draw(scenario, np.arange(experts), 0)] - 1024) * scale_Y1 // 1024
        shared_YL = 1024 + (_SHARED[_draw(scenario, block_L, 1)] - 1024) * scale_Y1 // 1024
        drawn.append(hedged_YL * own_YL // 1024 * shared_YL // 1024)
    return np.stack(drawn)
