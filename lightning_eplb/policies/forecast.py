"""What the next interval's load will look like, from the steps of the window.

Shape suffixes: ``W`` steps, ``B`` blocks of steps, ``Y`` MoE layers, ``L`` logical experts.
"""

from dataclasses import dataclass

import numpy as np

from lightning_eplb._compiled import compiled

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
        """How far the load was from what was expected: the root of the squares' sum, 0 where all shares are right.

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
    load_YL, first_YL, spread_YL = (np.empty(steps_WYL.shape[1:], dtype=np.int64) for _ in range(3))
    _forecast(steps_WYL, load_YL, first_YL, spread_YL)
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
    """The forecast of who knows the window's sum only: the same again, give or take ``spread`` of it."""
    load_YL = np.ascontiguousarray(load_YL, dtype=np.int64)
    return Forecast(
        load_YL, load_YL, load_YL // 1024 * int(1024 * spread) + load_YL % 1024 * int(1024 * spread) // 1024
    )


@compiled
def _forecast(steps_WYL: np.ndarray, load_YL: np.ndarray, first_YL: np.ndarray, spread_YL: np.ndarray) -> None:
    steps, layers, experts = steps_WYL.shape
    blocks = min(NUM_BLOCKS, steps)
    length = steps // blocks
    first = steps - blocks * length  # the oldest steps are left out where they do not fill a block
    share_BL = np.empty((blocks, experts))
    level_L, half_L = np.empty(experts), np.empty(experts)
    is_straight_L = np.empty(experts, dtype=np.bool_)
    for layer in range(layers):
        noise = 0.0  # variance of a block's share in units of the share, were each token drawn by itself
        filled = 0
        for block in range(blocks):
            for expert in range(experts):
                share_BL[filled, expert] = 0.0
            tokens = 0.0
            for step in range(first + block * length, first + (block + 1) * length):
                for expert in range(experts):
                    share_BL[filled, expert] += steps_WYL[step, layer, expert]
                    tokens += steps_WYL[step, layer, expert]
            if tokens > 0:
                for expert in range(experts):
                    share_BL[filled, expert] /= tokens
                noise += 1.0 / tokens
                filled += 1
        window = 0.0
        for step in range(steps):
            for expert in range(experts):
                window += steps_WYL[step, layer, expert]
        if filled == 0:  # no tokens, or in the oldest steps only, which no block holds
            for expert in range(experts):
                load_YL[layer, expert] = 0
                for step in range(first):
                    load_YL[layer, expert] += steps_WYL[step, layer, expert]
                first_YL[layer, expert] = load_YL[layer, expert]
                spread_YL[layer, expert] = np.int64(load_YL[layer, expert] * UNKNOWN_SPREAD)
            continue
        noise /= filled
        straighten(share_BL, filled, noise, is_straight_L)
        gain_noise, lasting = estimate_changes(share_BL, filled, noise)
        filter_level(share_BL, 0, filled, gain_noise, lasting, level_L)
        for expert in range(experts):
            if lasting == 0.0 and is_straight_L[expert]:
                level_L[expert] = 0.0
                for step in range(steps):
                    level_L[expert] += steps_WYL[step, layer, expert]
                level_L[expert] /= window
        even = 1.0 / experts
        kept, is_signal, drift, spread = 1.0, True, 0.0, UNKNOWN_SPREAD
        if filled >= 4:
            half = filled // 2
            filter_level(share_BL, 0, half, gain_noise, lasting, half_L)
            kept, is_signal, drift, spread = backtest(share_BL, half, filled, half_L, gain_noise, lasting)
        for expert in range(experts):
            trend = drift * slope(share_BL, 0, filled, expert) * (filled + 1) / 2
            half_L[expert] = max((level_L[expert] if is_signal else even) + trend, 0.0)
            level_L[expert] = max(even + kept * (level_L[expert] - even) + trend, 0.0)
        scale_to(level_L, window, load_YL[layer])
        scale_to(half_L, window, first_YL[layer])
        for expert in range(experts):
            spread_YL[layer, expert] = np.int64(first_YL[layer, expert] * spread)


@compiled
def scale_to(share_L: np.ndarray, total: float, load_L: np.ndarray) -> None:
    """Fill ``load_L`` with whole numbers in proportion to the shares, that sum to about ``total``."""
    rest = 0.0
    for share in share_L:
        rest += share
    for expert in range(share_L.size):
        load_L[expert] = np.int64(share_L[expert] / rest * total + 0.5) if rest > 0.0 else np.int64(0)


@compiled
def straighten(share_BL: np.ndarray, blocks: int, noise: float, is_straight_L: np.ndarray) -> None:
    """Bring a block that is far above or below all others to the next one's share, where there are enough to tell.

    Where that would take half of all tokens or more, they are what there is, and nothing is out of line.
    """
    is_straight_L[:] = True
    if blocks < 5:
        return
    as_they_were_BL = share_BL.copy()
    for expert in range(share_BL.shape[1]):
        low = second_low = 2.0
        high = second_high = -1.0
        at_low = at_high = 0
        for block in range(blocks):
            share = share_BL[block, expert]
            if share < low:
                second_low, low, at_low = low, share, block
            elif share < second_low:
                second_low = share
            if share > high:
                second_high, high, at_high = high, share, block
            elif share > second_high:
                second_high = share
        if high - second_high > OUT_OF_LINE * np.sqrt(noise * high):
            share_BL[at_high, expert] = second_high
            is_straight_L[expert] = False
        if second_low - low > OUT_OF_LINE * np.sqrt(noise * second_low):
            share_BL[at_low, expert] = second_low
            is_straight_L[expert] = False
    left = 0.0
    for block in range(blocks):
        for expert in range(share_BL.shape[1]):
            left += share_BL[block, expert]
    if left < 0.5 * blocks:
        share_BL[:] = as_they_were_BL
        is_straight_L[:] = True


