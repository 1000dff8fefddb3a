"""ExpertLoad: the window slides by steps, is kept by logical id, and adds up over ranks."""

import inspect
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torchmetrics.utilities.exceptions import TorchMetricsUserError

from lightning_eplb.metrics import ExpertLoad
from lightning_eplb.placement import ExpertPlacement
from tests.fresh_interpreter import FreshInterpreter
from tests.workers import Workers

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def load(*layers: list[int]) -> torch.Tensor:
    return torch.tensor(layers, dtype=torch.int64)


def numbered_step(step: int) -> torch.Tensor:
    """A ``[2, 4]`` load that no other step has."""
    return torch.arange(8).reshape(2, 4) + 100 * step


# -- the window


def test_window_after_more_steps_keeps_the_latest():
    metric = ExpertLoad(num_layers=2, num_logical_experts=4, window_size=3)
    for step in range(8):
        assert metric.num_steps == min(step, 3)
        metric.update(numbered_step(step))
        expected = [numbered_step(s) for s in range(max(0, step - 2), step + 1)]
        assert torch.equal(metric.steps(), torch.stack(expected))
        assert torch.equal(metric.compute()["load"], torch.stack(expected).sum(0))
    assert metric.steps().dtype == metric.compute()["load"].dtype == torch.int64


def test_steps_when_written_leave_window_unchanged():
    metric = ExpertLoad(num_layers=1, num_logical_experts=2, window_size=2)
    metric.update(load([1, 2]))
    metric.steps().zero_()
    assert metric.compute()["load"].tolist() == [[1, 2]]


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric ExpertLoad was called before:UserWarning")
def test_compute_without_tokens_is_balanced():
    metric = ExpertLoad(num_layers=1, num_logical_experts=2, window_size=2)
    assert metric.steps().shape == (0, 1, 2)
    assert float(metric.compute()["balancedness"]) == 1.0
    metric.update(load([0, 0]))
    values = metric.compute()
    assert metric.num_steps == 1
    assert [float(values[k]) for k in ("avg_tokens", "max_tokens", "balancedness")] == [0.0, 0.0, 1.0]


def test_reset_of_window_empties_it():
    metric = ExpertLoad(num_layers=1, num_logical_experts=2, window_size=2)
    for _ in range(3):
        metric.update(load([1, 2]))
    metric.reset()
    assert metric.num_steps == 0
    assert metric.steps().shape == (0, 1, 2)
    metric.update(load([5, 6]))
    assert metric.compute()["load"].tolist() == [[5, 6]]


def test_forward_of_step_updates_once_and_returns_it():
    metric = ExpertLoad(num_layers=1, num_logical_experts=2, window_size=3)
    assert metric(load([3, 1]))["load"].tolist() == [[3, 1]]
    values = metric(load([1, 9]))
    assert values["load"].tolist() == [[1, 9]]
    assert [float(values[k]) for k in ("avg_tokens", "max_tokens")] == [5.0, 9.0]
    assert metric.num_steps == 2
    assert metric.steps().tolist() == [[[3, 1]], [[1, 9]]]
    assert metric.update_count == 2
    window = metric.compute()
    assert window["load"].tolist() == [[4, 10]]
    assert [float(window[k]) for k in ("avg_tokens", "max_tokens")] == [3.5, 5.0]


