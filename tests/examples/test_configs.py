"""Every recipe trains, shortened and on the CPU, and leaves what it says."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from lightning_eplb.cli import main
from lightning_eplb.simulation.trace import read_trace
from tests.examples.test_pretrain import REPOSITORY, load_pretrain, run

CONFIGS = REPOSITORY / "examples/configs"
SMALL = """
--trainer.max_steps=6 --trainer.val_check_interval=6 --trainer.limit_val_batches=1 --trainer.log_every_n_steps=1
--model.width=32 --model.heads=2 --model.expert_width=32 --model.layers=2 --model.experts=16 --model.top_k=2
--data.sequence_length=32 --data.batch_size=4 --data.validation_sequences=16
"""


def train(name: str, folder: Path, *others: str, ranks: int = 2, change: tuple[str, str] = ("", "")) -> str:
    """The recipe's own run, with what it writes in ``folder``, in as many CPU processes."""
    config = re.sub(r"\bruns/", f"{folder}/", (CONFIGS / name).read_text()).replace(*change)
    if ranks > 1:
        strategy = "{class_path: DDPStrategy, init_args: {process_group_backend: gloo}}"
        config = config.replace("strategy: ddp", f"strategy: {strategy}")
    (folder / name).write_text(config)
    command = [sys.executable, str(REPOSITORY / "examples/pretrain.py"), "fit", "--config", str(folder / name)]
    on_cpu = ["--trainer.accelerator=cpu", f"--trainer.devices={ranks}"]
    return run([*command, *SMALL.split(), *on_cpu, *others], folder).stdout


def test_recipes_in_folder_are_in_readme() -> None:
    names = {path.name for path in CONFIGS.glob("*.yaml")}
    assert names == {
        "cpu.yaml",
        "elastic.yaml",
        "fine_tune.yaml",
        "monitor.yaml",
        "multi_node_fsdp2.yaml",
        "one_node_ddp.yaml",
    }
    readme = (REPOSITORY / "README.md").read_text()
    for name in names:
        assert f"examples/configs/{name}" in readme
        assert yaml.safe_load((CONFIGS / name).read_text())["trainer"]["callbacks"]


@pytest.mark.slow
def test_fine_tune_recipe_after_one_node_recipe_starts_from_its_weights(tmp_path: Path) -> None:
    output = train("one_node_ddp.yaml", tmp_path)
    assert "6 steps on 2 ranks" in output
    assert read_trace(tmp_path / "one_node/trace.npy").shape == (6, 2, 16)
    saved = torch.load(tmp_path / "one_node/checkpoints/last.ckpt", weights_only=True)
    assert saved["callbacks"]["EPLBCallback"]["num_steps"] == 6

    output = train("fine_tune.yaml", tmp_path, "--model.learning_rate=0")
    assert "6 steps on 2 ranks" in output
    tuned = torch.load(tmp_path / "fine_tune/checkpoints/last.ckpt", weights_only=True)
    for name, tensor in saved["state_dict"].items():
        assert torch.equal(tensor, tuned["state_dict"][name]), name  # at a rate of 0 it is what it started from


@pytest.mark.slow
def test_monitor_recipe_writes_trace_for_report(tmp_path: Path) -> None:
    output = train("monitor.yaml", tmp_path, ranks=1)
    assert "balancedness" in output
    trace = tmp_path / "monitor/trace.npy"
    assert read_trace(trace).shape == (6, 2, 16)
    assert main(["report", str(trace), "-o", str(tmp_path / "report.html"), "--step-interval", "4"]) == 0
    assert (tmp_path / "report.html").exists()


@pytest.mark.slow
def test_multi_node_recipe_on_one_node_writes_checkpoint_for_inspect(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one_node = ["--trainer.num_nodes=1", "--trainer.strategy.init_args.ep_size=2"]
    output = train("multi_node_fsdp2.yaml", tmp_path, *one_node)
    assert "6 steps on 2 ranks" in output
    assert read_trace(tmp_path / "multi_node/trace.npy").shape == (6, 2, 16)
    assert (tmp_path / "multi_node/checkpoints/last.ckpt").is_dir()
    assert main(["inspect", str(tmp_path / "multi_node/checkpoints/last.ckpt")]) == 0
    assert "optimizer step 6" in capsys.readouterr().out


@pytest.mark.slow
def test_elastic_recipe_started_again_on_other_ranks_resumes_from_last_checkpoint(tmp_path: Path) -> None:
    small = ["--trainer.strategy.init_args.ep_size=2", "--data.global_batch_size=8"]
    output = train("elastic.yaml", tmp_path, *small, change=("train_steps: 100", "train_steps: 3"))
    assert "6 steps on 2 ranks" in output
    assert (tmp_path / "elastic/checkpoints/last.ckpt").is_dir()
    output = train("elastic.yaml", tmp_path, *small, "--trainer.max_steps=8", ranks=4)
    assert "8 steps on 4 ranks" in output
    assert read_trace(tmp_path / "elastic/trace.npy").shape == (8, 2, 16)


def test_step_sampler_gives_the_same_sequences_on_any_number_of_ranks() -> None:
    pretrain = load_pretrain()

    def taken(step: int, ranks: int, steps: int) -> list[set[int]]:
        samplers = [
            pretrain.StepSampler(10, 6, SimpleNamespace(global_step=step, global_rank=rank, world_size=ranks))
            for rank in range(ranks)
        ]
        streams = [iter(sampler) for sampler in samplers]
        return [{next(stream) for stream in streams for _ in range(6 // ranks)} for _ in range(steps)]

    steps = taken(0, 1, 5)  # 30 positions: three passes, which end within steps
    assert taken(0, 2, 5) == taken(0, 3, 5) == steps
    assert taken(2, 3, 3) == steps[2:]
    assert steps[0] != steps[1]
