"""Checkpoints on disk: what they hold, in part and as a whole, and paths that are none."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint import save

from lightning_eplb.loading.sources import Box, open_checkpoint, whole_box

TENSORS = {
    "model.a": torch.arange(60, dtype=torch.float64).view(5, 4, 3),
    "model.b": torch.arange(7, dtype=torch.bfloat16),
    "model.c": torch.tensor(3),
}


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    save_file(TENSORS, folder / "model.safetensors")
    torch.save({"state_dict": TENSORS, "epoch": 1}, folder / "run.ckpt")
    save({"state_dict": TENSORS}, checkpoint_id=folder / "distributed", no_dist=True)
    torch.save({"epoch": 1}, folder / "distributed/meta.pt")
    return {
        "folder": folder,
        "file": folder / "model.safetensors",
        "lightning": folder / "run.ckpt",
        "distributed": folder / "distributed",
    }


def a_box(data: st.DataObject, tensor: Tensor) -> Box:
    starts = [data.draw(st.integers(0, size - 1)) for size in tensor.shape]
    return tuple(
        slice(start, data.draw(st.integers(start + 1, size))) for start, size in zip(starts, tensor.shape, strict=True)
    )


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("kind", ["folder", "file", "lightning", "distributed"])
@given(data=st.data())
def test_parts(kind: str, paths: dict[str, Path], data: st.DataObject) -> None:
    with open_checkpoint(paths[kind]) as sources:
        assert set(sources) == set(TENSORS)
        for name, tensor in TENSORS.items():
            assert sources[name].shape == tensor.shape
            for box in (whole_box(tensor.shape), a_box(data, tensor)):
                part = sources[name].read(box)
                assert part.dtype == tensor.dtype
                assert torch.equal(part, tensor[box])


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    torch.save({"epoch": 1}, tmp_path / "no_weights.ckpt")
    (tmp_path / "text.ckpt").write_text("weights")
    for name, message in {
        "no_weights.ckpt": "has no 'state_dict'; a file of Trainer.save_checkpoint has it",
        "text.ckpt": "can't be read as a file of Trainer.save_checkpoint",
        "nothing": "is no checkpoint: a folder with model.safetensors or model.safetensors.index.json would do",
    }.items():
        with pytest.raises(ValueError, match=message), open_checkpoint(tmp_path / name):
            pass