@compiled
def estimate_changes(share_BL: np.ndarray, blocks: int, noise: float) -> tuple[float, float]:
    """The variances of a block's noise and of a change that lasts, both in units of the expert's mean share."""
    if blocks < 3:
        return noise, 0.0
    experts = share_BL.shape[1]
    squares = products = 0.0
    for expert in range(experts):
        mean = 0.0
        for block in range(blocks):
            mean += share_BL[block, expert]
        mean /= blocks
        if mean <= 0.0:
            continue
        for block in range(1, blocks):
            change = share_BL[block, expert] - share_BL[block - 1, expert]
            squares += change * change / mean
            if block > 1:
                products += change * (share_BL[block - 1, expert] - share_BL[block - 2, expert]) / mean
    squares /= experts * (blocks - 1)
    products /= experts * (blocks - 2)
    gain_noise = max(-products, noise)
    lasting = squares - 2.0 * gain_noise
    if lasting < max(0.1, 4.0 / np.sqrt(experts * (blocks - 1.0))) * gain_noise:
        lasting = 0.0  # so much comes of the noise itself, the more the fewer changes there are to tell from
    return gain_noise, lasting


@compiled
def filter_level(share_BL: np.ndarray, start: int, end: int, noise: float, lasting: float, level_L: np.ndarray) -> None:
    """Kalman filter of the local level model, the same gains for all experts."""
    variance = noise
    for expert in range(share_BL.shape[1]):
        level_L[expert] = share_BL[start, expert]
    for block in range(start + 1, end):
        variance += lasting
        gain = variance / (variance + noise) if variance + noise > 0.0 else 0.5
        variance *= 1.0 - gain
        for expert in range(share_BL.shape[1]):
            level_L[expert] += gain * (share_BL[block, expert] - level_L[expert])


@compiled
def slope(share_BL: np.ndarray, start: int, end: int, expert: int) -> float:
    """The change of an expert's share from block to block, by least squares."""
    middle = (start + end - 1) / 2.0
    above = below = 0.0
    for block in range(start, end):
        above += (block - middle) * share_BL[block, expert]
        below += (block - middle) * (block - middle)
    return above / below if below > 0.0 else 0.0


@compiled
def backtest(
    share_BL: np.ndarray, half: int, blocks: int, level_L: np.ndarray, noise: float, lasting: float
) -> tuple[float, bool, float, float]:
    """Forecast the second half from the first: how much of the level was kept, of the trend, and how far it was off.

    Returns:
        The part of an expert's distance from an even share that lasts, 0 to 1; whether that distance is more than
        noise at all; the part of a trend that goes on, 0 to 1; and the standard deviation of an expert's load, in
        parts of it.
    """
    experts = share_BL.shape[1]
    even = 1.0 / experts
    later = np.zeros(experts)
    for expert in range(experts):
        for block in range(half, blocks):
            later[expert] += share_BL[block, expert]
        later[expert] /= blocks - half
    both = own = 0.0
    for expert in range(experts):
        both += (later[expert] - even) * (level_L[expert] - even)
        own += (level_L[expert] - even) * (level_L[expert] - even)
    unlike = noise / half  # what noise alone makes the level differ from even by, summed over experts
    kept = min(max(both / own, 0.0), 1.0) if own > 0.0 else 0.0
    is_signal = own > 2.0 * unlike
    if is_signal and kept > 0.85:
        kept = 1.0
    kept *= kept  # twice as far ahead
    ahead = (half + blocks - half + 1) / 2.0
    along = steep = goes_on = 0.0
    wrong = straight = 0.0
    for expert in range(experts):
        trend = slope(share_BL, 0, half, expert) * ahead
        miss = later[expert] - level_L[expert]
        along += miss * trend
        steep += trend * trend
        goes_on += slope(share_BL, half, blocks, expert) * ahead * trend
    # A step at the end of the first half looks like a trend to it; the second half then has none.
    drift = min(max(min(along, goes_on) / steep, 0.0), 1.0) if steep > 0.0 else 0.0
    squares = weights = 0.0
    for expert in range(experts):
        trend = slope(share_BL, 0, half, expert) * ahead
        miss = later[expert] - level_L[expert]
        straight += miss * miss
        wrong += (miss - drift * trend) * (miss - drift * trend)
        squares += miss * miss
        weights += level_L[expert] * level_L[expert]
    if wrong > 0.8 * straight:
        drift = 0.0
    excess = max(squares - noise * (1.0 / half + 1.0 / (blocks - half)), 0.0)
    spread = np.sqrt(2.0 * excess / weights) if weights > 0.0 else 0.0
    return kept, is_signal, drift, min(spread, MOST_SPREAD)