def test_compute_of_int32_loads_does_not_overflow():
    metric = ExpertLoad(num_layers=1, num_logical_experts=2, window_size=4)
    for _ in range(4):
        metric.update(torch.full((1, 2), 2**31 - 1, dtype=torch.int32))
    assert metric.compute()["load"].tolist() == [[4 * (2**31 - 1)] * 2]


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8])
def test_update_with_numpy_array_counts_it(dtype: type):
    metric = ExpertLoad(num_layers=1, num_logical_experts=3, window_size=2)
    counts = np.array([[200, 0, 56]], dtype=dtype)
    counts.setflags(write=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metric.update(counts)
    metric.update(counts)
    assert metric.compute()["load"].tolist() == [[400, 0, 112]]


@pytest.mark.parametrize("device", DEVICES)
def test_metric_on_other_device_keeps_counting(device: str):
    placement = ExpertPlacement.initial(num_layers=1, num_logical_experts=4, num_ranks=2)
    metric = ExpertLoad(num_layers=1, num_logical_experts=4, window_size=2, placement=placement)
    metric.update(load([1, 2, 3, 4]))
    metric.to(device)
    metric.update(load([1, 2, 3, 4]))  # from the CPU
    metric.update(load([3, 3, 3, 3]).to(device))
    values = metric.compute()
    assert {v.device.type for v in values.values()} == {device}
    assert values["load"].tolist() == [[4, 5, 6, 7]]
    assert float(values["max_tokens"]) == 6.5
    assert metric.steps().device.type == device
    metric.half()  # a model's dtype is none of the counts' business
    assert metric.steps().dtype == torch.int64


def test_update_after_inference_mode_counts():
    metric = ExpertLoad(num_layers=1, num_logical_experts=2, window_size=2)
    with torch.inference_mode():
        metric.reset()
        metric.update(load([1, 2]))
    metric.update(load([1, 2]))
    metric.update(load([3, 4]))
    assert metric.compute()["load"].tolist() == [[4, 6]]


# -- what the ranks serve


def test_compute_of_two_layers_matches_hand_calculation():
    """Rank 0 serves 30 and 5 tokens in the two layers, rank 1 serves 10 and 15; a step is half of that."""
    placement = ExpertPlacement([[0, 1, 2, 3], [3, 0, 1, 2]], num_logical_experts=4, num_ranks=2)
    metric = ExpertLoad(num_layers=2, num_logical_experts=4, window_size=5, placement=placement)
    metric.update(load([20, 4, 1, 7], [2, 5, 10, 0]))
    metric.update(load([5, 1, 0, 2], [3, 0, 0, 0]))
    values = metric.compute()
    assert float(values["avg_tokens"]) == (20 + 10) / 2
    assert float(values["max_tokens"]) == (30 + 15) / 2
    assert float(values["balancedness"]) == pytest.approx(30 / 45)
    assert values["balancedness"].dtype == torch.float64


def test_compute_with_replica_splits_tokens_evenly():
    """Expert 0 is on both ranks: each serves 6 of its 12 tokens."""
    placement = ExpertPlacement([[0, 1, -1, 2, 3, 0]], num_logical_experts=4, num_ranks=2)
    metric = ExpertLoad(num_layers=1, num_logical_experts=4, window_size=1, placement=placement)
    values = metric(load([12, 2, 1, 1]))
    assert [float(values[k]) for k in ("avg_tokens", "max_tokens", "balancedness")] == [8.0, 8.0, 1.0]


def test_compute_of_twofold_skew_is_one_half():
    """The fullest of 4 ranks has twice the mean in every layer: 0.5, where a mean over the wrong dimension says 1.

    The layers are skewed to different ranks, so that the sum over layers is even on every rank.
    """
    tokens = 24 + 48 * torch.eye(4, dtype=torch.int64)  # in a layer 72 + 3 * 24, which is 36 a rank
    placement = ExpertPlacement.initial(num_layers=4, num_logical_experts=4, num_ranks=4)
    metric = ExpertLoad(num_layers=4, num_logical_experts=4, window_size=1, placement=placement)
    values = metric(tokens)
    assert float(values["balancedness"]) == 0.5
    assert float(values["avg_tokens"]) == 4 * 36
    assert float(values["max_tokens"]) == 4 * 72


def test_compute_without_placement_takes_each_expert_as_rank():
    metric = ExpertLoad(num_layers=1, num_logical_experts=4, window_size=1)
    values = metric(load([4, 2, 1, 1]))
    assert [float(values[k]) for k in ("avg_tokens", "max_tokens", "balancedness")] == [2.0, 4.0, 0.5]


def test_placement_when_replaced_reads_old_window():
    """The window is by logical id: what came before a rearrangement counts for the same experts after it."""
    hot = load([8, 8, 0, 0])
    metric = ExpertLoad(num_layers=1, num_logical_experts=4, window_size=4)
    metric.placement = ExpertPlacement([[0, 1, 2, 3]], num_logical_experts=4, num_ranks=2)
    metric.update(hot)
    assert float(metric.compute()["balancedness"]) == 0.5
    metric.placement = ExpertPlacement([[2, 0, 1, 3]], num_logical_experts=4, num_ranks=2)
    assert metric.compute()["load"].tolist() == hot.tolist()
    assert float(metric.compute()["balancedness"]) == 1.0  # also: no value from before is kept
    metric.update(hot)
    assert metric.steps().tolist() == [hot.tolist()] * 2
    assert float(metric.compute()["balancedness"]) == 1.0


# -- saving


@pytest.mark.parametrize("updates", [1, 3, 7])
def test_state_dict_through_file_restores_window(tmp_path: Path, updates: int):
    saved, restored = (ExpertLoad(num_layers=2, num_logical_experts=4, window_size=3) for _ in range(2))
    for step in range(updates):
        saved.update(numbered_step(step))
    torch.save(saved.state_dict(), tmp_path / "metric.pt")
    state = torch.load(tmp_path / "metric.pt", weights_only=True)
    restored.load_state_dict(state, strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # none that compute() came before update()
        assert torch.equal(restored.compute()["load"], saved.compute()["load"])
    for step in range(updates, updates + 4):  # and both go on from the same row of the ring
        assert torch.equal(restored.steps(), saved.steps())
        assert restored.num_steps == saved.num_steps
        for metric in (saved, restored):
            metric.update(numbered_step(step))
    assert torch.equal(state["ring"], torch.load(tmp_path / "metric.pt", weights_only=True)["ring"])


@pytest.mark.parametrize("updates", [0, 2, 3, 7, 11])
@pytest.mark.parametrize("window_size", [1, 2, 4, 6])
def test_state_dict_into_other_window_keeps_latest_steps(window_size: int, updates: int):
    saved = ExpertLoad(num_layers=2, num_logical_experts=4, window_size=4)
    restored = ExpertLoad(num_layers=2, num_logical_experts=4, window_size=window_size)
    for step in range(updates):
        saved.update(numbered_step(step))
    restored.load_state_dict(saved.state_dict())
    kept = min(updates, 4, window_size)
    assert restored.num_steps == kept
    assert torch.equal(restored.steps(), saved.steps()[len(saved.steps()) - kept :])
    for step in range(updates, updates + 9):
        restored.update(numbered_step(step))
        assert restored.num_steps == min(window_size, kept + step + 1 - updates)
        newest_first = restored.steps().flip(0)
        assert all(torch.equal(newest_first[i], numbered_step(step - i)) for i in range(restored.num_steps))


def test_state_dict_of_other_model_raises():
    saved = ExpertLoad(num_layers=2, num_logical_experts=4, window_size=4)
    with pytest.raises(ValueError, match=r"saved window has shape \[4, 2, 4\].*\[steps, 2, 8\]"):
        ExpertLoad(num_layers=2, num_logical_experts=8, window_size=4).load_state_dict(saved.state_dict())


# -- what is refused


@pytest.mark.parametrize("name", ["num_layers", "num_logical_experts", "window_size"])
def test_metric_with_size_below_one_raises(name: str):
    sizes = {"num_layers": 2, "num_logical_experts": 4, "window_size": 3, name: 0}
    with pytest.raises(ValueError, match=f"{name}=0 must be at least 1"):
        ExpertLoad(**sizes)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (torch.zeros(4, 2, dtype=torch.int64), r"shape \[4, 2\]; it must be .* \[2, 4\]"),
        (torch.zeros(4, dtype=torch.int64), r"shape \[4\]"),
        (torch.zeros(3, 2, 4, dtype=torch.int64), r"micro-batches of an optimizer step already summed"),
        (torch.zeros(2, 4), r"dtype torch.float32; counts of tokens must be integers"),
        (torch.zeros(2, 4, dtype=torch.bool), r"dtype torch.bool"),
        (load([1, 2, 3, 4], [1, 2, -3, 4]), r"load_YL\[1, 2\]=-3 is negative"),
    ],
)
def test_update_with_invalid_load_raises(wrong: torch.Tensor, sentence: str):
    metric = ExpertLoad(num_layers=2, num_logical_experts=4, window_size=3)
    for call in (metric.update, metric):
        with pytest.raises(ValueError, match=sentence):
            call(wrong)
    assert metric.num_steps == 0


