"""The full product of the settings of ``tests/test_fidelity.py``: ``pytest tests/soak`` (an hour)."""

from itertools import product

import pytest

from tests.fidelity import TOLERANCE, Case, distributed, largest_difference, reference
from tests.test_fidelity import SETTINGS
from tests.workers import Workers

OTHERS = {name: values for name, values in SETTINGS.items() if name != "parts"}
PRODUCT = [
    Case(**dict(zip(OTHERS, values, strict=True)), parts=1 + i % 2)
    for i, values in enumerate(product(*OTHERS.values()))
]
CASES = [case for case in PRODUCT if case.redundant or case.redundancy == "window"]
"""Without redundant slots a batch has nothing to choose."""


@pytest.mark.parametrize("case", sorted(CASES, key=lambda case: case.ranks), ids=str)
def test_training_with_all_settings_equals_one_process(case: Case, workers: Workers) -> None:
    assert largest_difference(reference(case), workers.run(case.ranks, distributed, case)) < TOLERANCE
