"""What a run leaves in Weights & Biases, and in a CSV file."""

import csv
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch.loggers import CSVLogger, WandbLogger

from lightning_eplb import EPLBCallback
from lightning_eplb.scalars import SCALARS
from tests.fidelity import SEQUENCES, ShufflePolicy, trainer_for
from tests.logging.offline_run import image_paths, read_history, run_dirs
from tests.models import LanguageModel, hugging_face_model, loader, token_batches
from tests.workers import Workers

STEPS = 6
LAYER_GROUPS = ["eplb/balancedness_layers/0-0", "eplb/balancedness_layers/1-1"]
PICTURES = ["eplb/expert_load", "eplb/rank_load"]
NAMES = {*SCALARS, *LAYER_GROUPS} - {"eplb/balancedness_layers/A-B"}


def train(folder: str) -> list[int]:
    import wandb

    rank_folder = Path(folder, f"rank{dist.get_rank()}")
    rank_folder.mkdir()
    loggers: list[Any] = [
        WandbLogger(save_dir=str(rank_folder), offline=True),
        CSVLogger(str(rank_folder), name="csv", version=""),
    ]
    callback = EPLBCallback(2, policy=ShufflePolicy(), step_interval=4)
    trainer = trainer_for(2, max_steps=STEPS, logger=loggers, log_every_n_steps=1, callbacks=[callback])
    trainer.fit(LanguageModel(hugging_face_model("mixtral"), "adamw"), loader(token_batches(50), SEQUENCES))
    wandb.finish()
    assert callback.balancer is not None
    return [callback.balancer.num_rearrangements]


def test_names_pictures_and_silence_above_rank_zero(workers: Workers, tmp_path: Path) -> None:
    assert workers.run(2, train, str(tmp_path)) == [[2], [2]]
    (run,) = run_dirs(tmp_path / "rank0")
    history = read_history(run)
    assert {name for row in history for name in row if name.startswith("eplb/")} == {*NAMES, *PICTURES}
    for name in ("eplb/expert_load", "eplb/rank_load"):
        rows = [row for row in history if name in row]
        assert [row["trainer/global_step"] for row in rows] == [0, 4]
        for row in rows:
            (path,) = image_paths(run, row[name])
            assert path.read_bytes().startswith(b"\x89PNG")
    logged = {row["trainer/global_step"] for row in history if "eplb/balancedness" in row}
    assert logged == set(range(STEPS))

    with open(tmp_path / "rank0" / "csv" / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert all(rows[-1][name] for name in NAMES)
    assert [path for path in (tmp_path / "rank1").rglob("*") if path.is_file()] == []
