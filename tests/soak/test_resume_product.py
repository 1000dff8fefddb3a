"""A run goes on elsewhere: every kind of checkpoint, under every strategy, on all ranks and redundancies."""

from pathlib import Path

import pytest

from tests import test_resume
from tests.test_resume import TABLE, half
from tests.workers import Workers

__all__ = ["half"]


@pytest.mark.parametrize(("half", "kind", "ranks", "redundant"), TABLE, indirect=["half"])
def test_resume_from_each_to_each_trains_as_uninterrupted(
    half: Path, kind: str, ranks: int, redundant: int, workers: Workers
) -> None:
    test_resume.test_resume_under_other_settings_trains_as_uninterrupted(half, kind, ranks, redundant, workers)
