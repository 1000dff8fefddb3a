"""The forecast of the next interval, against the plain mean of the window."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lightning_eplb.policies.forecast import Forecast, forecast, plain_mean
from lightning_eplb.simulation.synthetic import SYNTHETIC_LOADS, synthetic_load
from lightning_eplb.simulation.trace import read_trace

TRACE = Path(__file__).parents[1] / "benchmarks" / "pretrain_trace.npy"
BEFORE, AFTER = np.array([10, 20, 30, 40]), np.array([9, 22, 27, 42])


def shares(load_YL: np.ndarray) -> np.ndarray:
    return load_YL / load_YL.sum(axis=1, keepdims=True)


def steps(*parts: tuple[int, np.ndarray], tokens: int = 1000) -> np.ndarray:
    """One layer's steps: so many of each popularity, without noise."""
    return tokens * np.concatenate([np.tile(weight_L, (count, 1, 1)) for count, weight_L in parts])


@pytest.mark.parametrize("tokens", [512, 65_536])
@pytest.mark.parametrize("name", ["zipf", "lognormal-0.7", "hot-expert"])
def test_forecast_of_noise_is_the_mean(name: str, tokens: int) -> None:
    """In nearly all layers, rounded; noise is rarely taken for a change."""
    window_WYL = synthetic_load(name, 100, 64, 32, tokens_per_step=tokens)
    sum_YL = window_WYL.sum(axis=0)
    is_mean_Y = (np.abs(forecast(window_WYL).load - sum_YL) <= 1).all(axis=1)
    assert is_mean_Y.mean() > 0.95


def test_forecast_of_constant_load_is_that_load() -> None:
    window_WYL = steps((100, BEFORE))
    found = forecast(window_WYL)
    assert np.array_equal(found.load, window_WYL.sum(axis=0))
    assert np.array_equal(found.first, found.load)
    assert not found.spread.any()


@pytest.mark.parametrize("num_steps", [96, 100, 50, 25])
@pytest.mark.parametrize("part", [0.25, 0.46, 0.5, 0.54, 0.75])
def test_forecast_after_a_lasting_change_is_the_latest_level(num_steps: int, part: float) -> None:
    """Wherever it happened, also between two blocks or within one: the latest level, and no trend beyond it."""
    old = int(part * num_steps)
    window_WYL = steps((old, BEFORE), (num_steps - old, AFTER))
    found = forecast(window_WYL)
    for level_YL in (found.load, found.first):
        assert np.abs(shares(level_YL) - AFTER / 100).max() < 0.005
    assert np.abs(shares(window_WYL.sum(axis=0)) - AFTER / 100).max() > 0.007


@pytest.mark.parametrize("part", [0.3, 0.5, 0.7])
def test_forecast_after_a_change_of_everything_begins_at_the_latest_level(part: float) -> None:
    old = int(100 * part)
    window_WYL = steps((old, BEFORE), (100 - old, BEFORE[::-1]))
    assert np.abs(shares(forecast(window_WYL).first) - BEFORE[::-1] / 100).max() < 0.01


@pytest.mark.parametrize("tokens", [1024, 65_536])
def test_forecast_of_a_trend_halves_the_error_of_the_mean(tokens: int) -> None:
    random = np.random.default_rng(0)
    start_L, end_L = random.dirichlet(np.ones(32), 2)
    load_WYL = np.array([random.multinomial(tokens, start_L + (end_L - start_L) * t / 200)[None] for t in range(200)])
    window_WYL, came_YL = load_WYL[:100], load_WYL[100:].sum(axis=0)
    assert forecast(window_WYL).error(came_YL) < 0.5 * plain_mean(window_WYL.sum(axis=0)).error(came_YL)


