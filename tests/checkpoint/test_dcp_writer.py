"""A distributed checkpoint that is written over another: at any time there is one of the two, never a mixture."""

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.load import _load_distributed_checkpoint
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from lightning_eplb.checkpoint.consolidate import read_distributed_checkpoint
from lightning_eplb.checkpoint.dcp_writer import save_distributed_checkpoint
from lightning_eplb.cli import main
from tests.checkpoint.test_checkpoint import half_trained, largest_difference
from tests.fidelity import TOLERANCE
from tests.test_resume import run
from tests.workers import WorkerError, Workers

WITHOUT_GROUP = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
SECONDS = 200


class Killed(BaseException):
    """Nothing handles it, as nothing handles the end of a process."""


def write(folder: Path, value: float) -> None:
    save_distributed_checkpoint(folder, {"state_dict": {"a": torch.full((4,), value)}, "step": value}, "model", True)


def write_as_lightning(folder: Path, value: float) -> None:
    save({"model": {"a": torch.full((4,), value)}}, checkpoint_id=folder, no_dist=True)
    torch.save({"step": value}, folder / "meta.pt")


def read(folder: Path) -> tuple[float, float]:
    checkpoint = read_distributed_checkpoint(folder)
    return checkpoint["state_dict"]["a"][0].item(), checkpoint["step"]


def read_with_lightning(folder: Path) -> tuple[float, float] | None:
    """``None``: Lightning takes it for no checkpoint."""
    if not (folder / "meta.pt").is_file():
        return None
    checkpoint = _load_distributed_checkpoint(folder)
    return checkpoint["model"]["a"][0].item(), checkpoint["step"]


@WITHOUT_GROUP
@pytest.mark.parametrize("first", [write, write_as_lightning])
@pytest.mark.parametrize(
    ("dies_in", "call", "found", "found_by_lightning"),
    [
        ("torch.save", 1, 1.0, 1.0),  # a shard
        ("torch.save", 2, 1.0, 1.0),  # what is no tensor
        ("pickle.dump", 1, 1.0, 1.0),  # the index
        ("os.replace", 1, 1.0, 1.0),
        ("os.replace", 2, 1.0, None),
        ("os.replace", 3, 2.0, None),
        ("pathlib.Path.unlink", 1, 2.0, 2.0),
    ],
)
def test_writer_that_dies_leaves_one_whole_checkpoint(
    first: Any,
    dies_in: str,
    call: int,
    found: float,
    found_by_lightning: float | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "last.ckpt"
    first(folder, 1.0)
    with monkeypatch.context() as patch:
        patch.setattr(dies_in, dies_at(call, dies_in))
        with pytest.raises(BaseException, match="killed"):
            write(folder, 2.0)
    assert read(folder) == (found, found)
    assert read_with_lightning(folder) == (None if found_by_lightning is None else (found_by_lightning,) * 2)
    write(folder, 3.0)
    assert read(folder) == read_with_lightning(folder) == (3.0, 3.0)
    assert len(list(folder.iterdir())) == 3  # the index, the rest and one shard


def dies_at(call: int, name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    owner = {"torch": torch, "os": os, "pickle": pickle, "pathlib.Path": Path}[module]
    original, calls = getattr(owner, attribute), []

    def function(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == call:
            raise Killed("killed")
        return original(*args, **kwargs)

    return function


@WITHOUT_GROUP
def test_reader_after_lightning_died_over_ours_raises(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It replaces the index before ``meta.pt``."""
    write(tmp_path, 1.0)
    save({"model": {"a": torch.full((4,), 2.0)}}, checkpoint_id=tmp_path, no_dist=True)
    with pytest.raises(ValueError, match=r"is a mixture of two checkpoints: meta.pt is not of the write"):
        read(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 2
    assert "is a mixture of two checkpoints" in capsys.readouterr().err


@WITHOUT_GROUP
def test_writer_that_dies_in_first_write_leaves_nothing_to_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", dies_at(1, "os.replace"))
        with pytest.raises(BaseException, match="killed"):
            write(tmp_path, 1.0)
    with pytest.raises(ValueError, match=r"is not a complete checkpoint: it has no .metadata"):
        read(tmp_path)


def write_from_ranks_that_are_all_first_on_their_node(folder: str) -> list[str]:
    for value in (1.0, 2.0):
        state = {"a": torch.full((4,), value)}
        save_distributed_checkpoint(Path(folder), {"state_dict": state, "step": value}, "model", True)
    return sorted(path.suffix for path in Path(folder).iterdir())


def test_writer_on_nodes_of_one_rank_removes_earlier_files(workers: Workers, tmp_path: Path) -> None:
    for suffixes in workers.run(2, write_from_ranks_that_are_all_first_on_their_node, str(tmp_path)):
        assert suffixes.count(".distcp") <= 2
    assert read(tmp_path) == (2.0, 2.0)


def save_twice(kind: str, folder: str) -> None:
    """Rank 1 dies in the second write, before its shard."""
    write_data, writes = FileSystemWriter.write_data, []

    def dies(self: Any, *args: Any) -> Any:
        writes.append(args)
        if len(writes) == 2 and torch.distributed.get_rank() == 1:
            os._exit(1)
        return write_data(self, *args)

    FileSystemWriter.write_data = dies  # type: ignore[assignment]
    callback = ModelCheckpoint(folder, "last", every_n_train_steps=1, monitor=None, enable_version_counter=False)
    run(kind, 2, 0, 2, callbacks=(callback,))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sharded", "fsdp1"])
def test_training_with_killed_rank_leaves_earlier_checkpoint(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(WorkerError):
        Workers(2).run(2, save_twice, kind, str(tmp_path), seconds=SECONDS)
    checkpoint = read_distributed_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 1
    weights = {name.removeprefix("model."): tensor for name, tensor in checkpoint["state_dict"].items()}
    assert largest_difference(weights, half_trained(steps=1)) < TOLERANCE
    assert main(["inspect", str(tmp_path / "last.ckpt")]) == 0
    output = capsys.readouterr()
    assert "optimizer step 1," in output.out
    assert "did not finish (1 of its files are there): shown is the one before it" in output.err
