"""Logs of a run in Weights & Biases, in TensorBoard and in a CSV file."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from PIL import Image

from lightning_eplb import EPLBCallback, ExpertPlacement
from lightning_eplb.logging.loggers import HISTOGRAM, PICTURES, TABLE
from lightning_eplb.logging.scalars import SCALARS
from tests.fidelity import SEQUENCES, ShufflePolicy, trainer_for
from tests.logging.offline_run import image_paths, read_history, run_dirs
from tests.models import LanguageModel, hugging_face_model, loader, token_batches
from tests.workers import Workers

STEPS = 6
LAYER_GROUPS = ["eplb/balancedness_layers/0-0", "eplb/balancedness_layers/1-1"]
NAMES = {*SCALARS, *LAYER_GROUPS} - {"eplb/balancedness_layers/A-B"}


def train(folder: str) -> tuple[int, np.ndarray, np.ndarray]:
    import wandb

    rank_folder = Path(folder, f"rank{dist.get_rank()}")
    rank_folder.mkdir()
    loggers: list[Any] = [
        WandbLogger(save_dir=str(rank_folder), offline=True),
        CSVLogger(str(rank_folder), name="csv", version=""),
        TensorBoardLogger(str(rank_folder), name="tensorboard", version=""),
    ]
    callback = EPLBCallback(2, policy=ShufflePolicy(), step_interval=4)
    trainer = trainer_for(2, max_steps=STEPS, logger=loggers, log_every_n_steps=1, callbacks=[callback])
    trainer.fit(LanguageModel(hugging_face_model("mixtral"), "adamw"), loader(token_batches(50), SEQUENCES))
    wandb.finish()
    balancer = callback.balancer
    assert balancer is not None
    return balancer.num_rearrangements, balancer.placement.physical_to_logical, balancer.load.compute()["load"].numpy()


@pytest.fixture(scope="module")
def run(workers: Workers, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ExpertPlacement, np.ndarray]:
    """The folder of a run with three loggers, its last placement and the load of its window."""
    folder = tmp_path_factory.mktemp("run")
    (rearrangements, slots_YP, load_YL), (others, *_) = workers.run(2, train, str(folder))
    assert rearrangements == others == 2
    return folder, ExpertPlacement(slots_YP, 8, 2), load_YL


def test_training_with_wandb_logs_all_names(run: tuple[Path, ExpertPlacement, np.ndarray]) -> None:
    folder, placement, load_YL = run
    (run_dir,) = run_dirs(folder / "rank0")
    history = read_history(run_dir)
    logged = {name for row in history for name in row if name.startswith("eplb/")}
    assert logged == {*NAMES, *PICTURES, HISTOGRAM, TABLE}
    assert all("trainer/global_step" in row for row in history if any(name in row for name in logged))
    for name in PICTURES:
        rows = [row for row in history if name in row]
        assert [row["trainer/global_step"] for row in rows] == [0, 4]
        for row in rows:
            (path,) = image_paths(run_dir, row[name])
            with Image.open(path) as picture:
                assert picture.format == "PNG"
                assert picture.size == (row[name]["width"], row[name]["height"])
                assert len(picture.getcolors(maxcolors=2**24)) > 10, "the picture is empty"
    for name in ("eplb/balancedness", HISTOGRAM):
        assert [row["trainer/global_step"] for row in history if name in row] == list(range(STEPS))
    histogram = next(row[HISTOGRAM] for row in history if HISTOGRAM in row)
    assert histogram["_type"] == "histogram"
    assert sum(histogram["values"]) == 2 * 8  # an expert of a layer each
    (table,) = (row[TABLE] for row in history if TABLE in row)
    content = json.loads((run_dir / "files" / table["path"]).read_text())
    assert content["columns"] == ["layer", "expert", "rank", "ranks of redundant experts", "tokens", "times even"]
    assert len(content["data"]) == 2 * 8
    for layer, expert, rank, _, tokens, share in content["data"]:
        assert rank == placement.primary_rank[layer, expert]
        assert tokens == load_YL[layer, expert]
        assert share == pytest.approx(tokens / load_YL[layer].mean(), abs=1e-3)


def test_training_with_csv_logs_all_scalars(run: tuple[Path, ExpertPlacement, np.ndarray]) -> None:
    with open(run[0] / "rank0" / "csv" / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == STEPS
    assert all(rows[-1][name] for name in NAMES)
    last = {name: float(rows[-1][name]) for name in NAMES}
    assert last["eplb/max_over_mean"] == pytest.approx(1 / last["eplb/balancedness"])
    assert last["eplb/balancedness"] == pytest.approx(last["eplb/avg_tokens"] / last["eplb/max_tokens"])
    parts = last["eplb/rearrange_plan_seconds"] + last["eplb/rearrange_exchange_seconds"]
    assert 0 < parts <= last["eplb/rearrange_seconds"] * (1 + 1e-6)  # Lightning keeps them in float32
    assert 0 < last["eplb/entropy"] < 1 < last["eplb/hottest_expert"] <= 8


def test_training_with_tensorboard_logs_all_names(run: tuple[Path, ExpertPlacement, np.ndarray]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run[0] / "rank0" / "tensorboard"))
    events.Reload()
    tags: Any = events.Tags()
    assert {name for name in tags["scalars"] if name.startswith("eplb/")} == NAMES
    assert set(tags["images"]) == set(PICTURES)
    assert tags["histograms"] == [HISTOGRAM]
    assert [event.step for event in events.Scalars("eplb/balancedness")] == list(range(STEPS))
    assert [event.step for event in events.Images("eplb/rank_load")] == [0, 4]
    assert all(event.width > 200 < event.height for event in events.Images("eplb/rank_load"))


def test_training_on_other_ranks_writes_no_file(run: tuple[Path, ExpertPlacement, np.ndarray]) -> None:
    assert [path for path in (run[0] / "rank1").rglob("*") if path.is_file()] == []