def test_placement_of_other_model_raises():
    metric = ExpertLoad(num_layers=2, num_logical_experts=4, window_size=3)
    with pytest.raises(ValueError, match=r"placement has 1 layers of 4 .* num_layers=2"):
        metric.placement = ExpertPlacement.initial(num_layers=1, num_logical_experts=4, num_ranks=2)


def test_import_of_metrics_is_light(fresh_interpreter: FreshInterpreter):
    """The room imports nothing heavy by itself: torchmetrics has matplotlib, and the package's top has Lightning."""
    program = f"""
import sys, types
heavy = {{"matplotlib", "wandb", "lightning", "PIL"}}
for name in [name for name in sys.modules if name.split(".")[0] in heavy]:
    del sys.modules[name]
top = sys.modules["lightning_eplb"] = types.ModuleType("lightning_eplb")
top.__path__ = [{str(Path(inspect.getfile(ExpertLoad)).parent)!r}]
import lightning_eplb.metrics
print({{name.split(".")[0] for name in sys.modules}} & heavy)
"""
    assert fresh_interpreter.run(program).strip() == "set()"


# -- over ranks


def counts_of_two() -> None:
    rank = dist.get_rank()
    placement = ExpertPlacement.initial(num_layers=2, num_logical_experts=4, num_ranks=2)
    metric = ExpertLoad(num_layers=2, num_logical_experts=4, window_size=2, placement=placement)
    own = [numbered_step(step) * (1 + rank) for step in range(3)]
    both = [numbered_step(step) * 3 for step in range(3)]
    for step in own:
        alone = metric(step)
        assert torch.equal(alone["load"], step), "a single step is this rank's own"
    values = metric.compute()
    assert torch.equal(values["load"], both[1] + both[2])
    # Layers 0 and 1 of step t over both ranks: 3 * (100t + 0..3), 3 * (100t + 4..7); rank 1 has the upper two experts.
    assert float(values["max_tokens"]) == 3 * (300 + 5 + 300 + 13)
    assert float(values["avg_tokens"]) == 3 * (300 + 3 + 300 + 11)
    assert metric.num_steps == 2, "the counter must not add up"
    assert torch.equal(metric.steps(), torch.stack(own[1:])), "this rank's counts are back"
    metric.update(own[0])
    assert torch.equal(metric.compute()["load"], both[2] + both[0])

    with torch.inference_mode():  # as in a validation hook
        metric.compute()
    metric.update(own[1])
    assert torch.equal(metric.compute()["load"], both[0] + both[1])

    with metric.sync_context():
        assert torch.equal(metric.steps(), torch.stack(both[:2]))
    metric.sync()
    with pytest.raises(TorchMetricsUserError, match=r"call unsync\(\)"):
        metric(own[0])
    metric.unsync()

    shared = ExpertLoad(num_layers=2, num_logical_experts=4, window_size=2, dist_sync_on_step=True)
    assert torch.equal(shared(own[1])["load"], both[1])
    assert torch.equal(shared.steps()[0], own[1])
    local = ExpertLoad(num_layers=2, num_logical_experts=4, window_size=2, sync_on_compute=False)
    local.update(both[1])
    assert torch.equal(local.compute()["load"], both[1])


