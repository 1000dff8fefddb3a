"""A load to start from is read from traces, reports and checkpoints, and what is none of them is told."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_eplb.cli import main
from lightning_eplb.simulation.initial_load import read_initial_load
from lightning_eplb.simulation.trace import TraceWriter

LOAD = np.array([[[3, 0, 1, 4], [2, 2, 0, 4]], [[1, 5, 1, 1], [0, 0, 8, 0]], [[2, 2, 2, 2], [7, 1, 0, 0]]])
"""3 steps of 2 layers with 4 experts."""
COUNTS = {"num_rearrangements": 1, "num_ranks": 2}
STATE = {"window": torch.from_numpy(LOAD), **COUNTS}


def write_trace(path: Path) -> Path:
    writer = TraceWriter(path)
    for load_YL in LOAD:
        writer.append(load_YL)
    writer.close()
    return path


def write_checkpoint(path: Path, state: dict[str, Any]) -> Path:
    torch.save({"state_dict": {}, "callbacks": {"EPLBCallback": state, "Other": {"best": 1.0}}}, path)
    return path


def test_read_initial_load_of_trace_returns_steps(tmp_path: Path) -> None:
    assert read_initial_load(write_trace(tmp_path / "trace.npy")).tolist() == LOAD.tolist()  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["last.ckpt", "without_suffix"])
def test_read_initial_load_of_checkpoint_returns_window(name: str, tmp_path: Path) -> None:
    load = read_initial_load(write_checkpoint(tmp_path / name, STATE))
    assert isinstance(load, np.ndarray)
    assert load.tolist() == LOAD.tolist()


def test_read_initial_load_of_own_loop_returns_window(tmp_path: Path) -> None:
    torch.save({"model": {}, "balancer": STATE}, tmp_path / "own.pt")
    assert read_initial_load(tmp_path / "own.pt").tolist() == LOAD.tolist()  # type: ignore[union-attr]


def test_read_initial_load_of_several_models_returns_windows_by_name(tmp_path: Path) -> None:
    slots = {"physical_to_logical": torch.tensor([[0, 1, 2, 3]] * 2)}
    models = {
        "main": {"window": torch.from_numpy(LOAD), **slots},
        "draft": {"window": torch.from_numpy(LOAD[1:]), **slots},
        "teacher": {"window": torch.from_numpy(LOAD)},  # stayed whole, so that no load of it can be planned by
    }
    load = read_initial_load(write_checkpoint(tmp_path / "x.ckpt", {**COUNTS, "models": models}))
    assert isinstance(load, dict)
    assert {name: each.tolist() for name, each in load.items()} == {"main": LOAD.tolist(), "draft": LOAD[1:].tolist()}


def test_read_initial_load_of_model_beside_whole_one_returns_its_window(tmp_path: Path) -> None:
    models = {"teacher": {"window": torch.from_numpy(LOAD[1:]), "num_steps": 2}}
    load = read_initial_load(write_checkpoint(tmp_path / "x.ckpt", {**STATE, "models": models}))
    assert isinstance(load, np.ndarray)
    assert load.tolist() == LOAD.tolist()


def test_read_initial_load_of_report_returns_total(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    words = ["--ep-size", "2", "--step-interval", "4", "--window-size", "2"]
    assert main(["report", str(write_trace(tmp_path / "trace.npy")), "-o", str(page), *words]) == 0
    assert read_initial_load(page).tolist() == [LOAD.sum(axis=0).tolist()]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({**STATE, "window": torch.zeros(0, 2, 4, dtype=torch.int64)}, "has a window without steps"),
        ({**STATE, "window": torch.zeros(2, 4)}, "has a damaged window"),
        ({**STATE, "window": "lost"}, "has a damaged window"),
        ({**COUNTS, "models": {"main": 3}}, "has a damaged window"),
        ({"best": 2}, "has no state of an EPLBCallback"),
    ],
)
def test_read_initial_load_of_damaged_checkpoint_raises(state: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_initial_load(write_checkpoint(tmp_path / "last.ckpt", state))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("report.html", b"<html></html>", "is no report that holds its load"),
        ("report.html", b'<script type="application/json" id="data">{"total": [[0.5]]}</script>', "is no report"),
        ("last.ckpt", b"cut off", "is not a checkpoint that can be read"),
        ("trace.npy", b"cut off", "is not a trace"),
    ],
)
def test_read_initial_load_of_other_file_raises(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_initial_load(tmp_path / name)
