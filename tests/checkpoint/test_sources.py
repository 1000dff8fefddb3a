"""Checkpoints on disk: what they hold, in part and as a whole, and paths that are none."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint import save

from lightning_eplb import load_weights
from lightning_eplb.checkpoint.sources import Box, open_checkpoint, whole_box

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
def test_sources_of_any_format_read_any_part(kind: str, paths: dict[str, Path], data: st.DataObject) -> None:
    with open_checkpoint(paths[kind]) as sources:
        assert set(sources) == set(TENSORS)
        for name, tensor in TENSORS.items():
            assert sources[name].shape == tensor.shape
            for box in (whole_box(tensor.shape), a_box(data, tensor)):
                part = sources[name].read(box)
                assert part.dtype == tensor.dtype
                assert torch.equal(part, tensor[box])


def weights(**values: Any) -> dict[str, Any]:
    return {"state_dict": {"weight": torch.ones(2, 3), "bias": torch.ones(2), **values}}


def itself() -> dict[str, Any]:
    """A dictionary that is in itself."""
    content: dict[str, Any] = {}
    content["state_dict"] = content
    return content


def header(**entries: Any) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + b"\1" * 64


FLOAT = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
SHORT = {"dtype": "I16", "shape": [2, 3], "data_offsets": [0, 12]}
INDEX = "folder/model.safetensors.index.json"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.ckpt", {"epoch": 1}, "has no 'state_dict'. Use a file of Trainer.save_checkpoint."),
        ("a.ckpt", [1, 2], "has no 'state_dict'. Use a file of Trainer.save_checkpoint."),
        ("a.ckpt", {"state_dict": [1]}, "has a 'state_dict' that is not a dictionary from names to tensors"),
        (
            "a.ckpt",
            {"state_dict": {1: torch.ones(2)}},
            "has a 'state_dict' that is not a dictionary from names to tensors",
        ),
        ("a.ckpt", itself(), "lacks bias, weight"),
        ("a.ckpt", {"state_dict": {"weight": "1 2", "bias": None}}, "lacks bias, weight"),
        ("a.ckpt", weights(weight=torch.ones(2, 3).to_sparse()), "has weight sparse, quantized or on the meta device"),
        ("a.ckpt", weights(bias=torch.ones(2, device="meta")), "has bias sparse, quantized or on the meta device"),
        ("a.ckpt", weights(bias=torch.ones(2).int()), "has another kind of numbers .* than the model in bias"),
        ("a.ckpt", weights(bias=torch.ones(2) * 1j), "has another kind of numbers .* than the model in bias"),
        ("a.ckpt", b"", "can't be read as a file of Trainer.save_checkpoint"),
        ("a.ckpt", b"weights", "can't be read as a file of Trainer.save_checkpoint"),
        ("a.ckpt", b"\x80\x02]]a.", "can't be read as a file of Trainer.save_checkpoint"),
        (
            "nothing/a.txt",
            b"",
            "is not a checkpoint. Use a folder with model.safetensors or",
        ),
        ("a.safetensors", b"", "can't be read as safetensors, and may be cut off"),
        ("a.safetensors", struct.pack("<Q", 2**60) + b"{}", "can't be read as safetensors, and may be cut off"),
        ("a.safetensors", header(weight=FLOAT), "can't be read as safetensors, and may be cut off"),
        ("a.safetensors", header(weight={**FLOAT, "dtype": "F77"}), "can't be read as safetensors"),
        ("folder/model.safetensors", header(weight=SHORT)[:-52], "lacks bias"),
        (INDEX, b"{", "can't be read as JSON"),
        (INDEX, b"[" * 200_000, "can't be read as JSON"),
        (INDEX, b"\xff", "can't be read as JSON"),
        (INDEX, b"[]", "must hold a JSON object; it holds a list"),
        (INDEX, b"{}", "has no 'weight_map' from names of tensors to names of files"),
        (INDEX, b'{"weight_map": [1]}', "has no 'weight_map' from names of tensors to names of files"),
        (INDEX, b'{"weight_map": {"a": 1}}', "has no 'weight_map' from names of tensors to names of files"),
        (INDEX, b'{"weight_map": {"a": "b.safetensors"}}', "lacks b.safetensors, which its model.safetensors.index"),
        (INDEX, b'{"weight_map": {"a": "../b.safetensors"}}', r"names \.\./b.safetensors outside of this folder"),
        (INDEX, b'{"weight_map": {"a": "/b.safetensors"}}', "names /b.safetensors outside of this folder"),
        ("folder/config.json", b"{", "config.json' can't be read as JSON"),
        ("folder/config.json", b"[]", "config.json' must hold a JSON object; it holds a list"),
    ],
)
def test_load_weights_of_invalid_file_raises_and_leaves_model_unchanged(
    name: str, content: Any, message: str, tmp_path: Path
) -> None:
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    model = nn.Linear(3, 2)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message) as raised:
        load_weights(model, file if file.parent == tmp_path else file.parent)
    assert "\n" not in str(raised.value)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
