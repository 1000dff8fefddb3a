"""The simulator counts as a run does, and the command line tells what does not fit."""

from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from lightning_eplb import BalancedPolicy, ExpertPlacement, StaticPolicy
from lightning_eplb.cli import main
from lightning_eplb.simulation.replay import Setting, describe, draw_over_time, replay, speed_up
from lightning_eplb.simulation.synthetic import RECORDED_LOADS, SYNTHETIC_LOADS, recorded_load, resample, synthetic_load
from lightning_eplb.simulation.trace import TraceWriter

SKEWED = 1000 * np.tile(np.array([[[20, 16, 14, 10, 12, 12, 8, 8]]]), (20, 1, 1))


def test_replay_of_skewed_load_matches_hand_calculation() -> None:
    static = replay(SKEWED, StaticPolicy(), Setting(2, step_interval=16))
    assert np.allclose(static.balancedness, 50 / 60)
    assert (static.rows_moved, len(static.planning_seconds), static.first_decided) == (0, 2, 4)
    balanced = replay(SKEWED, BalancedPolicy(), Setting(2, step_interval=16))
    assert np.allclose(balanced.balancedness[:4], 50 / 60)
    assert balanced.judged.min() > 0.95
    assert balanced.rows_moved in (2, 4, 6, 8)
    assert speed_up(balanced, static) == pytest.approx(60_000 / balanced.max_tokens[-1])


def test_replay_without_tokens_judges_nothing() -> None:
    empty = replay(synthetic_load("empty", 10, 2, 8), BalancedPolicy(), Setting(2))
    assert (empty.rows_moved, len(empty.judged), empty.planning_seconds) == (0, 0, ())


def test_replay_asks_policy_with_window_alone() -> None:
    class Asked(StaticPolicy):
        sums: list[int] = []  # noqa: RUF012

        def rearrange(self, load_YL, placement, topology):
            self.sums.append(int(load_YL.sum()))
            return placement

    for window_size in (1, 3):
        Asked.sums.clear()
        replay(SKEWED, Asked(), Setting(2, window_size=window_size, step_interval=8))
        assert Asked.sums == [100_000 * min(2, window_size), 100_000 * window_size, 100_000 * window_size]


@pytest.mark.parametrize("name", SYNTHETIC_LOADS)
def test_synthetic_load_of_each_name_has_its_tokens(name: str) -> None:
    load_WYL = synthetic_load(name, 120, 2, 16, tokens_per_step=1000, num_ranks=4, interval=50)
    assert load_WYL.shape == (120, 2, 16)
    assert (load_WYL.sum(axis=2) == (0 if name == "empty" else 1000)).all()
    assert np.array_equal(load_WYL, synthetic_load(name, 120, 2, 16, tokens_per_step=1000, num_ranks=4, interval=50))


def test_synthetic_load_has_shares_of_its_name() -> None:
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


def test_synthetic_load_sorted_has_most_popular_expert_first() -> None:
    total_YL = synthetic_load("sorted", 50, 3, 64, tokens_per_step=1_000_000).sum(axis=0)
    # Single experts' counts are noisy: neighbours may change places, groups do not.
    assert (np.diff(total_YL.reshape(3, 8, 8).sum(axis=2), axis=1) < 0).all()


def test_synthetic_load_grouped_changes_by_group_between_intervals() -> None:
    load_WYL = synthetic_load("grouped", 40, 1, 64, tokens_per_step=10_000_000, interval=10)
    changed_IGL = np.diff(np.log(load_WYL[::10, 0]), axis=0).reshape(3, 4, 16)  # from interval to interval
    within, between = changed_IGL.std(axis=2), changed_IGL.mean(axis=2).std(axis=1)
    assert within.max() < 0.05 < 0.2 < between.min()
    same_WL = np.log(load_WYL[:10, 0] / load_WYL[0, 0])
    assert np.abs(same_WL).max() < 0.05  # within an interval nothing changes


