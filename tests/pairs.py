"""All pairs of settings in few cases."""

from collections.abc import Mapping, Sequence
from itertools import combinations, product
from typing import Any

Setting = tuple[str, Any]


def all_pairs(settings: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Cases in which every two settings meet: greedily the one of the full product that brings most new pairs."""
    cases = [dict(zip(settings, values, strict=True)) for values in product(*settings.values())]
    missing = {pair for case in cases for pair in _pairs(case)}
    chosen = []
    while missing:
        best = max(cases, key=lambda case: len(missing & _pairs(case)))
        missing -= _pairs(best)
        chosen.append(best)
    return chosen


def _pairs(case: Mapping[str, Any]) -> set[tuple[Setting, Setting]]:
    return set(combinations(case.items(), 2))
