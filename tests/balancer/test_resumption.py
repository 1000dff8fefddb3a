"""A run that resumes on as many ranks goes on where it was, bit for bit."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_eplb import EPLBCallback, ExpertLoadBalancer, ExpertPlacement, parallelize_experts
from lightning_eplb.balancer.schedule import Schedule
from tests.balancer.test_warm_start import HOT, RememberLoad, Watch
from tests.fidelity import SEQUENCES, trainer_for
from tests.models import LanguageModel, hugging_face_model, loader, token_batches
from tests.workers import Workers

STEPS, SAVED_AFTER, RANKS = 11, 7, 2


@dataclass
class Run:
    losses: list[float]
    weights: dict[str, Tensor]
    slots: list[list[int]]
    """At the first batch."""
    state: dict[str, Any]
    """Of the balancer at the end."""
    told: list[str]
    """At the start of training."""


def run(folder: str | None, ckpt_path: str | None, redundant: int = 2, initial_load: Any = None) -> Run:
    """On every worker: train, and save after seven steps if there is a folder."""
    module = LanguageModel(hugging_face_model("mixtral"), "adamw")
    eplb = EPLBCallback(redundant, policy=RememberLoad(), step_interval=4, window_size=5, initial_load=initial_load)
    watch = Watch(eplb)
    callbacks: list[Any] = [eplb, watch]
    if folder is not None:
        callbacks.append(ModelCheckpoint(folder, "half", every_n_train_steps=SAVED_AFTER, save_top_k=1, monitor=None))
    trainer = trainer_for(RANKS, max_steps=STEPS, callbacks=callbacks, enable_checkpointing=folder is not None)
    told: list[str] = []
    with (
        patch("lightning_eplb.balancer.resumption.rank_zero_info", told.append),
        patch("lightning_eplb.simulation.initial_load.rank_zero_info", told.append),
    ):
        trainer.fit(module, loader(token_batches(STEPS * RANKS * SEQUENCES), SEQUENCES), ckpt_path=ckpt_path)
    assert eplb.balancer is not None
    assert watch.placement is not None
    slots = watch.placement.physical_to_logical.tolist()
    return Run(module.losses, dict(module.model.state_dict()), slots, eplb.balancer.state_dict(), told)


def is_same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return list(one) == list(other) and all(is_same(one[key], other[key]) for key in one)
    return torch.equal(one, other) if isinstance(one, Tensor) else one == other


@pytest.fixture(scope="module")
def uninterrupted(workers: Workers, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Run], Path]:
    folder = tmp_path_factory.mktemp("resumption")
    return workers.run(RANKS, run, str(folder), None), folder / "half.ckpt"


@pytest.mark.parametrize("initial_load", [None, HOT], ids=["alone", "with initial_load"])
def test_resumed_run_on_as_many_ranks_is_the_same_bit_for_bit(
    initial_load: Any, uninterrupted: tuple[list[Run], Path], workers: Workers
) -> None:
    whole, path = uninterrupted
    saved = torch.load(path, weights_only=True)["callbacks"]["EPLBCallback"]["physical_to_logical"]
    for expected, ours in zip(whole, workers.run(RANKS, run, None, str(path), 2, initial_load), strict=True):
        assert ours.slots == saved.tolist() != expected.slots
        assert ours.losses == expected.losses[SAVED_AFTER:]
        assert is_same(ours.weights, expected.weights)
        assert is_same(ours.state, expected.state)
        won = ["initial_load was not used: the checkpoint has a load and a placement of its own"]
        assert ours.told == ([] if initial_load is None else won)


def test_resumed_run_with_other_redundancy_is_placed_by_window(
    uninterrupted: tuple[list[Run], Path], workers: Workers
) -> None:
    for ours in workers.run(RANKS, run, None, str(uninterrupted[1]), 4):
        assert ours.told == [
            "the checkpoint's placement has 2 layers of 10 slots, and this model has 2 of 12; experts are placed by the"
            " load of the saved window"
        ]
        assert ours.slots != ExpertPlacement.initial(2, 8, 2, 4).physical_to_logical.tolist()


DAMAGE: dict[str, tuple[dict[str, Any], str]] = {
    "none": ({"physical_to_logical": None}, "the checkpoint has no placement"),
    "a list": ({"physical_to_logical": [[0, 1]]}, "is damaged: it is no tensor"),
    "floats": ({"physical_to_logical": torch.zeros(2, 8)}, "is damaged: it is no tensor"),
    "a row": ({"physical_to_logical": torch.arange(8)}, "is damaged: it is no tensor"),
    "slots": (
        {"physical_to_logical": torch.arange(9).repeat(2, 1)},
        "has 2 layers of 9 slots, and this model has 2 of 8",
    ),
    "an expert twice": ({"physical_to_logical": torch.zeros(2, 8, dtype=torch.int32)}, "layer 0: expert 1 is missing"),
    "unknown experts": (
        {"physical_to_logical": torch.arange(1, 9).repeat(2, 1)},
        "is damaged: physical_to_logical holds",
    ),
    "bool": ({"physical_to_logical": torch.ones(2, 8, dtype=torch.bool)}, "is damaged: physical_to_logical has dtype"),
    "ranks": ({"num_ranks": 4}, "the checkpoint's experts were on 4 ranks, and these are 2"),
    "a word": ({"num_ranks": "two"}, "the checkpoint's experts were on two ranks, and these are 2"),
}


def resume_damaged() -> dict[str, tuple[list[str], bool]]:
    """On every worker: what is told, and whether experts were placed by the window."""
    balancer = ExpertLoadBalancer(parallelize_experts(hugging_face_model("mixtral")), policy=RememberLoad())
    balancer.load.update(torch.from_numpy(HOT))
    state = {**balancer.state_dict(), "num_rearrangements": 1}
    found = {}
    for name, (changes, _) in DAMAGE.items():
        balancer.reset()
        balancer.load_state_dict({**state, **changes})
        told: list[str] = []
        with patch("lightning_eplb.balancer.resumption.rank_zero_info", told.append):
            result = balancer.resume_placement()
        found[name] = told, result is not None and result.num_rows > 0
        assert balancer.resume_placement() is None  # once
    return found


def test_resumption_with_damaged_placement_is_told_and_placed_by_window(workers: Workers) -> None:
    first, second = workers.run(RANKS, resume_damaged)
    assert first == second
    for name, (_, message) in DAMAGE.items():
        (told,), is_placed = first[name]
        assert message in told, name
        assert told.endswith("; experts are placed by the load of the saved window")
        assert is_placed


LEVELS = st.lists(st.sampled_from([0.95, 0.9, 0.7, None]), min_size=30, max_size=120)


@given(LEVELS, st.integers(0, 120), st.sampled_from([1, 7, 20, 40]))
def test_schedule_that_was_saved_and_loaded_decides_the_same(
    levels: list[float | None], saved_after: int, step_interval: int
) -> None:
    one, other = Schedule(step_interval), Schedule(step_interval)
    for level in levels[:saved_after]:
        one.step(level)
    other.load_state_dict(one.state_dict())
    other.steps_to_go = one.steps_to_go
    for level in levels[saved_after:]:
        assert one.step(level) == other.step(level)
        assert one.look_back(100) == other.look_back(100)


def test_schedule_of_other_interval_starts_anew() -> None:
    saved = Schedule(100)
    for _ in range(60):
        saved.step(0.9)
    other = Schedule(50)
    other.load_state_dict(saved.state_dict())
    assert other.state_dict() == Schedule(50).state_dict()
