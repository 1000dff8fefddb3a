"""Forecast the next interval's load from the steps of the window.

Shape suffixes: ``W`` steps, ``B`` blocks of steps, ``Y`` MoE layers, ``L`` logical experts.
"""

from dataclasses import dataclass

import numpy as np

NUM_BLOCKS = 8
"""Parts that the window is cut into, all of the same number of steps."""
UNKNOWN_SPREAD = 0.1
"""The standard deviation that is taken where the window is too short to tell, in parts of an expert's load."""
MOST_SPREAD = 0.5
OUT_OF_LINE = 8.0
"""Standard deviations of noise by which a single block must differ from all others to be brought into line."""


@dataclass(frozen=True, eq=False)
class Forecast:
    """The expected load of an interval.

    Attributes:
        load: Tokens of each expert on the mean of the interval, int64 ``[Y, L]``; a layer's sum is about that of the
            window.
        first: The same for the interval's first steps, which are known best. It differs from ``load`` where hot
            experts come and go: they are still hot then, and nobody knows yet which ones follow. So there is nothing
            better to plan for.
        spread: How far the load may be from that, as a standard deviation of each expert, int64 ``[Y, L]``.
    """

    load: np.ndarray
    first: np.ndarray
    spread: np.ndarray

    def error(self, load_YL: np.ndarray) -> float:
        """Compare with the load that came: root of the sum of squares, 0 if all shares were right.

        Shares of the experts are compared, in parts of the load: ``sqrt(sum (share - expected)**2 / sum share**2)``,
        averaged over layers. 1 is as far off as to expect nothing at all.

        Args:
            load_YL: What the interval brought, ``[Y, L]``, of any number of steps. Layers without tokens do not count.
        """
        load_YL = np.asarray(load_YL)
        known = (self.load.sum(axis=1) > 0) & (load_YL.sum(axis=1) > 0)
        if not known.any():
            return 0.0
        expected, came = (part[known] / part[known].sum(axis=1, keepdims=True) for part in (self.load, load_YL))
        return float(np.sqrt(((expected - came) ** 2).sum(axis=1) / (came**2).sum(axis=1)).mean())


def forecast(steps_WYL: np.ndarray) -> Forecast:
    """Forecast each layer's load from the window's steps.

    The window is cut into blocks. A local level model (Harvey 1989: a random walk seen through noise) says how much
    of the change from block to block is noise and how much lasts; both parts are estimated from the differences of
    successive blocks and their covariance. So the level is the plain mean where nothing lasting happened, and nearly
    the latest block where the router changes its mind. How much of the first half's level the second half kept then
    says how far to trust it: what was not kept is replaced by an even load, which is the best guess where hot experts
    come and go. A trend is followed as far as the first half's would have helped to forecast the second. A single
    block out of line with all others is brought into line first.

    Args:
        steps_WYL: Tokens of each expert in each step, int64, oldest first; at least one step.

    Returns:
        Whole numbers that are the same on every machine.

    Raises:
        ValueError: There is no step, or it does not hold whole numbers ``[W, Y, L]`` from zero up.
    """
    steps_WYL = np.asarray(steps_WYL)
    if steps_WYL.ndim != 3 or not len(steps_WYL) or steps_WYL.dtype.kind not in "iu" or steps_WYL.min(initial=0) < 0:
        raise ValueError(
            f"steps_WYL has shape {list(steps_WYL.shape)} and dtype {steps_WYL.dtype}; it must be [steps, layers,"
            " experts], at least one step, whole numbers from zero up"
        )
    steps_WYL = np.ascontiguousarray(steps_WYL, dtype=np.int64)
    blocks = min(NUM_BLOCKS, len(steps_WYL))
    length = len(steps_WYL) // blocks
    blocks_BYL = steps_WYL[len(steps_WYL) - blocks * length :].reshape(blocks, length, *steps_WYL.shape[1:]).sum(axis=1)
    has_tokens_BY = blocks_BYL.any(axis=2)
    load_YL = steps_WYL.sum(axis=0)  # of layers without tokens, or with some only in steps that fill no block
    first_YL, spread_YL = load_YL.copy(), (load_YL * UNKNOWN_SPREAD).astype(np.int64)
    for pattern_B in np.unique(has_tokens_BY, axis=1).T:  # mostly there is one: all blocks of all layers have tokens
        if pattern_B.any():
            of_Y = np.flatnonzero((has_tokens_BY == pattern_B[:, None]).all(axis=0))
            parts = _forecast(blocks_BYL[pattern_B][:, of_Y], load_YL[of_Y])
            load_YL[of_Y], first_YL[of_Y], spread_YL[of_Y] = parts
    return Forecast(load_YL, first_YL, spread_YL)


