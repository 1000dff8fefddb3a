"""Colours say what they should, and can be told apart and read back."""

import numpy as np
import pytest

from lightning_eplb.report.scales import NOTHING, Scale, hottest_scale, nice_ticks, ratio_scale, share_scale

SHARE = np.array([[0.0, 0.5, 1.0, 6.0, np.nan]])
SCALES = [ratio_scale(), share_scale(SHARE), hottest_scale(SHARE)]


@pytest.mark.parametrize("scale", SCALES, ids=lambda scale: scale.name)
def test_scale_levels_have_distinct_colours_that_grow_brighter(scale: Scale) -> None:
    assert len(set(scale.colours)) == len(scale.colours) == len(scale.values) + 1
    assert len(scale.words) == len(scale.values)
    assert scale.colours[-1] == NOTHING
    rgb = np.array([[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in scale.colours[:-1]])
    assert (np.diff(rgb @ [0.299, 0.587, 0.114]) > 0).all()
    assert scale.levels(scale.values).tolist() == list(range(len(scale.values)))


def test_scale_levels_beyond_ends_are_the_last() -> None:
    share = share_scale(SHARE)
    assert share.values[0] == pytest.approx(1 / 8)
    levels = share.levels(SHARE)[0]
    assert [share.words[level] for level in levels[:4]] == [
        "0.12 times even or less",
        "0.5 times even",
        "1 times even",
        share.words[levels[3]],
    ]
    assert levels[4] == len(share.values)
    assert share.words[share.levels(np.array(99.0))] == "8 times even or more"
    assert ratio_scale().words[ratio_scale().levels(np.array(0.254))] == "0.25"


@pytest.mark.parametrize("count", [1, 2, 7, 32, 61, 256, 10_001, 1_000_001])
def test_nice_ticks_of_any_count_are_few_and_start_at_zero(count: int) -> None:
    ticks = list(nice_ticks(count, 6))
    assert ticks[0] == 0
    assert ticks[-1] < count
    assert min(count, 3) <= len(ticks) <= 6
