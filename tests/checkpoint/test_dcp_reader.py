"""Folders of ``torch.distributed.checkpoint`` are read as data: hostile and damaged ones are refused everywhere."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.state_dict_saver import save

from lightning_eplb import load_weights, parallelize_experts
from lightning_eplb.checkpoint.consolidate import read_distributed_checkpoint
from lightning_eplb.checkpoint.dcp_reader import read_index
from lightning_eplb.checkpoint.sources import open_checkpoint, whole_box
from lightning_eplb.cli import main
from tests.models import LanguageModel, hugging_face_model
from tests.test_resume import run
from tests.workers import Workers

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
STATE = {
    "state_dict": {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor([1, 2], dtype=torch.bfloat16)},
    "optimizer_0": {"state": {"a": {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.5, "params": ["a"]}]},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(STATE, checkpoint_id=tmp_path / "run.ckpt", no_dist=True)
    window = torch.ones(2, 1, 4, dtype=torch.int64)
    state = {"window": window, "num_rearrangements": 0, "rearranged_bytes": 0}
    torch.save({"global_step": 7, "callbacks": {"EPLBCallback": state}}, tmp_path / "run.ckpt/meta.pt")
    return tmp_path / "run.ckpt"


def pickled(folder: Path) -> Any:
    return FileSystemReader(folder).read_metadata()


def put(folder: Path, index: Any) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(index))


class Touches:
    """Runs code where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self._path),)


def refusals(folder: Path) -> list[str]:
    """The words of a resume and of ``load_weights``."""
    with pytest.raises(ValueError) as resumed:  # noqa: PT011
        read_distributed_checkpoint(folder, weights_only=None)
    with pytest.raises(ValueError) as loaded, open_checkpoint(folder):  # noqa: PT011
        pass
    return [str(resumed.value), str(loaded.value)]


def test_index_of_pytorch_is_read(folder: Path) -> None:
    assert read_index(folder).state_dict_metadata == pickled(folder).state_dict_metadata
    checkpoint = read_distributed_checkpoint(folder, weights_only=True)
    assert torch.equal(checkpoint["state_dict"]["a"], STATE["state_dict"]["a"])
    assert checkpoint["optimizer_states"][0]["param_groups"] == [{"lr": 0.5, "params": [0]}]
    assert checkpoint["global_step"] == 7


def test_index_with_pure_paths_is_read(folder: Path) -> None:
    index = pickled(folder)
    index.storage_meta.checkpoint_id = PurePosixPath("/elsewhere")
    put(folder, index)
    assert isinstance(read_index(folder).storage_meta, StorageMeta)


def test_hostile_index_raises_and_runs_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = pickled(folder)
    index.planner_data["x"] = Touches(tmp_path / "touched")
    put(folder, index)
    for message in refusals(folder):
        assert f"{folder}/.metadata names posix.mkdir, which no index of a distributed checkpoint needs" in message
    assert main(["inspect", str(folder)]) == 2
    assert "names posix.mkdir" in capsys.readouterr().err
    assert not (tmp_path / "touched").exists()
    pickle.loads((folder / ".metadata").read_bytes())
    assert (tmp_path / "touched").exists()  # the file was one that runs code


@pytest.mark.parametrize("name", ["torch.distributed.checkpoint.metadata\nos.mkdir", "builtins\neval", "torch\nload"])
def test_index_with_unknown_name_raises(name: str, folder: Path) -> None:
    (folder / ".metadata").write_bytes(b"c" + name.encode() + b"\n.")
    with pytest.raises(ValueError, match=r"names .*, which no index of a distributed checkpoint needs"):
        read_index(folder)


def test_hostile_index_with_build_opcode_leaves_classes_unchanged(folder: Path) -> None:
    """The opcode BUILD, with a pair for state, sets attributes of whatever is there: of a class, too."""
    module, name = "torch.distributed.checkpoint.metadata", "Metadata"
    (folder / ".metadata").write_bytes(f"c{module}\n{name}\n".encode() + b"(N(dVplanner_data\nI1\nstb.")
    with pytest.raises(ValueError, match="is damaged"):
        read_index(folder)
    assert Metadata.planner_data is None


def test_hostile_value_raises_and_runs_nothing(folder: Path, tmp_path: Path) -> None:
    state = {**STATE, "optimizer_0": {**STATE["optimizer_0"], "more": Touches(tmp_path / "touched")}}
    save(state, checkpoint_id=folder, no_dist=True)
    with pytest.raises(ValueError, match=r"optimizer_0.more in the checkpoint is damaged, or can't be read"):
        read_distributed_checkpoint(folder, weights_only=None)
    assert not (tmp_path / "touched").exists()
    read_distributed_checkpoint(folder, weights_only=False)
    assert (tmp_path / "touched").exists()


