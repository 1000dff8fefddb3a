"""The example's command, shortened: two processes, and what it leaves behind."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_eplb.simulation.trace import read_trace

REPOSITORY = Path(__file__).parents[2]
# What pays depends on the speeds that are measured. So it is told to exchange two experts of each layer.
SWAPPED = [15, *range(1, 8), 8, *range(8, 15), 0, 1]
MOVES = f"""step_interval: 16
        policy:
          class_path: lightning_eplb.StaticPolicy
          init_args: {{physical_to_logical: {[SWAPPED, SWAPPED]}}}"""
SMALL = """
--trainer.max_steps=12 --trainer.val_check_interval=6 --model.width=64 --model.expert_width=64 --model.layers=2
--data.sequence_length=32 --data.batch_size=4 --data.validation_sequences=16 --trainer.accumulate_grad_batches=2
"""


@pytest.mark.distributed
def test_pretrain_with_command_of_readme_trains_and_resumes(tmp_path: Path) -> None:
    command = [sys.executable, str(REPOSITORY / "examples/pretrain.py"), "fit"]
    config = (REPOSITORY / "examples/configs/cpu.yaml").read_text()
    config = config.replace("runs/pretrain", str(tmp_path)).replace("step_interval: 160", MOVES)
    (tmp_path / "cpu.yaml").write_text(config)
    command += ["--config", str(tmp_path / "cpu.yaml"), *SMALL.split()]
    done = run(command, tmp_path)
    for words in ("balancedness", "tokens per second", "validation loss", "without the first 10 steps"):
        assert words in done.stdout
    assert done.stdout.count("12 steps on 2 ranks") == 1
    assert int(re.findall(r"rearrangements\W+(\d+)", done.stdout)[0]) >= 1
    assert float(re.findall(r"moved between ranks\W+([\d.]+) MiB", done.stdout)[0]) > 0
    # The progress bar, in a terminal of 80 columns.
    assert re.search(r"\d+/\d+ \[.*, loss=\d+\.\d+, balancedness=\d\.\d+", done.stdout + done.stderr)
    for name in ("checkpoint", "heatmap", "logs"):
        assert (tmp_path / re.findall(rf"^{name} +(.+)$", done.stdout, re.MULTILINE)[0]).exists()
    assert (tmp_path / "expert_load.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "logs/version_0/metrics.csv").exists()

    assert read_trace(tmp_path / "trace.npy").shape == (12, 2, 16)

    checkpoint = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 12
    model = load_pretrain().MoELanguageModel(width=64, expert_width=64, layers=2)
    model.load_state_dict(checkpoint["state_dict"], strict=True)

    # Resumed where nothing is left to do, it has nothing to sum up, and says so by ending well.
    run([*command, "--ckpt_path", str(tmp_path / "checkpoints/last.ckpt")], tmp_path)


def load_pretrain() -> Any:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("pretrain", REPOSITORY / "examples/pretrain.py")
    assert spec is not None
    assert spec.loader is not None
    pretrain = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pretrain)
    return pretrain


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in {"RANK", "LOCAL_RANK", "WORLD_SIZE"}}
    environment["COLUMNS"] = "80"
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done