def sub_windows(steps_WYL: np.ndarray, most: int = 3) -> np.ndarray:
    """Cut the window into blocks, as :func:`forecast` does, and return the latest: real changes, with their covariance.

    Args:
        steps_WYL: Tokens of each expert in each step, int64, oldest first; at least one step.
        most: Blocks to return.

    Returns:
        Tokens of each expert in each block, oldest first, int64 ``[B, Y, L]``; none where there is one step only.
    """
    blocks = min(NUM_BLOCKS, len(steps_WYL)) if len(steps_WYL) > 1 else 0
    length = len(steps_WYL) // max(blocks, 1)
    latest = steps_WYL[len(steps_WYL) - min(most, blocks) * length :]
    return latest.reshape(min(most, blocks), length, *steps_WYL.shape[1:]).sum(axis=1)


def plain_mean(load_YL: np.ndarray, spread: float = UNKNOWN_SPREAD) -> Forecast:
    """Forecast from the window's sum alone: the same again, give or take ``spread`` of it."""
    load_YL = np.ascontiguousarray(load_YL, dtype=np.int64)
    return Forecast(
        load_YL, load_YL, load_YL // 1024 * int(1024 * spread) + load_YL % 1024 * int(1024 * spread) // 1024
    )


def _forecast(blocks_BYL: np.ndarray, window_YL: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Forecast layers whose blocks all have tokens. Returns load, first steps' load and spread, int64 ``[Y, L]``."""
    blocks, _, experts = blocks_BYL.shape
    tokens_BY1 = blocks_BYL.sum(axis=2, keepdims=True)
    share_BYL = blocks_BYL / tokens_BY1
    noise_Y1 = (1.0 / tokens_BY1).sum(axis=0) / blocks  # a block's variance, were each token drawn by itself
    window_Y1 = window_YL.sum(axis=1, keepdims=True)
    share_BYL, is_straight_YL = straighten(share_BYL, noise_Y1)
    gain_noise_Y1, lasting_Y1 = estimate_changes(share_BYL, noise_Y1)
    level_YL = filter_level(share_BYL, gain_noise_Y1, lasting_Y1)
    level_YL = np.where((lasting_Y1 == 0.0) & is_straight_YL, window_YL / window_Y1, level_YL)
    even = 1.0 / experts
    kept_Y1, is_signal_Y1, drift_Y1, spread_Y1 = 1.0, True, 0.0, UNKNOWN_SPREAD
    if blocks >= 4:
        kept_Y1, is_signal_Y1, drift_Y1, spread_Y1 = backtest(share_BYL, gain_noise_Y1, lasting_Y1)
    trend_YL = drift_Y1 * slope(share_BYL) * (blocks + 1) / 2
    first_YL = scale_to(np.maximum(np.where(is_signal_Y1, level_YL, even) + trend_YL, 0.0), window_Y1)
    load_YL = scale_to(np.maximum(even + kept_Y1 * (level_YL - even) + trend_YL, 0.0), window_Y1)
    return load_YL, first_YL, (first_YL * spread_Y1).astype(np.int64)


def total(values_YL: np.ndarray) -> np.ndarray:
    """Sum over experts, ``[..., 1]``, one addition after the other: the same bits on every machine."""
    return values_YL.cumsum(axis=-1)[..., -1:]


def scale_to(share_YL: np.ndarray, tokens_Y1: np.ndarray) -> np.ndarray:
    """Return whole numbers in proportion to the shares, that sum to about ``tokens_Y1``."""
    rest_Y1 = total(share_YL)
    return (_ratio(share_YL, rest_Y1) * tokens_Y1 + 0.5).astype(np.int64)


def straighten(share_BYL: np.ndarray, noise_Y1: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bring a block that is far above or below all others to the next one's share, where there are enough to tell.

    Where that would take half of all tokens or more, they are what there is, and nothing is out of line.

    Returns:
        The shares, and which experts were in line, bool ``[Y, L]``.
    """
    if len(share_BYL) < 5:
        return share_BYL, np.ones(share_BYL.shape[1:], dtype=bool)
    low_YL, second_low_YL, second_high_YL, high_YL = np.sort(share_BYL, axis=0)[[0, 1, -2, -1]]
    is_high_YL = high_YL - second_high_YL > OUT_OF_LINE * np.sqrt(noise_Y1 * high_YL)
    is_low_YL = second_low_YL - low_YL > OUT_OF_LINE * np.sqrt(noise_Y1 * second_low_YL)
    straight_BYL = np.where(is_high_YL, np.minimum(share_BYL, second_high_YL), share_BYL)
    straight_BYL = np.where(is_low_YL, np.maximum(straight_BYL, second_low_YL), straight_BYL)
    is_most_Y1 = total(straight_BYL).sum(axis=0) >= 0.5 * len(share_BYL)
    return np.where(is_most_Y1, straight_BYL, share_BYL), ~is_most_Y1 | ~(is_high_YL | is_low_YL)


def estimate_changes(share_BYL: np.ndarray, noise_Y1: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Estimate the variances of a block's noise and of a change that lasts, in units of the expert's mean share."""
    blocks, _, experts = share_BYL.shape
    if blocks < 3:
        return noise_Y1, np.zeros_like(noise_Y1)
    mean_YL = share_BYL.sum(axis=0) / blocks
    mean_YL[mean_YL == 0.0] = 1.0  # an expert without tokens has no changes either
    change_BYL = np.diff(share_BYL, axis=0)
    squares_Y1 = total(change_BYL * change_BYL / mean_YL).sum(axis=0) / (experts * (blocks - 1))
    products_Y1 = total(change_BYL[1:] * change_BYL[:-1] / mean_YL).sum(axis=0) / (experts * (blocks - 2))
    gain_noise_Y1 = np.maximum(-products_Y1, noise_Y1)
    lasting_Y1 = squares_Y1 - 2.0 * gain_noise_Y1
    # So much comes of the noise itself, the more the fewer changes there are to tell from.
    is_noise_Y1 = lasting_Y1 < max(0.1, 4.0 / np.sqrt(experts * (blocks - 1.0))) * gain_noise_Y1
    return gain_noise_Y1, np.where(is_noise_Y1, 0.0, lasting_Y1)


def filter_level(share_BYL: np.ndarray, noise_Y1: np.ndarray, lasting_Y1: np.ndarray) -> np.ndarray:
    """Filter the level of the local level model (Kalman), the same gains for all experts of a layer."""
    variance_Y1, level_YL = noise_Y1, share_BYL[0]
    for share_YL in share_BYL[1:]:
        variance_Y1 = variance_Y1 + lasting_Y1
        gain_Y1 = variance_Y1 / (variance_Y1 + noise_Y1)
        variance_Y1 = variance_Y1 * (1.0 - gain_Y1)
        level_YL = level_YL + gain_Y1 * (share_YL - level_YL)
    return level_YL


def slope(share_BYL: np.ndarray) -> np.ndarray:
    """Return the change of each expert's share from block to block, by least squares."""
    offset_B11 = (np.arange(len(share_BYL)) - (len(share_BYL) - 1) / 2.0)[:, None, None]
    return (offset_B11 * share_BYL).sum(axis=0) / max((offset_B11 * offset_B11).sum(), 0.5)


def backtest(
    share_BYL: np.ndarray, noise_Y1: np.ndarray, lasting_Y1: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Forecast the second half from the first: how much of the level was kept, of the trend, and how far it was off.

    Returns:
        The part of an expert's distance from an even share that lasts, 0 to 1; whether that distance is more than
        noise at all; the part of a trend that goes on, 0 to 1; and the standard deviation of an expert's load, in
        parts of it. Each ``[Y, 1]``.
    """
    blocks, _, experts = share_BYL.shape
    half, even = blocks // 2, 1.0 / experts
    level_YL = filter_level(share_BYL[:half], noise_Y1, lasting_Y1)
    later_YL = share_BYL[half:].sum(axis=0) / (blocks - half)
    both_Y1 = total((later_YL - even) * (level_YL - even))
    own_Y1 = total((level_YL - even) * (level_YL - even))
    is_signal_Y1 = own_Y1 > 2.0 * noise_Y1 / half  # more than what noise alone makes the level differ from even by
    kept_Y1 = np.clip(_ratio(both_Y1, own_Y1), 0.0, 1.0)
    kept_Y1 = np.where(is_signal_Y1 & (kept_Y1 > 0.85), 1.0, kept_Y1) ** 2  # twice as far ahead
    ahead = (blocks + 1) / 2.0
    trend_YL, miss_YL = slope(share_BYL[:half]) * ahead, later_YL - level_YL
    along_Y1, steep_Y1 = total(miss_YL * trend_YL), total(trend_YL * trend_YL)
    # A step at the end of the first half looks like a trend to it; the second half then has none.
    goes_on_Y1 = total(slope(share_BYL[half:]) * ahead * trend_YL)
    drift_Y1 = np.clip(_ratio(np.minimum(along_Y1, goes_on_Y1), steep_Y1), 0.0, 1.0)
    squares_Y1 = total(miss_YL * miss_YL)
    wrong_Y1 = total((miss_YL - drift_Y1 * trend_YL) ** 2)
    excess_Y1 = np.maximum(squares_Y1 - noise_Y1 * (1.0 / half + 1.0 / (blocks - half)), 0.0)
    spread_Y1 = np.sqrt(_ratio(2.0 * excess_Y1, total(level_YL * level_YL)))
    drift_Y1 = np.where(wrong_Y1 > 0.8 * squares_Y1, 0.0, drift_Y1)
    return kept_Y1, is_signal_Y1, drift_Y1, np.minimum(spread_Y1, MOST_SPREAD)


def _ratio(above_YL: np.ndarray, below_Y1: np.ndarray) -> np.ndarray:
    """Divide; 0 where there is nothing to divide by."""
    return np.where(below_Y1 > 0.0, above_YL / np.where(below_Y1 > 0.0, below_Y1, 1.0), 0.0)