def test_hostile_meta_file_raises_and_runs_nothing(folder: Path, tmp_path: Path) -> None:
    torch.save({"callbacks": Touches(tmp_path / "touched")}, folder / "meta.pt")
    for weights_only in (None, True):
        with pytest.raises(pickle.UnpicklingError):
            read_distributed_checkpoint(folder, weights_only)
    assert main(["inspect", str(folder)]) == 2
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("name", ["../other", "/etc/hostname", "a/../../b", "C:\\x", "..\\x", "\\x"])
def test_index_with_file_outside_folder_raises(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = pickled(folder)
    next(iter(index.storage_data.values())).relative_path = name
    put(folder, index)
    for message in refusals(folder):
        assert f"names the file {name!r}, which is outside of its folder" in message
    assert main(["inspect", str(folder)]) == 2
    assert "outside of its folder" in capsys.readouterr().err


def remove(name: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).unlink()


def cut(name: str) -> Callable[[Path], Any]:
    return lambda folder: os.truncate(folder / name, 300)


def change(attribute: str, value: Any) -> Callable[[Path], Any]:
    def apply(folder: Path) -> None:
        index = pickled(folder)
        setattr(index, attribute, value)
        put(folder, index)

    return apply


def lose_a_chunk(folder: Path) -> None:
    index = pickled(folder)
    index.state_dict_metadata["state_dict.a"].chunks.clear()
    put(folder, index)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove(".metadata"), "is not a complete checkpoint: it has no .metadata"),
        (remove("meta.pt"), "is not a complete checkpoint: it has no meta.pt"),
        (remove("__0_0.distcp"), "__0_0.distcp has 0 of the [0-9]+ bytes that .metadata names"),
        (cut("__0_0.distcp"), "__0_0.distcp has 300 of the [0-9]+ bytes that .metadata names"),
        (cut(".metadata"), ".metadata is damaged"),
        (change("storage_data", None), ".metadata is damaged"),
        (change("storage_data", {}), ".metadata is damaged"),
        (change("state_dict_metadata", [1]), ".metadata is damaged"),
        (change("planner_data", {"x": 3}), ".metadata is damaged"),
        (lose_a_chunk, "the chunks of state_dict.a are not the whole tensor"),
        (lambda folder: put(folder, {"a": 1}), "it holds a dict"),
        (lambda folder: (folder / ".metadata").write_bytes(b""), ".metadata is damaged"),
    ],
)
def test_damaged_folder_raises(
    damage: Callable[[Path], Any], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(folder)
    with pytest.raises(ValueError, match=message):
        read_distributed_checkpoint(folder)
    with pytest.raises(ValueError, match=message), open_checkpoint(folder):
        pass
    assert main(["inspect", str(folder)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def hostile_folder(folder: Path) -> Path:
    """A checkpoint of the module that :func:`fit_from` trains, whose index makes a directory where it is unpickled."""
    save({"state_dict": LanguageModel(hugging_face_model("mixtral"), "adamw").state_dict()}, checkpoint_id=folder)
    torch.save({"global_step": 7}, folder / "meta.pt")
    index = pickled(folder)
    index.planner_data["x"] = Touches(folder / "touched")
    put(folder, index)
    torch.save({"state_dict": Touches(folder / "touched")}, folder / "file.ckpt")
    return folder


def fit_from(path: str) -> list[str]:
    """Return what ``fit`` and ``load_weights`` say under each strategy."""
    said = []
    for kind in ("ddp", "sharded", "fsdp1"):
        with pytest.raises(ValueError) as raised:  # noqa: PT011
            run(kind, 2, 0, 1, path, weights_only=True)
        said.append(str(raised.value))
    with pytest.raises(pickle.UnpicklingError):
        run("fsdp1", 2, 0, 1, f"{path}/file.ckpt")
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        load_weights(parallelize_experts(hugging_face_model("mixtral")), path)
    return [*said, str(raised.value)]


def test_fit_from_hostile_folder_raises_on_all_ranks(workers: Workers, tmp_path: Path) -> None:
    path = hostile_folder(tmp_path / "hostile.ckpt")
    for said in workers.run(2, fit_from, str(path), seconds=200):
        assert len(said) == 4
        assert all("names posix.mkdir, which no index of a distributed checkpoint needs" in words for words in said)
    assert not (path / "touched").exists()


def test_damaged_shard_raises(folder: Path) -> None:
    (folder / "__0_0.distcp").write_bytes(b"x" * (folder / "__0_0.distcp").stat().st_size)
    with pytest.raises(ValueError, match="damaged"):
        read_distributed_checkpoint(folder)
    with (
        open_checkpoint(folder) as sources,
        pytest.raises(ValueError, match=rf"a shard in {folder} is damaged"),
    ):
        sources["a"].read(whole_box(sources["a"].shape))
