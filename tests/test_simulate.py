"""The simulator counts as a run does, and the command line tells what does not fit."""

from pathlib import Path

import numpy as np
import pytest

from lightning_eplb import BalancedPolicy, StaticPolicy
from lightning_eplb.__main__ import main
from lightning_eplb.simulate import draw_over_time, replay, speed_up
from lightning_eplb.synthetic import SYNTHETIC_LOADS, synthetic_load
from lightning_eplb.trace import TraceWriter

SKEWED = np.tile(np.array([[[20, 16, 14, 10, 12, 12, 8, 8]]]), (20, 1, 1))


def test_counts_by_hand() -> None:
    static = replay(SKEWED, StaticPolicy(), num_ranks=2, step_interval=16)
    assert np.allclose(static.balancedness, 50 / 60)
    assert (static.rows_moved, len(static.planning_seconds), static.first_decided) == (0, 2, 4)
    balanced = replay(SKEWED, BalancedPolicy(), num_ranks=2, step_interval=16)
    assert np.allclose(balanced.balancedness[:4], 50 / 60)
    assert balanced.judged.min() > 0.95
    assert balanced.rows_moved in (2, 4, 6, 8)
    assert speed_up(balanced, static) == pytest.approx(60 / balanced.max_tokens[-1])


def test_steps_without_tokens_are_none() -> None:
    empty = replay(synthetic_load("empty", 10, 2, 8), BalancedPolicy(), num_ranks=2)
    assert (empty.rows_moved, len(empty.judged), empty.planning_seconds) == (0, 0, ())


def test_a_policy_is_asked_with_the_window_alone() -> None:
    class Asked(StaticPolicy):
        sums: list[int] = []  # noqa: RUF012

        def rearrange(self, load_YL, placement, topology):
            self.sums.append(int(load_YL.sum()))
            return placement

    for window_size in (1, 3):
        Asked.sums.clear()
        replay(SKEWED, Asked(), num_ranks=2, window_size=window_size, step_interval=8)
        assert Asked.sums == [100 * min(2, window_size), 100 * window_size, 100 * window_size]


@pytest.mark.parametrize("name", SYNTHETIC_LOADS)
def test_synthetic_loads_have_their_tokens(name: str) -> None:
    load_WYL = synthetic_load(name, 120, 2, 16, tokens_per_step=1000, num_ranks=4, interval=50)
    assert load_WYL.shape == (120, 2, 16)
    assert (load_WYL.sum(axis=2) == (0 if name == "empty" else 1000)).all()
    assert np.array_equal(load_WYL, synthetic_load(name, 120, 2, 16, tokens_per_step=1000, num_ranks=4, interval=50))


def test_synthetic_loads_are_what_they_are_called() -> None:
    def share(name: str) -> np.ndarray:
        return synthetic_load(name, 100, 1, 16, tokens_per_step=100_000, num_ranks=4)[:, 0] / 100_000

    assert share("balanced").max() < 0.07
    assert share("hot-expert").max(axis=1) == pytest.approx(0.5 + 0.5 / 16, abs=0.02)
    assert share("one-expert").max(axis=1).tolist() == [1.0] * 100
    assert share("hot-rank")[:, :4].sum(axis=1) == pytest.approx(0.5, abs=0.02)
    hot = np.sort(np.argsort(share("rotating"), axis=1)[:, -4:], axis=1)
    assert (hot[:50] == hot[0]).all()
    assert (hot[50:] == hot[50]).all()
    assert (hot[0] != hot[50]).any()
    assert np.flatnonzero(share("burst").max(axis=1) > 0.4).tolist() == [49, 99]


def test_an_unknown_load_is_refused() -> None:
    with pytest.raises(ValueError, match="'wavy' is unknown; one of balanced, "):
        synthetic_load("wavy", 1, 1, 8)


def test_a_trace_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    writer = TraceWriter(tmp_path / "trace.npy")
    for load_YL in SKEWED:
        writer.append(load_YL)
    arguments = ["simulate", str(tmp_path / "trace.npy"), "--ep-size", "2", "--step-interval", "16"]
    assert main([*arguments, "--bytes-per-expert", "1048576"]) == 0
    lines = capsys.readouterr().out.splitlines()
    static, deepseek, balanced = (next(line.split() for line in lines if line.startswith(name)) for name in NAMES)
    assert static[1:4] == ["0.833", "0.833", "0.833"]
    assert float(balanced[1]) > 0.95
    assert float(deepseek[1]) > 0.9
    assert balanced[5:7] == [f"{int(balanced[4]):.1f}", "MiB"]


NAMES = ("static", "deepseek", "balanced")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["simulate"], "give either a TRACE or --synthetic NAME"),
        (["simulate", "nowhere.npy"], "nowhere.npy"),
        (["simulate", "--synthetic", "zipf", "--ep-size", "7"], "must be"),
        (
            ["simulate", "--synthetic", "zipf", "--num-redundant-experts", "3"],
            "num_redundant_experts=3 must be zero or",
        ),
        (["simulate", "--synthetic", "zipf", "--step-interval", "0"], "step_interval=0 must be at least 1"),
    ],
)
def test_what_does_not_fit_is_an_error_and_no_traceback(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    output = capsys.readouterr().err
    assert output.startswith("error: ")
    assert message in output


def test_drawn_over_time() -> None:
    assert draw_over_time(np.array([0.0, 0.5, 1.0, np.nan]), 4) == "▁▅█·"
