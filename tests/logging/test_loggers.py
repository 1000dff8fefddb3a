"""Pictures reach W&B: in the run's history, on the axis of everything else, from rank zero only."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

from lightning_eplb.logging import draw_expert_load, draw_rank_load, log_heatmaps, takes_pictures
from tests.fresh_interpreter import FreshInterpreter
from tests.logging.offline_run import image_paths, read_history, run_dirs


@pytest.fixture
def wandb_logger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbLogger]:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    yield WandbLogger(project="test", save_dir=tmp_path, offline=True)
    wandb.finish()


def rows_with(run_dir: Path, name: str) -> list[dict[str, Any]]:
    return [row for row in read_history(run_dir) if name in row]


def test_log_heatmaps_with_wandb_writes_pictures(wandb_logger: WandbLogger, tmp_path: Path):
    loggers = [CSVLogger(tmp_path), wandb_logger]
    assert takes_pictures(loggers)
    for step in (25, 125):
        wandb_logger.log_metrics({"eplb/balancedness": step / 1000}, step=step)
        figures = {
            "eplb/expert_load": draw_expert_load([[step, 1, 2, 3]]),
            "eplb/rank_load": draw_rank_load([[step + 1, 5]]),
        }
        log_heatmaps(loggers, step, figures)
    wandb.finish()

    (run_dir,) = run_dirs(tmp_path)
    scalars = rows_with(run_dir, "eplb/balancedness")
    assert [(row["trainer/global_step"], row["eplb/balancedness"]) for row in scalars] == [(25, 0.025), (125, 0.125)]
    for name in ("eplb/expert_load", "eplb/rank_load"):
        rows = rows_with(run_dir, name)
        assert [row["trainer/global_step"] for row in rows] == [25, 125]
        for row in rows:
            (path,) = image_paths(run_dir, row[name])
            size = (row[name]["width"], row[name]["height"])
            with Image.open(path) as picture:
                assert (picture.format, picture.mode, picture.size) == ("PNG", "RGB", size)
                assert min(size) > 200
                assert len(picture.getcolors(maxcolors=2**24)) > 10, "the picture is empty"


class DrawAfterEveryStep(Callback):
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        pl_module.log("eplb/balancedness", 0.5)
        log_heatmaps(trainer.loggers, trainer.global_step - 1, {"eplb/rank_load": draw_rank_load([[1, 2]])})


def test_log_heatmaps_in_training_shares_steps_of_values(wandb_logger: WandbLogger, tmp_path: Path):
    """``trainer.global_step - 1`` is what Lightning gives to loggers for values logged in ``on_train_batch_end``."""
    trainer = Trainer(
        max_steps=3,
        logger=wandb_logger,
        callbacks=[DrawAfterEveryStep()],
        log_every_n_steps=1,
        accelerator="cpu",
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    torch.manual_seed(0)
    trainer.fit(BoringModel())
    wandb.finish()
    (run_dir,) = run_dirs(tmp_path)
    steps = {
        name: [row["trainer/global_step"] for row in rows_with(run_dir, name)]
        for name in ("eplb/rank_load", "eplb/balancedness")
    }
    assert steps == {"eplb/rank_load": [0, 1, 2], "eplb/balancedness": [0, 1, 2]}


def test_log_heatmaps_on_other_ranks_writes_nothing(
    wandb_logger: WandbLogger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    assert not takes_pictures([wandb_logger])
    log_heatmaps([wandb_logger], 3, {"eplb/rank_load": draw_rank_load([[1, 2]])})
    assert run_dirs(tmp_path) == []


def test_log_heatmaps_with_csv_logger_does_nothing(tmp_path: Path):
    loggers = [CSVLogger(tmp_path)]
    assert not takes_pictures(loggers)
    log_heatmaps(loggers, 3, {"eplb/rank_load": draw_rank_load([[1, 2]])})
    log_heatmaps([], 3, {"eplb/rank_load": draw_rank_load([[1, 2]])})


def test_log_heatmaps_without_wandb_logger_does_not_import_it(tmp_path: Path, fresh_interpreter: FreshInterpreter):
    program = (
        "import sys; from lightning.pytorch.loggers import CSVLogger; from lightning_eplb.logging import *;"
        f"log_heatmaps([CSVLogger({str(tmp_path)!r})], 3, {{'load': draw_rank_load([[1, 2]])}});"
        "print('wandb' in sys.modules)"
    )
    assert fresh_interpreter.run(program).strip() == "False"


def test_read_history_of_long_run_is_complete(wandb_logger: WandbLogger, tmp_path: Path):
    """Records that cross the file's blocks of 32 KiB are put together again."""
    text = "x" * 50_000
    for step in range(200):
        wandb_logger.log_metrics({"value": step}, step=step)
    wandb_logger.experiment.log({"long": text})
    wandb_logger.log_metrics({"value": 200}, step=200)
    wandb.finish()
    (run_dir,) = run_dirs(tmp_path)
    assert [row["value"] for row in rows_with(run_dir, "value")] == list(range(201))
    assert [row["long"] for row in rows_with(run_dir, "long")] == [text]


def test_read_history_of_unfinished_run_raises(wandb_logger: WandbLogger, tmp_path: Path):
    wandb_logger.log_metrics({"value": 1}, step=0)
    (run_dir,) = run_dirs(tmp_path)
    with pytest.raises(TimeoutError, match="has no exit"):
        read_history(run_dir, patience_seconds=0.2)