@pytest.mark.parametrize("at", [0, 37, 50, 99])
@pytest.mark.parametrize("length", [1, 12])
def test_forecast_after_a_burst_halves_the_error_of_the_mean(at: int, length: int) -> None:
    """One step, or as many as a block has, of which the first four of the window belong to none."""
    if length > 1:
        at = 4 + (at - 4) // 12 * 12 if at > 4 else 4
    window_WYL = synthetic_load("balanced", 100, 2, 16)
    came_YL = synthetic_load("balanced", 100, 2, 16, seed=1).sum(axis=0)
    window_WYL[at : at + length] = [60_000] + 15 * [369]
    error = forecast(window_WYL).error(came_YL)
    assert error < 0.5 * plain_mean(window_WYL.sum(axis=0)).error(came_YL)


def test_forecast_of_rotating_hot_experts_shrinks_towards_even() -> None:
    """They do rotate, so the level shrinks towards even; the first steps are still those of the latest ones."""
    window_WYL = synthetic_load("rotating", 125, 3, 32)[25:]
    found = forecast(window_WYL)
    latest_YL = shares(window_WYL[-5:].sum(axis=0))
    for layer in range(3):
        assert shares(found.load)[layer].max() < 0.06
        assert np.abs(shares(found.first)[layer] - latest_YL[layer]).max() < 0.02
        assert latest_YL[layer].max() > 0.12


def test_forecast_of_a_layer_without_tokens_is_zero() -> None:
    window_WYL = steps((10, BEFORE)).repeat(2, axis=1)
    window_WYL[:, 1] = 0
    found = forecast(window_WYL)
    for part in (found.load, found.first, found.spread):
        assert part.dtype == np.int64
        assert not part[1].any()
    assert np.array_equal(found.load[0], window_WYL.sum(axis=0)[0])
    assert not forecast(np.zeros((3, 1, 4), dtype=np.int64)).load.any()


@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_forecast_of_a_few_steps_is_the_mean_with_default_spread(num_steps: int) -> None:
    window_WYL = steps((num_steps, BEFORE))
    found, mean = forecast(window_WYL), plain_mean(window_WYL.sum(axis=0))
    assert np.array_equal(found.load, mean.load)
    assert np.abs(found.spread / found.load - 0.1).max() < 0.001


