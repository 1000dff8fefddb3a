"""``inspect`` shows what a run saved."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.distributed.checkpoint.state_dict_saver import save

from lightning_eplb import EPLBCallback, ExpertPlacement
from lightning_eplb.cli import main
from tests.fidelity import SEQUENCES, ShufflePolicy, trainer_for
from tests.models import LanguageModel, hugging_face_model, loader, token_batches
from tests.workers import Workers


def train(folder: str) -> tuple[np.ndarray, np.ndarray]:
    callback = EPLBCallback(2, policy=ShufflePolicy(), step_interval=4, window_size=3)
    checkpoint = ModelCheckpoint(folder, filename="last", enable_version_counter=False)
    trainer = trainer_for(2, max_steps=6, callbacks=[callback, checkpoint], enable_checkpointing=True)
    trainer.fit(LanguageModel(hugging_face_model("mixtral"), "adamw"), loader(token_batches(50), SEQUENCES))
    assert callback.balancer is not None
    return callback.balancer.load.steps().numpy(), callback.balancer.placement.physical_to_logical


def test_inspect_of_run_prints_window_and_placement(
    workers: Workers, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (window_WYL, slots_YP), _ = workers.run(2, train, str(tmp_path))
    load_YL = window_WYL.sum(axis=0)
    placement = ExpertPlacement(slots_YP, 8, 2)
    assert main(["inspect", str(tmp_path / "last.ckpt")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.search(r"optimizer step 6, 2 rearrangements, [\d.]+ MiB moved", lines[0])
    assert lines[1] == "window: the last 3 steps, 2 layers of 8 experts"
    assert lines[2] == "placement: 2 ranks, 2 redundant experts of each layer"
    initial = ExpertPlacement.initial(2, 8, 2, 2)
    for layer in range(2):
        row = next(line for line in lines if line.startswith(f"{layer} ")).split()
        assert int(row[1]) == load_YL[layer].argmax()
        assert float(row[2]) == pytest.approx(load_YL[layer].max() / load_YL[layer].mean(), abs=0.005)
        assert int(row[3]) == (load_YL[layer] == 0).sum()
        assert 0.5 <= float(row[5]) <= 1
        assert int(row[7]) == (placement.primary_rank[layer] != initial.primary_rank[layer]).sum()
        assert int(row[8]) == placement.replica_count[layer].sum() - 8

    assert main(["inspect", str(tmp_path / "last.ckpt"), "--layer", "1"]) == 0
    text = capsys.readouterr().out
    for rank in range(2):
        primaries = " ".join(map(str, placement.by_rank[1, rank, :4]))
        assert re.search(rf"^{rank} .*  {primaries}  ", text, re.MULTILINE)
    assert main(["inspect", str(tmp_path / "last.ckpt"), "--layer", "2"]) == 2
    assert "--layer 2 must be 0 to 1" in capsys.readouterr().err


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


STATE = {"window": torch.ones(2, 1, 4, dtype=torch.int64), "num_rearrangements": 0, "rearranged_bytes": 0}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_inspect_of_sharded_checkpoint_without_placement_prints_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save({"state_dict": {"a": torch.ones(2)}}, checkpoint_id=tmp_path, no_dist=True)
    saved(tmp_path / "meta.pt", {"callbacks": {"EPLBCallback": STATE}, "global_step": 2})
    assert main(["inspect", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "optimizer step 2" in text
    assert "placement: not in this checkpoint" in text
    assert main(["inspect", str(tmp_path), "--layer", "0"]) == 2


def test_inspect_of_several_models_shows_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slots = torch.tensor([[1, 0, 2, 3]])
    models = {
        "main": {"window": STATE["window"], "num_steps": 9, "physical_to_logical": slots},
        "draft": {"window": torch.ones(1, 2, 8, dtype=torch.int64), "num_steps": 1},
    }
    counts = {"num_rearrangements": 3, "rearranged_bytes": 0, "num_ranks": 2}
    path = saved(tmp_path / "a.ckpt", {"callbacks": {"EPLBCallback": {**counts, "models": models}}})
    assert main(["inspect", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    shown = [line for line in lines if line in models or line.startswith(("window", "placement"))]
    assert shown == [
        "main",
        "window: the last 2 steps, 1 layers of 4 experts",
        "placement: 2 ranks, 0 redundant experts of each layer",
        "draft",
        "window: the last 1 steps, 2 layers of 8 experts",
        "placement: not in this checkpoint",
    ]
    assert main(["inspect", str(path), "--model", "main", "--layer", "0"]) == 0
    text = capsys.readouterr().out
    assert "draft" not in text
    assert re.search(r"^0 .*  1 0 ", text, re.MULTILINE)
    for arguments, message in (
        (["--layer", "0"], "--layer 0 needs --model: the checkpoint has the models main, draft"),
        (["--model", "drft"], "--model drft is not in the checkpoint. Use one of main, draft."),
        (["--model", "draft", "--layer", "2"], "--layer 2 must be 0 to 1: the model has 2 MoE layers"),
    ):
        assert main(["inspect", str(path), *arguments]) == 2
        assert message in capsys.readouterr().err


def of_callback(**values: Any) -> dict[str, Any]:
    return {"callbacks": {"EPLBCallback": {**STATE, **values}}}


def itself() -> dict[str, Any]:
    """A dictionary that is in itself."""
    content: dict[str, Any] = {}
    content["callbacks"] = content
    return content


class Code:
    """Something that can't be read without running code."""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"callbacks": {"ModelCheckpoint": {}}}, "has no state of an EPLBCallback"),
        ({"state_dict": {}}, "has no state of an EPLBCallback"),
        ({"callbacks": [1]}, "has no state of an EPLBCallback"),
        ({"callbacks": None}, "has no state of an EPLBCallback"),
        (of_callback(window=3), "its window must be a tensor [steps, layers, experts] of counted tokens"),
        (of_callback(window=torch.ones(3, dtype=torch.int64)), "its window must be a tensor [steps, layers, experts]"),
        (of_callback(window=torch.ones(2, 1, 4)), "its window must be a tensor [steps, layers, experts] of counted"),
        (of_callback(window=-STATE["window"]), "its window must be a tensor [steps, layers, experts] of counted"),
        (of_callback(window=STATE["window"].to_sparse()), "its window must be a tensor [steps, layers, experts]"),
        (of_callback(num_rearrangements="3"), "num_rearrangements and rearranged_bytes must be whole numbers"),
        (
            of_callback(physical_to_logical="x", num_ranks=2),
            "its placement must be a tensor [layers, slots] of experts",
        ),
        (of_callback(physical_to_logical=torch.arange(4)[None]), "num_ranks must be a whole number"),
        (of_callback(models=[]), "its models must be windows by name"),
        (of_callback(models={"teacher": {}}), "its window must be a tensor [steps, layers, experts] of counted"),
        (
            of_callback(physical_to_logical=torch.arange(4)[None], num_ranks=0),
            "must be a positive multiple of num_ranks",
        ),
        (of_callback(physical_to_logical=torch.full((1, 4), 9), num_ranks=2), "physical_to_logical holds expert 9"),
        (itself(), "has no state of an EPLBCallback"),
        ([1, 2], "holds a list"),
        ({"callbacks": Code()}, "without running code"),
    ],
)
def test_inspect_of_other_file_prints_error(
    content: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(saved(tmp_path / "other.ckpt", content))]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("content", [b"", b"no checkpoint at all", b"\x80\x02" + b"]" * 9999 + b"a" * 9998 + b"."])
def test_inspect_of_no_checkpoint_prints_error(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.ckpt").write_bytes(content)
    assert main(["inspect", str(tmp_path / "text.ckpt")]) == 2
    assert "is not a checkpoint" in capsys.readouterr().err


def test_inspect_of_other_folder_prints_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path)]) == 2
    assert "is no checkpoint of Lightning: it has neither an index .metadata nor shards" in capsys.readouterr().err
