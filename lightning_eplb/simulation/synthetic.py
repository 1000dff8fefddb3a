"""Loads for replays: synthetic ones, drawn from a seed, and recorded ones that come with the package.

Shape suffixes: ``W`` steps, ``Y`` MoE layers, ``L`` logical experts.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from lightning_eplb._validation import check_not_negative, check_positive, one_of
from lightning_eplb.simulation.trace import read_trace

RECORDED_LOADS = {path.stem: path for path in sorted((Path(__file__).parent / "data").glob("*.npy"))}
"""Traces of real trainings, by name. ``data/SOURCES.md`` has their sources."""

ROTATION_STEPS = 50
"""Steps for which four experts stay hot in ``rotating``."""
BURST_STEPS = 50
"""Steps between two hot steps in ``burst``."""
GROUP_SIZE = 16
"""Neighbours that share a factor in ``grouped``; fewer if there would be less than four groups."""
GROUP_MEMORY = 0.7
"""Correlation of the logarithms of a group's factors in two successive intervals, in ``grouped``."""
TOKENS_PER_STEP = 65_536
"""Token-expert pairs of a layer in a step: 8,192 tokens, top-8."""

Popularity = Iterator[np.ndarray]


def recorded_load(name: str) -> np.ndarray:
    """Read a load of a real training, int64 ``[W, Y, L]``.

    Args:
        name: ``mixtral-8x7b-e8k2`` (10 steps, 32 layers) or ``mixtral-8x7b-e16k4`` (30 steps, 24 layers). Each has 4
            experts in a layer, each of which is a quarter of the layer's experts: the source counted them together.

    Raises:
        ValueError: No load has that name.
    """
    if name not in RECORDED_LOADS:
        raise ValueError(f"recorded load {name!r} is unknown. Use {one_of(RECORDED_LOADS)}.")
    return read_trace(RECORDED_LOADS[name])


