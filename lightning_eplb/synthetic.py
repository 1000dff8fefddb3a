"""Synthetic loads: routers that a planner should be tried on, drawn from a seed.

Shape suffixes: ``W`` steps, ``Y`` MoE layers, ``L`` logical experts.
"""

from collections.abc import Callable, Iterator

import numpy as np

ROTATION_STEPS = 50
"""How long four experts stay hot in ``rotating``."""
BURST_STEPS = 50
"""In ``burst``, every so many steps one step is hot."""

Popularity = Iterator[np.ndarray]


def synthetic_load(
    name: str,
    num_steps: int,
    num_layers: int,
    num_logical_experts: int,
    *,
    tokens_per_step: int = 65_536,
    num_ranks: int = 8,
    interval: int = 100,
    seed: int = 0,
) -> np.ndarray:
    """Tokens of each expert in each step, drawn from a popularity that depends on ``name``.

    Args:
        name: ``balanced``; ``lognormal-0.7`` and ``lognormal-1.2`` (popularity with that sigma); ``zipf`` (the i-th
            expert has ``1/i``, in an order of its own in each layer); ``hot-expert`` (half of all tokens to one);
            ``hot-rank`` (the experts that start on one rank are three times as popular); ``rotating`` (half of all
            tokens to four experts, others every 50 steps); ``burst`` (balanced, and every 50 steps one step with half
            of its tokens to one expert); ``drift-10`` and ``drift-30`` (lognormal-1.2, and once an interval each
            popularity is multiplied by a lognormal factor with sigma 0.1 or 0.3); ``one-expert`` (all tokens to one);
            ``empty`` (none).
        num_steps: ``W``.
        num_layers: ``Y``; layers are independent of each other.
        num_logical_experts: ``L``.
        tokens_per_step: Token-expert pairs of a layer in a step.
        num_ranks: For ``hot-rank``: experts ``0 ... L/R - 1`` are hot.
        interval: For ``drift``: steps between two changes.
        seed: Of the generator.

    Returns:
        int64 ``[W, Y, L]``.

    Raises:
        ValueError: No load has that name, or a number is too small.
    """
    if name not in SYNTHETIC_LOADS:
        raise ValueError(f"synthetic load {name!r} is unknown; one of {', '.join(SYNTHETIC_LOADS)} would do")
    sizes = {
        "num_steps": num_steps,
        "num_layers": num_layers,
        "num_logical_experts": num_logical_experts,
        "num_ranks": num_ranks,
        "interval": interval,
    }
    for argument, value in sizes.items():
        if value < 1:
            raise ValueError(f"{argument}={value} must be at least 1")
    for argument, value in {"tokens_per_step": tokens_per_step, "seed": seed}.items():
        if value < 0:
            raise ValueError(f"{argument}={value} must not be negative")
    random = np.random.default_rng(seed)
    load_WYL = np.zeros((num_steps, num_layers, num_logical_experts), dtype=np.int64)
    for layer in range(num_layers):
        popularity = SYNTHETIC_LOADS[name](random, num_logical_experts, num_logical_experts // num_ranks, interval)
        for step, weight_L in zip(range(num_steps), popularity, strict=False):
            if weight_L.any():
                load_WYL[step, layer] = random.multinomial(tokens_per_step, weight_L / weight_L.sum())
    return load_WYL


def _constant(weight_L: np.ndarray) -> Popularity:
    while True:
        yield weight_L


def _with_hot(weight_L: np.ndarray, hot: np.ndarray) -> np.ndarray:
    """Half of the tokens to the experts ``hot``, in equal parts; the rest as before."""
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
    "one-expert": _one_expert,
    "empty": _empty,
}
"""Each draws a layer's popularity, step after step."""
