"""A training for ``torchrun``: agents that come and go, and a global batch that is the same on any number of ranks."""

import faulthandler
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch import distributed as dist
from torch.utils.data import DataLoader, IterableDataset

from lightning_eplb import EPLBCallback, ExpertParallelStrategy, PreemptionCheckpoint
from tests.fidelity import ShufflePolicy
from tests.models import LanguageModel, ShardedLanguageModel, hugging_face_model, language_loss, token_batches

EXPERTS, GLOBAL_BATCH = 12, 12
"""Divisible by 2, 3 and 4 ranks."""


def tokens_of(step: int) -> Tensor:
    """Sequences of all ranks in an optimizer step."""
    return token_batches(GLOBAL_BATCH, seed=step)


class GlobalBatches(IterableDataset):
    """This rank's sequences of each step, from the step that the trainer resumes at."""

    trainer: Trainer

    def __iter__(self) -> Iterator[Tensor]:
        step = self.trainer.global_step
        while True:
            yield tokens_of(step)[self.trainer.global_rank :: self.trainer.world_size]
            step += 1


class Recorded:
    """Mixin that lets rank 0 write each step's loss to a file, and makes a step take some time.

    The models compute norms and routers in float32. Their gradients are rounded alike on any number of ranks only if
    the loss is divided by the same number on each. So it is, and gradients are multiplied afterwards.
    """

    folder: Path
    seconds = 0.0
    trainer: Trainer

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        time.sleep(self.seconds)
        step, ranks = self.trainer.global_step, self.trainer.world_size
        loss = super().training_step((batch,), batch_idx) / ranks  # type: ignore[misc]
        total = loss.detach().clone()
        if ranks > 1:
            dist.all_reduce(total)
        if self.trainer.is_global_zero:
            line = {"step": step, "loss": total.item(), "ranks": ranks, "time": time.time()}
            with (self.folder / "steps.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad.mul_(self.trainer.world_size)


class ElasticModel(Recorded, LanguageModel):
    """Under DDP."""


class ShardedElasticModel(Recorded, ShardedLanguageModel):
    """Under ``ExpertParallelStrategy``."""


def train(kind: str, folder: Path, steps: int, every: int, seconds: float, **arguments: Any) -> Trainer:
    """Train with experts that are shuffled after every step; as many nodes as have come."""
    (folder / f"{os.getppid()}.pid").write_text(str(os.getpid()))  # of this agent's worker
    model = hugging_face_model("mixtral", EXPERTS)
    module, strategy = ElasticModel(model, "adamw"), DDPStrategy(process_group_backend="gloo")
    if kind == "sharded":
        module, strategy = ShardedElasticModel(model, "adamw"), ExpertParallelStrategy(process_group_backend="gloo")
    checkpoint = PreemptionCheckpoint(
        folder / "checkpoints", "last", every_n_train_steps=every, enable_version_counter=False
    )
    data = GlobalBatches()
    settings = {
        "accelerator": "cpu",
        "strategy": strategy,
        "devices": int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
        "num_nodes": int(os.environ.get("GROUP_WORLD_SIZE", 1)),
        "max_steps": steps,
        "callbacks": [EPLBCallback(policy=ShufflePolicy(), step_interval=2), checkpoint],
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
    }
    data.trainer = trainer = Trainer(**settings | arguments)
    module.folder, module.seconds = folder, seconds
    trainer.fit(module, DataLoader(data, batch_size=None), ckpt_path="last")
    return trainer


def reference(steps: int) -> list[float]:
    """Losses of one process, plain PyTorch and the unmodified model."""
    model = hugging_face_model("mixtral", EXPERTS)
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    losses = []
    for step in range(steps):
        loss = language_loss(model, tokens_of(step))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


def read_steps(folder: Path) -> list[dict[str, Any]]:
    """Lines that rank 0 has written so far."""
    file = folder / "steps.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


if __name__ == "__main__":
    faulthandler.register(signal.SIGUSR2)
    torch.set_num_threads(1)
    train(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5]))
    dist.destroy_process_group()
