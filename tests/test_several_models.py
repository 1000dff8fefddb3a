"""Several models, and layers with different numbers of experts, in one balancer: the same training."""

from pathlib import Path
from typing import Any

import pytest

from lightning_eplb.logging.loggers import HISTOGRAM, PICTURES, TABLE, of_model
from lightning_eplb.logging.scalars import BY_MODEL, SCALARS
from lightning_eplb.simulation.trace import read_trace
from tests.fidelity import TOLERANCE, largest_difference
from tests.logging.offline_run import read_history, run_dirs
from tests.several import SEQUENCES, STEPS, Several, distributed, logged, reference, resumed
from tests.workers import Workers

CASES = [
    Several("pair", redundant=2, clips=True),
    Several("pair", redundant=2, redundancy="batch", use_async=True),
    Several("uneven", redundant=2, redundancy="batch", use_async=True, clips=True),
    Several("hybrid", redundant=2, clips=True),
    Several("pair", redundant=2, clips=True, is_sharded=True),
    Several("alternating", redundant=2),
    Several("teachers", redundant=2, clips=True),
]
MORE = [
    Several("teachers", redundant=2, ranks=4, ep_size=2),
    Several("alternating", use_async=True),
    Several("uneven", redundant=2, is_sharded=True, clips=True),
    Several("uneven", redundant=2, ranks=4, ep_size=2, use_async=True),
    Several("alternating", redundant=2, ranks=4, ep_size=2),
    Several("pair", redundant=4, ranks=4, ep_size=2, redundancy="batch", clips=True, use_async=True),
    Several("hybrid", redundant=4, ranks=4, use_async=True),
    Several("hybrid", redundant=2, is_sharded=True, redundancy="batch"),
    Several("teachers", use_async=True),
]
TOKENS = SEQUENCES * 8
"""Of a rank in a step: sequences of 8."""
EXPECTED: dict[str, Any] = {
    "pair": {"shapes": {"main": (2, 8), "draft": (1, 16)}, "steps": {"main": STEPS, "draft": STEPS}},
    "uneven": {"shapes": {"main": (2, 7), "draft": (1, 5)}, "steps": {"main": STEPS, "draft": STEPS}},
    "hybrid": {
        "shapes": {"model-8-experts": (2, 8), "model-16-experts": (1, 16)},
        "steps": {"model-8-experts": STEPS, "model-16-experts": STEPS},
    },
    # The draft has tokens in its own steps and in every other one of the main model.
    "alternating": {
        "shapes": {"main": (2, 8), "draft": (1, 16)},
        "steps": {"main": STEPS // 2, "draft": 3 * STEPS // 4},
    },
    "teachers": {
        "shapes": {"student": (2, 8), "large": (1, 16), "small": (2, 1)},
        "steps": {"student": STEPS, "large": STEPS, "small": STEPS},
    },
}


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in MORE)], ids=str)
def test_training_of_several_models_with_moving_experts_equals_one_process(case: Several, workers: Workers) -> None:
    answers = workers.run(case.ranks, distributed, case, seconds=120)
    assert largest_difference(reference(case), [outcome for outcome, _ in answers]) < TOLERANCE
    for _, told in answers:
        assert told["rearrangements"] >= (STEPS // 4 if case.use_async else STEPS)
        assert told["bytes"] > 0
        assert {key: told[key] for key in ("shapes", "steps")} == EXPECTED[case.kind]
        assert told["moved"] == {name: name != "small" for name in told["shapes"]}
        for name, (layers, _) in told["shapes"].items():
            top_k = 1 if name == "small" else 2
            assert told["tokens"][name] == told["steps"][name] * layers * case.ranks * TOKENS * top_k


@pytest.mark.parametrize("kind", ["alternating", "teachers"])
def test_resumed_training_of_several_models_equals_one_process(kind: Any, workers: Workers, tmp_path: Path) -> None:
    case = Several(kind, redundant=2)
    outcomes = workers.run(2, resumed, case, str(tmp_path), seconds=120)
    assert largest_difference(reference(case), outcomes) < TOLERANCE
    files = {path.name: read_trace(path).shape for path in tmp_path.glob("*.npy")}
    if kind == "teachers":
        student = {"trace.student.npy": (STEPS, 2, 8)}
        assert files == student | {"trace.large.npy": (STEPS, 1, 16), "trace.small.npy": (STEPS, 2, 1)}
    else:
        assert files == {"trace.main.npy": (STEPS // 2, 2, 8), "trace.draft.npy": (3 * STEPS // 4, 1, 16)}


def test_logs_of_several_models_have_sums_and_each_model(workers: Workers, tmp_path: Path) -> None:
    workers.run(2, logged, Several("alternating", redundant=2), str(tmp_path), seconds=120)
    (run_dir,) = run_dirs(tmp_path / "rank0")
    history = [{name for name in row if name.startswith("eplb/")} for row in read_history(run_dir)]
    names = set().union(*history)
    sums = set(SCALARS) - {f"eplb/{name}" for name in BY_MODEL} | {
        f"eplb/{name}"
        for name in BY_MODEL
        if name not in ("balancedness_layers/A-B", "forecast_error", "hottest_expert", "dead_experts", "entropy")
    }
    each = {*(f"eplb/{name}" for name in BY_MODEL if "A-B" not in name), *PICTURES, HISTOGRAM, TABLE}
    expected = sums | {of_model(name, f"{model}/") for name in each for model in ("main", "draft")}
    expected |= {f"eplb/main/balancedness_layers/{layer}-{layer}" for layer in (0, 1)}
    assert names == expected
    # The draft is first called in the second step. A model that rests keeps the values of its latest step.
    assert sum("eplb/main/balancedness" in row for row in history) == STEPS
    assert sum("eplb/draft/balancedness" in row for row in history) == STEPS - 1
