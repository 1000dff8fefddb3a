"""Colour scales of a report, with labels of their levels.

The map is cividis: it looks the same with and without colour blindness, and brighter is more in print, too.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from lightning_eplb.logging.heatmap import COLOUR_LIMITS

NOTHING = "#c4c4c4"
"""Colour for no token. It does not occur in the map."""


@dataclass(frozen=True)
class Scale:
    """Levels of a value, each with a colour and a label.

    Attributes:
        name: Name of the scale within a page.
        values: Value of each level, ascending.
        words: Label of each level.
        ticks: Levels in the legend, with their labels.
        is_logarithmic: ``True`` for levels that are evenly spaced in their logarithm.
    """

    name: str
    values: np.ndarray
    words: tuple[str, ...]
    ticks: tuple[tuple[int, str], ...]
    is_logarithmic: bool = False

    @cached_property
    def colours(self) -> list[str]:
        """Colour of each level, ``#rrggbb``, all different, and :data:`NOTHING`."""
        from matplotlib import colormaps

        rgb = (255 * colormaps["cividis"](np.linspace(0, 1, len(self.values)))[:, :3]).round().astype(int)
        return [f"#{r:02x}{g:02x}{b:02x}" for r, g, b in rgb.tolist()] + [NOTHING]

    def levels(self, values: np.ndarray) -> np.ndarray:
        """Return the nearest level of each value, uint8; the number of levels for NaN."""
        first, last = self.values[0], self.values[-1]
        if self.is_logarithmic:
            with np.errstate(divide="ignore", invalid="ignore"):
                values = np.log(values)
            first, last = np.log(first), np.log(last)
        most = len(self.values) - 1
        scaled = (values - first) / (last - first) * most
        return np.where(np.isnan(values), most + 1, np.clip(np.nan_to_num(scaled.round()), 0, most)).astype(np.uint8)


def ratio_scale() -> Scale:
    """Return a scale from 0 to 1, for balancedness."""
    values = np.linspace(0, 1, 101)
    ticks = tuple((level, f"{values[level]:g}") for level in (0, 25, 50, 75, 100))
    return Scale("ratio", values, tuple(f"{value:.2f}" for value in values), ticks)


def share_scale(share: np.ndarray) -> Scale:
    """Return a logarithmic scale around 1 for tokens over the mean, wide enough for nearly all of ``share``."""
    limit = _limit(share, COLOUR_LIMITS)
    values = np.geomspace(1 / limit, limit, 97)
    words = [_times_even(value) for value in values]
    words[0], words[-1] = f"{1 / limit:.2g} times even or less", f"{limit:g} times even or more"
    ticks = ((0, f"1/{limit:g}"), (48, "1"), (96, f"{limit:g}"))
    return Scale("share", values, tuple(words), ticks, is_logarithmic=True)


def hottest_scale(share: np.ndarray) -> Scale:
    """Return a logarithmic scale from 1 up, for the hottest experts of layers."""
    limit = _limit(share, (2, 4, 8, 16, 32, 64, 128, 256))
    values = np.geomspace(1, limit, 97)
    words = [_times_even(value) for value in values]
    words[-1] = f"{limit:g} times even or more"
    middle = math.sqrt(limit)
    return Scale("hottest", values, tuple(words), ((0, "1"), (48, f"{middle:.2g}"), (96, f"{limit:g}")), True)


def _limit(share: np.ndarray, limits: Sequence[float]) -> float:
    """Return the first of ``limits`` above nearly all of ``share``."""
    known = share[np.isfinite(share)]
    largest = float(np.percentile(known, 99.5)) if len(known) else 1.0
    return next((limit for limit in limits if largest <= limit), limits[-1])


def _times_even(value: float) -> str:
    return f"{value:.3g} times even"


def nice_ticks(count: int, most: int) -> Sequence[int]:
    """Return at most ``most`` round numbers from 0 to below ``count``."""
    for step in (digit * 10**power for power in range(12) for digit in (1, 2, 4, 5, 8)):
        if (count - 1) // step + 1 <= most:
            return range(0, count, step)
    return range(1)
