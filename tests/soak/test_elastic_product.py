"""Nodes that end at more random steps than in ``tests/test_elastic.py``. Prints what was lost, and how long it took."""

from pathlib import Path

import pytest

from tests.test_elastic import check_node_that_ends


@pytest.mark.timeout(400)
@pytest.mark.parametrize("kind", ["ddp", "sharded"])
@pytest.mark.parametrize("ends_by", ["kill", "preempt"])
@pytest.mark.parametrize("seed", [1, 2])
def test_node_that_ends_at_another_step_leaves_others_training_as_uninterrupted(
    seed: int, ends_by: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = check_node_that_ends(kind, ends_by, seed, tmp_path)
    with capsys.disabled():
        print(f"\n{words}")
