"""The example's command, shortened: two processes, and what it leaves behind."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import torch

from lightning_eplb.trace import read_trace

REPOSITORY = Path(__file__).parents[2]
SMALL = """
--trainer.max_steps=12 --trainer.val_check_interval=6 --model.width=32 --model.expert_width=32 --model.layers=2
--data.sequence_length=32 --data.batch_size=4 --data.validation_sequences=16
"""


def test_the_command_of_the_readme(tmp_path: Path) -> None:
    command = [sys.executable, str(REPOSITORY / "examples/pretrain.py"), "fit"]
    config = (REPOSITORY / "examples/configs/cpu.yaml").read_text()
    config = config.replace("runs/pretrain", str(tmp_path)).replace("step_interval: 160", "step_interval: 16")
    (tmp_path / "cpu.yaml").write_text(config)
    environment = {k: v for k, v in os.environ.items() if k not in {"RANK", "LOCAL_RANK", "WORLD_SIZE"}}
    done = subprocess.run(
        [*command, "--config", str(tmp_path / "cpu.yaml"), *SMALL.split()],
        capture_output=True,
        text=True,
        timeout=200,
        cwd=tmp_path,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for words in ("balancedness", "tokens per second", "rearrangements", "moved between ranks", "validation loss"):
        assert words in done.stdout
    assert done.stdout.count("12 steps on 2 ranks") == 1
    assert (tmp_path / "expert_load.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "logs/version_0/metrics.csv").exists()

    assert read_trace(tmp_path / "trace.npy").shape == (12, 2, 16)

    checkpoint = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 12
    spec = importlib.util.spec_from_file_location("pretrain", REPOSITORY / "examples/pretrain.py")
    assert spec is not None
    assert spec.loader is not None
    pretrain = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pretrain)
    model = pretrain.MoELanguageModel(width=32, expert_width=32, layers=2)
    model.load_state_dict(checkpoint["state_dict"], strict=True)