def test_compute_on_two_ranks_adds_up(workers: Workers):
    workers.run(2, counts_of_two)


# -- pictures


def test_plot_without_value_shows_window():
    metric = ExpertLoad(num_layers=2, num_logical_experts=4, window_size=2)
    step = metric(load([4, 0, 0, 0], [1, 1, 1, 1]))
    metric.update(load([0, 4, 0, 0], [1, 1, 1, 1]))
    figure, axes = metric.plot()
    assert axes in figure.axes
    assert axes.images[0].get_array().max() == 2.0  # of 8 tokens in the window, 4 went to one expert of 4
    figure, axes = metric.plot(step)
    assert axes.images[0].get_array().max() == 4.0
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("logical expert", "MoE layer")


def test_plot_of_several_values_is_a_line():
    metric = ExpertLoad(num_layers=1, num_logical_experts=4, window_size=2)
    values = [metric(load(step)) for step in ([4, 0, 0, 0], [2, 2, 0, 0], [1, 1, 1, 1])]
    _, axes = metric.plot(values)
    assert axes.lines[0].get_ydata().tolist() == [0.25, 0.5, 1.0]


@pytest.mark.parametrize("several", [False, True])
def test_plot_on_given_axes_draws_there(several: bool):
    from matplotlib.figure import Figure

    metric = ExpertLoad(num_layers=1, num_logical_experts=4, window_size=2)
    value = metric(load([4, 0, 0, 0]))
    given = Figure()
    left, right = given.subplots(1, 2)
    figure, axes = metric.plot([value] if several else value, ax=right)
    assert (figure, axes) == (given, right)
    assert not left.images
    assert not left.lines