def synthetic_load(
    name: str,
    num_steps: int,
    num_layers: int,
    num_logical_experts: int,
    *,
    tokens_per_step: int = TOKENS_PER_STEP,
    num_ranks: int = 8,
    interval: int = 100,
    seed: int = 0,
) -> np.ndarray:
    """Draw the tokens of each expert in each step from a popularity that depends on ``name``.

    Args:
        name: ``balanced``; ``lognormal-0.7`` and ``lognormal-1.2`` (popularity with that sigma); ``zipf`` (the i-th
            expert has ``1/i``, in an order of its own in each layer); ``hot-expert`` (half of all tokens to one);
            ``hot-rank`` (the experts that start on one rank are three times as popular); ``rotating`` (half of all
            tokens to four experts, others every 50 steps); ``burst`` (balanced, and every 50 steps one step with half
            of its tokens to one expert); ``drift-10`` and ``drift-30`` (lognormal-1.2, and once an interval each
            popularity is multiplied by a lognormal factor with sigma 0.1 or 0.3); ``sorted`` (lognormal with sigma 0.8,
            the most popular expert first, so that neighbours are alike); ``grouped`` (lognormal with sigma 0.6, times a
            factor that 16 neighbours share and that changes once an interval, as where they serve one domain);
            ``one-expert`` (all tokens to one); ``empty`` (none).
        num_steps: Number of steps, ``W``.
        num_layers: Number of layers, ``Y``, which are independent of each other.
        num_logical_experts: Number of experts in each layer, ``L``.
        tokens_per_step: Token-expert pairs of a layer in a step.
        num_ranks: Number of ranks ``R`` for ``hot-rank``, in which experts ``0 ... L/R - 1`` are hot. Defaults to 8.
        interval: Steps between two changes in ``drift`` and ``grouped``. Defaults to 100.
        seed: Seed of the generator. Defaults to 0.

    Returns:
        Load, int64 ``[W, Y, L]``.

    Raises:
        ValueError: No load has that name, or a number is too small.
    """
    if name not in SYNTHETIC_LOADS:
        raise ValueError(f"synthetic load {name!r} is unknown. Use {one_of(SYNTHETIC_LOADS)}.")
    check_positive(
        num_steps=num_steps,
        num_layers=num_layers,
        num_logical_experts=num_logical_experts,
        num_ranks=num_ranks,
        interval=interval,
    )
    check_not_negative(tokens_per_step=tokens_per_step, seed=seed)
    random = np.random.default_rng(seed)
    load_WYL = np.zeros((num_steps, num_layers, num_logical_experts), dtype=np.int64)
    for layer in range(num_layers):
        popularity = SYNTHETIC_LOADS[name](random, num_logical_experts, num_logical_experts // num_ranks, interval)
        for step, weight_L in zip(range(num_steps), popularity, strict=False):
            if weight_L.any():
                load_WYL[step, layer] = random.multinomial(tokens_per_step, weight_L / weight_L.sum())
    return load_WYL


def resample(
    load_WYL: np.ndarray, num_steps: int, *, tokens_per_step: int = TOKENS_PER_STEP, seed: int = 0
) -> np.ndarray:
    """Draw a longer load from one of few steps, such as the totals of workloads.

    Each step stands for an equal part of the new ones. Its experts' shares are the probabilities of a token's choice.

    Args:
        load_WYL: Tokens of each expert in each step, int64.
        num_steps: Steps to draw, at least as many as ``load_WYL`` has.
        tokens_per_step: Token-expert pairs of a layer in a step. Layers without tokens stay so. Defaults to 65,536.
        seed: Seed of the generator. Defaults to 0.

    Returns:
        Load, int64 ``[num_steps, Y, L]``.

    Raises:
        ValueError: There are more steps than ``num_steps``, or a number is negative.

    Example:
        >>> resample(np.array([[[3, 0]], [[0, 5]]]), 4, tokens_per_step=10)[:, 0].tolist()
        [[10, 0], [10, 0], [0, 10], [0, 10]]
    """
    steps, layers, _ = load_WYL.shape
    if num_steps < steps:
        raise ValueError(f"num_steps={num_steps} must be at least the {steps} steps of the load")
    check_not_negative(tokens_per_step=tokens_per_step, seed=seed)
    random = np.random.default_rng(seed)
    drawn_WYL = np.zeros((num_steps, *load_WYL.shape[1:]), dtype=np.int64)
    for step in range(num_steps):
        source_YL = load_WYL[step * steps // num_steps]
        for layer in range(layers):
            if source_YL[layer].any():
                drawn_WYL[step, layer] = random.multinomial(tokens_per_step, source_YL[layer] / source_YL[layer].sum())
    return drawn_WYL


def _constant(weight_L: np.ndarray) -> Popularity:
    while True:
        yield weight_L


def _with_hot(weight_L: np.ndarray, hot: np.ndarray) -> np.ndarray:
    """Give half of the tokens to the experts ``hot``, in equal parts."""
    share_L = weight_L / (2 * weight_L.sum())
    share_L[hot] += 0.5 / len(hot)
    return share_L


def _balanced(random: np.random.Generator, experts: int, per_rank: int, interval: int) -> Popularity:
    return _constant(np.ones(experts))


def _lognormal(sigma: float) -> Callable[..., Popularity]:
    def popularity(random: np.random.Generator, experts: int, per_rank: int, interval: int) -> Popularity:
        return _constant(random.lognormal(0.0, sigma, experts))

    return popularity


def _zipf(random: np.random.Generator, experts: int, per_rank: int, interval: int) -> Popularity:
    return _constant(1.0 / (1 + random.permutation(experts)))


def _hot_expert(random: np.random.Generator, experts: int, per_rank: int, interval: int) -> Popularity:
    return _constant(_with_hot(np.ones(experts), random.choice(experts, 1)))


def _hot_rank(random: np.random.Generator, experts: int, per_rank: int, interval: int) -> Popularity:
    return _constant(np.where(np.arange(experts) < per_rank, 3.0, 1.0))


def _rotating(random: np.random.Generator, experts: int, per_rank: int, interval: int) -> Popularity:
    while True:
        weight_L = _with_hot(np.ones(experts), random.choice(experts, min(4, experts), replace=False))
        for _ in range(ROTATION_STEPS):
            yield weight_L


def _burst(random: np.random.Generator, experts: int, per_rank: int, interval: int) -> Popularity:
    while True:
        for _ in range(BURST_STEPS - 1):
            yield np.ones(experts)
        yield _with_hot(np.ones(experts), random.choice(experts, 1))


def _drift(sigma: float) -> Callable[..., Popularity]:
    def popularity(random: np.random.Generator, experts: int, per_rank: int, interval: int) -> Popularity:
        weight_L = random.lognormal(0.0, 1.2, experts)
        while True:
            for _ in range(interval):
                yield weight_L
            weight_L = weight_L * random.lognormal(0.0, sigma, experts)

    return popularity


def _sorted(random: np.random.Generator, experts: int, per_rank: int, interval: int) -> Popularity:
    return _constant(-np.sort(-random.lognormal(0.0, 0.8, experts)))


def _grouped(random: np.random.Generator, experts: int, per_rank: int, interval: int) -> Popularity:
    own_L = random.lognormal(0.0, 0.6, experts)
    group_L = np.arange(experts) // max(1, min(GROUP_SIZE, experts // 4))
    factor_G = random.normal(0.0, 0.6, group_L[-1] + 1)
    while True:
        for _ in range(interval):
            yield own_L * np.exp(factor_G)[group_L]
        fresh_G = random.normal(0.0, 0.6, len(factor_G))
        factor_G = GROUP_MEMORY * factor_G + np.sqrt(1.0 - GROUP_MEMORY**2) * fresh_G


def _one_expert(random: np.random.Generator, experts: int, per_rank: int, interval: int) -> Popularity:
    return _constant(np.eye(experts)[random.integers(experts)])


def _empty(random: np.random.Generator, experts: int, per_rank: int, interval: int) -> Popularity:
    return _constant(np.zeros(experts))


SYNTHETIC_LOADS: dict[str, Callable[[np.random.Generator, int, int, int], Popularity]] = {
    "balanced": _balanced,
    "lognormal-0.7": _lognormal(0.7),
    "lognormal-1.2": _lognormal(1.2),
    "zipf": _zipf,
    "hot-expert": _hot_expert,
    "hot-rank": _hot_rank,
    "rotating": _rotating,
    "burst": _burst,
    "drift-10": _drift(0.1),
    "drift-30": _drift(0.3),
    "sorted": _sorted,
    "grouped": _grouped,
    "one-expert": _one_expert,
    "empty": _empty,
}
"""Functions that draw the popularity of a layer, step by step, by the name of the load."""