def test_resample_of_load_keeps_its_shares() -> None:
    source_WYL = np.array([[[30, 10], [0, 0]], [[0, 7], [5, 5]]])
    load_WYL = resample(source_WYL, 5, tokens_per_step=10_000)
    assert load_WYL.sum(axis=2).tolist() == [[10_000, 0]] * 3 + [[10_000, 10_000]] * 2
    assert load_WYL[:3, 0, 0] == pytest.approx(7_500, abs=300)
    assert (load_WYL[3:, 0] == [0, 10_000]).all()
    assert load_WYL[3:, 1] == pytest.approx(5_000, abs=300)
    assert np.array_equal(load_WYL, resample(source_WYL, 5, tokens_per_step=10_000))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_steps": 1}, "num_steps=1 must be at least the 2 steps of the load"),
        ({"num_steps": 3, "tokens_per_step": -1}, "tokens_per_step=-1 must not be negative"),
        ({"num_steps": 3, "seed": -1}, "seed=-1 must not be negative"),
    ],
)
def test_resample_with_invalid_number_raises(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resample(np.ones((2, 1, 4), dtype=np.int64), **arguments)


@pytest.mark.parametrize(
    ("name", "steps", "layers", "tokens"),
    [("mixtral-8x7b-e8k2", 10, 32, 2**20), ("mixtral-8x7b-e16k4", 30, 24, 2**21)],
)
def test_recorded_load_of_each_name_is_whole(name: str, steps: int, layers: int, tokens: int) -> None:
    load_WYL = recorded_load(name)
    assert load_WYL.shape == (steps, layers, 4)
    assert (load_WYL.sum(axis=2) == tokens).all()
    assert f"`{name}.npy`" in RECORDED_LOADS[name].with_name("SOURCES.md").read_text()


def test_simulate_with_recorded_load_prints_its_size(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["simulate", "--recorded", "mixtral-8x7b-e8k2", "--ep-size", "2", "--policy", "static"]
    assert main([*words, "--step-interval", "4"]) == 0
    assert "mixtral-8x7b-e8k2: 10 steps, 32 layers of 4 experts" in capsys.readouterr().out
    assert main([*words, "--resample", "60"]) == 0
    assert "mixtral-8x7b-e8k2: 60 steps, 32 layers of 4 experts" in capsys.readouterr().out


def test_load_of_unknown_name_raises() -> None:
    with pytest.raises(ValueError, match=r"'wavy' is unknown\. Use balanced, "):
        synthetic_load("wavy", 1, 1, 8)
    with pytest.raises(ValueError, match=r"'wavy' is unknown\. Use mixtral-8x7b-e16k4 or mixtral-8x7b-e8k2"):
        recorded_load("wavy")


def test_simulate_with_trace_prints_all_policies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    writer = TraceWriter(tmp_path / "trace.npy")
    for load_YL in SKEWED:
        writer.append(load_YL)
    arguments = ["simulate", str(tmp_path / "trace.npy"), "--ep-size", "2", "--step-interval", "16"]
    assert main([*arguments, "--bytes-per-expert", "1048576"]) == 0
    lines = capsys.readouterr().out.splitlines()
    static, deepseek, balanced, per_batch, perfect = (
        next(line.split() for line in lines if line.startswith(name)) for name in NAMES
    )
    assert static[1:7] == ["0.833", "0.833", "0.833", "1.00", "0.0", "0"]
    assert float(balanced[1]) > 0.95
    assert float(deepseek[1]) > 0.9
    assert int(balanced[6]) > 0
    assert balanced[7] == "0"  # a single node
    assert balanced[8:14] == [f"{int(balanced[6]):.1f}", "+", "0.0", "MiB", "0.0", "MiB"]
    assert per_batch[1:14] == balanced[1:14]  # nothing to choose without redundant slots
    assert perfect[1:] == ["1.000", "1.000", "1.000", "1.20", *"------"]


def test_simulate_with_bytes_per_replica_prints_traffic(capsys: pytest.CaptureFixture[str]) -> None:
    """Two layers with 8 filled slots, of 1 MiB of weights and gradient each; by default a quarter of the state."""
    words = ["--synthetic", "zipf", "--layers", "2", "--experts", "16", "--num-redundant-experts", "8", "--steps", "60"]
    given = ["--bytes-per-replica", str(2**20)]
    derived = ["--bytes-per-expert", str(2**22)]
    for more in (given, [*given, *derived], derived):
        assert main(["simulate", *words, "--policy", "static", *more]) == 0
        output = capsys.readouterr().out
        (row,) = (line.split() for line in output.splitlines() if line.startswith("static") and "ms" in line)
        assert row[5] == "8.0"
        assert row[-4:-2] == ["16.0", "MiB"]
        assert "Replicas' traffic is that of a step" in output
        assert ("Bytes moved" in output) == ("--bytes-per-expert" in more)


def test_describe_with_bytes_uses_one_unit_a_column() -> None:
    static = replay(SKEWED, StaticPolicy(), Setting(2, 2, step_interval=16), name="static")
    balanced = replay(SKEWED, BalancedPolicy(), Setting(2, step_interval=16), name="balanced")
    head, *rows = describe([static, balanced], static, bytes_per_expert=2**40, bytes_per_replica=2**30)
    assert head[-3:] == ["bytes moved", "replicas' traffic", "planning"]
    assert [row[-3:-1] for row in rows] == [
        ["0.0 + 0.0 TiB", "2.0 GiB"],
        [f"{balanced.rows_moved:.1f} + 0.0 TiB", "0.0 GiB"],
    ]


def test_simulate_with_costly_replicas_fills_no_slot(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--synthetic", "lognormal-1.2", "--experts", "16", "--num-redundant-experts", "8", "--steps", "60"]
    free, dear = (float(balanced_row(capsys, *words, "--replica-tokens", cost)[5]) for cost in ("0", "1e9"))
    assert free > dear == 0


def balanced_row(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    assert main(["simulate", *words, "--policy", "balanced"]) == 0
    (row,) = (line.split() for line in capsys.readouterr().out.splitlines() if line.endswith(" ms") or " ms " in line)
    return row


def test_simulate_with_costly_moves_moves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A move that takes as long as all tokens of an interval never pays, one for free does for the smallest load."""
    with_trace(tmp_path / "small.npy", SKEWED // 1000)
    with_trace(tmp_path / "large.npy", SKEWED)
    small, large = ([str(tmp_path / name), "--ep-size", "2", "--step-interval", "16"] for name in NAMES_OF_TRACES)
    moved = [int(balanced_row(capsys, *small)[6]), int(balanced_row(capsys, *small, "--move-tokens", "0", "0")[6])]
    assert moved[0] == 0 < moved[1]
    moved = [
        int(balanced_row(capsys, *large)[6]),
        int(balanced_row(capsys, *large, "--move-tokens", "1e9", "1e9")[6]),
        int(balanced_row(capsys, *large, "--move-tokens", "0", "1e9")[6]),
    ]
    assert moved[0] > moved[1] == 0
    assert moved[2] > 0  # the ranks are of one node


NAMES_OF_TRACES = ("small.npy", "large.npy")


def with_trace(path: Path, load_WYL: np.ndarray) -> None:
    writer = TraceWriter(path)
    for load_YL in load_WYL:
        writer.append(load_YL)
    writer.close()


def test_simulate_with_level_split_is_more_balanced(capsys: pytest.CaptureFixture[str]) -> None:
    """Replicas that share by quotas level what replicas that share evenly can't."""
    words = ["--synthetic", "lognormal-1.2", "--experts", "16", "--num-redundant-experts", "8", "--steps", "60"]
    even, level = (float(balanced_row(capsys, *words, "--split", split)[1]) for split in ("even", "level"))
    assert level > even + 0.02


def test_replay_with_unknown_split_raises() -> None:
    with pytest.raises(ValueError, match="split='odd' must be 'even' or 'level'"):
        replay(SKEWED, StaticPolicy(), Setting(2, split="odd"))


class Swapping(StaticPolicy):
    """Rank 0's first expert and another rank's change places, once."""

    def __init__(self, with_rank: int) -> None:
        self.with_rank = with_rank

    def rearrange(self, load_YL, placement, topology):
        slots_YRS = ExpertPlacement.initial(placement.num_layers, 8, 4, 0).by_rank.copy()
        slots_YRS[:, 0, 0], slots_YRS[:, self.with_rank, 0] = 2 * self.with_rank, 0
        return ExpertPlacement(slots_YRS.reshape(placement.num_layers, -1), 8, 4)


@pytest.mark.parametrize(("with_rank", "within", "between"), [(1, 6, 0), (2, 0, 6), (3, 0, 6)])
def test_replay_on_nodes_counts_rows_within_and_between(with_rank: int, within: int, between: int) -> None:
    """Two rows in each of three layers, in the first decision of three; ranks 0 and 1 are on a node."""
    load_WYL = SKEWED.repeat(3, axis=1)
    found = replay(load_WYL, Swapping(with_rank), Setting(4, num_nodes=2, step_interval=8))
    assert len(found.planning_seconds) == 3
    assert (found.rows_within_nodes, found.rows_between_nodes, found.rows_moved) == (within, between, 6)
    single = replay(load_WYL, Swapping(with_rank), Setting(4, num_nodes=1, step_interval=8))
    assert (single.rows_within_nodes, single.rows_between_nodes) == (6, 0)


def test_replay_has_forecast_errors_of_all_decisions_but_last() -> None:
    """Decisions after 2, 10 and 18 steps: the first interval is as expected, then other experts are hot."""
    steady = replay(SKEWED, StaticPolicy(), Setting(2, step_interval=8))
    assert steady.forecast_errors == (0.0, 0.0)
    moved = SKEWED.copy()
    moved[10:] = SKEWED[10:, :, ::-1]
    changed = replay(moved, StaticPolicy(), Setting(2, step_interval=8))
    share_L = SKEWED[0, 0] / SKEWED[0, 0].sum()
    expected = np.sqrt(((share_L - share_L[::-1]) ** 2).sum() / (share_L**2).sum())
    assert changed.forecast_errors == pytest.approx((0.0, expected))


def test_replay_with_one_decision_has_no_forecast_error() -> None:
    assert replay(SKEWED, StaticPolicy(), Setting(2, step_interval=80)).forecast_errors == ()
    assert replay(SKEWED, StaticPolicy(), Setting(2, step_interval=100)).planning_seconds == ()


NAMES = ("static", "deepseek", "balanced", "per-batch", "perfect")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["simulate"], "give one of TRACE, --synthetic NAME and --recorded NAME"),
        (["simulate", "a.npy", "--synthetic", "zipf"], "give one of TRACE, --synthetic NAME and --recorded NAME"),
        (
            ["simulate", "--recorded", "mixtral-8x7b-e8k2", "--step-interval", "4"],
            "--ep-size 8 is more than the 4 experts, and each rank needs one. Use at most 4.",
        ),
        (["simulate", "--recorded", "mixtral-8x7b-e8k2", "--resample", "9"], "--resample 9 is less than the 10 steps"),
        (
            ["simulate", "--recorded", "mixtral-8x7b-e8k2", "--ep-size", "2", "--resample", "1000000000"],
            "--resample 1000000000 are 128,000,000,000 counts, and 268,435,456 are the most that are drawn",
        ),
        (["simulate", "--synthetic", "zipf", "--resample", "900"], "--resample is for recorded loads; of a synthetic"),
        (["simulate", "--synthetic", "zipf", "--resample", "0"], "--resample 0 must be at least 1"),
        (["simulate", "--synthetic", "zipf", "--replica-tokens", "nan"], "--replica-tokens nan must be zero or more;"),
        (["simulate", "--synthetic", "zipf", "--bytes-per-replica", "0"], "--bytes-per-replica 0 must be at least 1"),
        (["simulate", "nowhere.npy"], "nowhere.npy"),
        (
            ["simulate", "--synthetic", "zipf", "--ep-size", "65"],
            "--ep-size 65 is more than the 64 experts, and each rank needs one. Use at most 64.",
        ),
        (
            ["simulate", "--synthetic", "zipf", "--num-redundant-experts", "3"],
            "--num-redundant-experts 3 must be a multiple of --ep-size 8. Use 0 or 8.",
        ),
        (["simulate", "--synthetic", "drift-10", "--step-interval", "0"], "--step-interval 0 must be at least 1"),
        (["simulate", "--synthetic", "zipf", "--step-interval", "-5"], "--step-interval -5 must be at least 1"),
        (["simulate", "--synthetic", "zipf", "--window-size", "0"], "--window-size 0 must be at least 1"),
        (
            ["simulate", "--synthetic", "zipf", "--num-redundant-experts", "1000000"],
            "--num-redundant-experts 1000000 is more than --ep-size 8 can use. Use at most 448, with which",
        ),
        (
            ["simulate", "--synthetic", "zipf", "--num-redundant-experts", "-8"],
            "must be a multiple of --ep-size 8.",
        ),
        (["simulate", "--synthetic", "zipf", "--num-nodes", "0"], "--num-nodes 0 must be at least 1"),
        (["simulate", "--synthetic", "zipf", "--num-nodes", "3"], "--num-nodes 3 must divide --ep-size 8. Use 1,"),
        (["simulate", "--synthetic", "zipf", "--num-groups", "0"], "--num-groups 0 must be at least 1"),
        (["simulate", "--synthetic", "zipf", "--num-groups", "7"], "--num-groups 7 must divide the 64 experts"),
        (["simulate", "--synthetic", "zipf", "--seed", "-1"], "--seed -1 must not be negative"),
        (["simulate", "--synthetic", "zipf", "--bytes-per-expert", "-1"], "--bytes-per-expert -1 must be at least 1"),
        (
            ["simulate", "--synthetic", "zipf", "--move-tokens", "nan", "1"],
            "--move-tokens nan 1.0 must be zero or more; inf for never",
        ),
        (["simulate", "--synthetic", "zipf", "--move-tokens", "1", "-1"], "--move-tokens 1.0 -1.0 must be zero or"),
        (
            ["simulate", "--synthetic", "zipf", "--steps", "1000000000"],
            "--steps 1000000000 of --layers 4 of --experts 64 are 256,000,000,000 counts, and 268,435,456 are the most",
        ),
        (["simulate", "--synthetic", "zipf", "--steps", "0"], "--steps 0 must be at least 1"),
        (["report", "--synthetic", "drift-10", "--step-interval", "0"], "--step-interval 0 must be at least 1"),
        (["report", "--synthetic", "zipf", "-o", "."], "-o . is a folder; name a file, such as report.html"),
    ],
)
def test_simulate_with_invalid_arguments_prints_error(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with mock.patch(
        "lightning_eplb.cli.load_arguments.synthetic_load", side_effect=AssertionError("work before the check")
    ):
        assert main(words) == 2
    output = capsys.readouterr().err
    assert output.startswith("error: ")
    assert message in output


@pytest.mark.parametrize("word", ["simulate", "report"])
def test_simulate_with_damaged_trace_needs_allow_damaged(
    word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with_trace(tmp_path / "trace.npy", SKEWED)
    (tmp_path / "trace.npy").write_bytes((tmp_path / "trace.npy").read_bytes()[:-1])
    words = [word, str(tmp_path / "trace.npy"), "--ep-size", "2", "--step-interval", "16", "--policy", "static"]
    words += ["-o", str(tmp_path / "report.html")] if word == "report" else []
    assert main(words) == 2
    said = "trace.npy is damaged at step 19, byte 3040: the file ends 159 bytes behind the beginning of the step, which"
    output = capsys.readouterr()
    assert output.out == ""
    assert said in output.err
    assert "--allow-damaged in the command line" in output.err
    assert main([*words, "--allow-damaged"]) == 0
    output = capsys.readouterr()
    assert output.err.startswith("warning: ")
    assert said in output.err
    if word == "simulate":
        assert "19 steps" in output.out


@pytest.mark.parametrize("kind", ["itself", "symlink", "hard link"])
def test_report_onto_its_trace_prints_error(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = output = tmp_path / "t.npy"
    with_trace(path, SKEWED)
    before = path.read_bytes()
    if kind != "itself":
        output = tmp_path / "u.npy"
        output.symlink_to(path) if kind == "symlink" else output.hardlink_to(path)
    assert main(["report", str(path), "-o", str(output), "--ep-size", "2", "--step-interval", "16"]) == 2
    assert f"-o {output} is the trace itself, and the page would replace it; name another" in capsys.readouterr().err
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"interval": 0}, "interval=0 must be at least 1"),
        ({"num_ranks": 0}, "num_ranks=0 must be at least 1"),
        ({"tokens_per_step": -1}, "tokens_per_step=-1 must not be negative"),
        ({"seed": -1}, "seed=-1 must not be negative"),
    ],
)
def test_synthetic_load_with_invalid_number_raises(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        synthetic_load("drift-10", 10, 1, 8, **arguments)


def test_replay_with_too_many_redundant_experts_raises() -> None:
    with pytest.raises(ValueError, match=r"num_redundant_experts=10 is more than num_ranks=2 can use\. Use at most 8,"):
        replay(SKEWED, StaticPolicy(), Setting(2, num_redundant_experts=10))


def test_draw_over_time_with_gap_draws_a_dot() -> None:
    assert draw_over_time(np.array([0.0, 0.5, 1.0, np.nan]), 4) == "▁▅█·"
