"""A checkpoint has its name only once it is complete: ``ckpt_path="last"`` and ``"hpc"`` look at names only."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from lightning_eplb.checkpoint.consolidate import DistributedCheckpointIO
from lightning_eplb.checkpoint.dcp_writer import save_distributed_checkpoint
from lightning_eplb.checkpoint.incomplete import incomplete_path
from tests.checkpoint.test_dcp_writer import WITHOUT_GROUP, Killed, dies_at, read
from tests.test_resume import run
from tests.workers import WorkerError, Workers


def write(folder: Path, value: float) -> None:
    state = {"state_dict": {"a": torch.full((4,), value)}, "step": value}
    save_distributed_checkpoint(folder, state, "model", True, is_new=not folder.is_dir())


def save_file(path: Path, value: float) -> None:
    DistributedCheckpointIO(TorchCheckpointIO()).save_checkpoint({"step": value}, path)


def last_checkpoints(folder: Path) -> set[str]:
    """Return the checkpoints that Lightning chooses from for ``ckpt_path="last"``."""
    return ModelCheckpoint(folder)._find_last_checkpoints(Trainer(logger=False, accelerator="cpu"))


@WITHOUT_GROUP
@pytest.mark.parametrize(("dies_in", "call"), [("torch.save", 1), ("torch.save", 2), ("pickle.dump", 1)])
def test_folder_whose_first_writer_dies_is_not_found(
    dies_in: str, call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(dies_in, dies_at(call, dies_in))
        with pytest.raises(BaseException, match="killed"):
            write(tmp_path / "last.ckpt", 1.0)
    assert any(incomplete_path(tmp_path / "last.ckpt").iterdir())
    assert last_checkpoints(tmp_path) == set()
    write(tmp_path / "last.ckpt", 2.0)
    assert read(tmp_path / "last.ckpt") == (2.0, 2.0)
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
    assert last_checkpoints(tmp_path) == {str(tmp_path / "last.ckpt")}


@WITHOUT_GROUP
@pytest.mark.parametrize("call", [1, 2, 3])
def test_folder_in_place_of_file_whose_writer_dies_leaves_one_of_them(
    call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.ckpt"
    save_file(path, 1.0)
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", dies_at(call, "os.replace"))
        with pytest.raises(BaseException, match="killed"):
            write(path, 2.0)
    assert torch.load(path) == {"step": 1.0}
    write(path, 3.0)
    assert read(path) == (3.0, 3.0)
    save_file(path, 4.0)
    assert torch.load(path) == {"step": 4.0}
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.ckpt"]


def test_file_on_other_disk_than_temporary_folder_whose_writer_dies_keeps_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning writes to the temporary folder, and copies from there to another disk."""

    def dies_in_copy(source: str, target: str) -> None:
        Path(target).write_bytes(Path(source).read_bytes()[:10])
        raise Killed("killed")

    path = tmp_path / "last.ckpt"
    save_file(path, 1.0)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.move", dies_in_copy)
        with pytest.raises(Killed):
            TorchCheckpointIO().save_checkpoint({"step": 2.0}, tmp_path / "without_us.ckpt")
        with pytest.raises(Killed):
            save_file(path, 2.0)
    assert os.path.getsize(tmp_path / "without_us.ckpt") == 10  # so it can fail
    assert torch.load(path) == {"step": 1.0}
    save_file(path, 3.0)
    assert torch.load(path) == {"step": 3.0}


def test_file_in_place_of_folder_without_checkpoint_raises(tmp_path: Path) -> None:
    (tmp_path / "last.ckpt").mkdir()
    with pytest.raises(IsADirectoryError, match=r"last.ckpt' is a folder, and no checkpoint"):
        save_file(tmp_path / "last.ckpt", 1.0)


def test_hpc_checkpoint_whose_writer_dies_is_not_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(logger=False, accelerator="cpu", default_root_dir=tmp_path)
    save_file(tmp_path / "hpc_ckpt_1.ckpt", 1.0)
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", dies_at(1, "os.replace"))
        with pytest.raises(BaseException, match="killed"):
            save_file(tmp_path / "hpc_ckpt_2.ckpt", 2.0)
    assert trainer._checkpoint_connector._hpc_resume_path == str(tmp_path / "hpc_ckpt_1.ckpt")


def save_and_die(kind: str, folder: str) -> None:
    """Rank 1 dies in the first write, before its shard."""

    def dies(self: Any, *args: Any) -> Any:
        if torch.distributed.get_rank() == 1:
            os._exit(1)
        return write_data(self, *args)

    write_data, FileSystemWriter.write_data = FileSystemWriter.write_data, dies  # type: ignore[assignment]
    callback = ModelCheckpoint(folder, "last", every_n_train_steps=1, monitor=None, enable_version_counter=False)
    run(kind, 2, 0, 2, callbacks=(callback,))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sharded", "fsdp1"])
def test_training_with_rank_killed_in_first_write_leaves_no_checkpoint(kind: str, tmp_path: Path) -> None:
    with pytest.raises(WorkerError):
        Workers(2).run(2, save_and_die, kind, str(tmp_path), seconds=100)
    assert incomplete_path(tmp_path / "last.ckpt").is_dir()
    assert last_checkpoints(tmp_path) == set()