@pytest.mark.parametrize("num_steps", [1, 7, 100])
def test_forecast_of_huge_counts_does_not_overflow(num_steps: int) -> None:
    most = 2**62 // num_steps
    window_WYL = np.tile(np.array([most // 2, most // 4, most // 8, 0]), (num_steps, 1, 1))
    for found in (forecast(window_WYL), plain_mean(window_WYL.sum(axis=0))):
        assert (found.load >= 0).all()
        assert np.allclose(found.load, window_WYL.sum(axis=0), rtol=1e-12)
        assert (found.spread >= 0).all()
        assert (found.spread <= found.load).all()


windows = st.tuples(st.integers(1, 30), st.integers(1, 3), st.integers(1, 8)).flatmap(
    lambda shape: arrays(np.int64, shape, elements=st.one_of(st.integers(0, 3), st.integers(0, 10**6)))
)


@settings(max_examples=300)
@given(windows)
@example(np.eye(5, dtype=np.int64)[:, None])
@example(1000 * np.eye(5, dtype=np.int64)[:, None])
def test_forecast_of_any_window_is_whole_numbers_of_its_sum(window_WYL: np.ndarray) -> None:
    given_WYL = window_WYL.copy()
    found, again = forecast(window_WYL), forecast(window_WYL)
    assert np.array_equal(window_WYL, given_WYL)
    sum_Y = window_WYL.sum(axis=(0, 2))
    for part, repeated in zip(parts(found), parts(again), strict=True):
        assert part.dtype == np.int64
        assert part.shape == window_WYL.shape[1:]
        assert part.min() >= 0
        assert np.array_equal(part, repeated)
    for part in (found.load, found.first):
        assert np.abs(part.sum(axis=1) - sum_Y).max() <= window_WYL.shape[2] / 2
    assert (found.spread <= found.first / 2).all()


@settings(max_examples=100)
@given(windows, st.randoms(use_true_random=False))
def test_forecast_of_layers_in_another_order_is_the_same(window_WYL: np.ndarray, random) -> None:
    order = random.sample(range(window_WYL.shape[1]), window_WYL.shape[1])
    for part, shuffled in zip(parts(forecast(window_WYL)), parts(forecast(window_WYL[:, order])), strict=True):
        assert np.array_equal(part[order], shuffled)


@settings(max_examples=100)
@given(windows, st.integers(2, 5))
def test_forecast_with_idle_layers_changes_nothing_in_the_others(window_WYL: np.ndarray, more: int) -> None:
    assume(window_WYL.any())
    wider_WYL = np.concatenate([window_WYL, np.zeros((len(window_WYL), more, window_WYL.shape[2]), np.int64)], axis=1)
    found, wider = forecast(window_WYL), forecast(wider_WYL)
    assert np.array_equal(wider.load[:-more], found.load)
    assert found.error(window_WYL[0]) == pytest.approx(wider.error(wider_WYL[0]))


def parts(found: Forecast) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return found.load, found.first, found.spread


def test_error_of_known_loads_equals_values_by_hand() -> None:
    expected = plain_mean(np.array([[30, 10], [1, 1], [0, 0]]))
    assert expected.error(np.array([[3, 1], [7, 7], [0, 0]])) == 0.0  # shares count, not tokens
    assert expected.error(np.array([[0, 4], [0, 0], [5, 5]])) == pytest.approx((2 * 0.75**2) ** 0.5)  # only layer 0
    assert expected.error(np.array([[0, 4], [1, 1], [0, 0]])) == pytest.approx((2 * 0.75**2) ** 0.5 / 2)
    assert expected.error(np.zeros((3, 2))) == 0.0
    assert plain_mean(np.zeros((3, 2))).error(np.ones((3, 2))) == 0.0


def test_plain_mean_of_any_load_has_spread_in_proportion() -> None:
    load_YL = np.array([[0, 1, 10, 1000, 10_240, 2**60]])
    assert np.allclose(plain_mean(load_YL).spread, 0.1 * load_YL, rtol=0.01, atol=1)
    assert plain_mean(load_YL, 0.5).spread.tolist() == [[0, 0, 5, 500, 5120, 2**59]]
    assert not plain_mean(load_YL, 0.0).spread.any()


def mean_errors(load_WYL: np.ndarray, interval: int) -> tuple[float, float]:
    """Of the forecast and of the plain mean, over the intervals that decisions are made for."""
    errors = []
    for end in range(interval // 4, len(load_WYL) - interval + 1, interval):
        window_WYL, came_YL = load_WYL[max(0, end - 100) : end], load_WYL[end : end + interval].sum(axis=0)
        errors.append((forecast(window_WYL).error(came_YL), plain_mean(window_WYL.sum(axis=0)).error(came_YL)))
    ours, mean = np.mean(errors, axis=0)
    return float(ours), float(mean)


@pytest.mark.parametrize("name", SYNTHETIC_LOADS)
def test_forecast_of_synthetic_load_is_not_worse_than_the_mean(name: str) -> None:
    loads = [synthetic_load(name, 325, 4, 64, tokens_per_step=524_288, seed=seed) for seed in range(4)]
    ours, mean = np.mean([mean_errors(load_WYL, 100) for load_WYL in loads], axis=0)
    assert ours <= 1.005 * mean


def test_forecast_of_recorded_load_is_better_than_the_mean() -> None:
    ours, mean = mean_errors(read_trace(TRACE), 50)
    assert ours < mean


@pytest.mark.parametrize("name", ["drift-10", "drift-30"])
def test_forecast_of_drifting_load_is_better_than_the_mean(name: str) -> None:
    ours, mean = mean_errors(synthetic_load(name, 325, 4, 64, seed=1), 100)
    assert ours < 0.6 * mean


@pytest.mark.parametrize(
    "steps", [np.ones((2, 3), dtype=int), np.ones((0, 1, 2), dtype=int), np.ones((2, 1, 2)), -np.ones((2, 1, 2), int)]
)
def test_forecast_of_invalid_steps_raises(steps: np.ndarray) -> None:
    with pytest.raises(ValueError, match="steps_WYL"):
        forecast(steps)
