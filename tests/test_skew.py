"""A router that sends 60 % of the tokens to one rank: what is logged is what a person counts, and it is mended."""

import csv
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from lightning_eplb import EPLBCallback
from tests.fidelity import trainer_for
from tests.models import loader, token_batches
from tests.workers import Workers

EXPERTS, TOKENS, STEPS = 8, 100, 8
# Of 100 tokens a rank, top-1: experts 0-3, all on rank 0 of 2, get 60; no expert is hotter than half of a rank's share.
TOKENS_OF_EXPERT = [20, 16, 14, 10, 12, 12, 8, 8]


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_experts = EXPERTS
        self.weight = nn.Parameter(torch.ones(EXPERTS, 4, 4, dtype=torch.float64))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        output = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique():
            token, k = torch.where(top_k_index == expert)
            output = output.index_add(
                0, token, hidden_states[token] @ self.weight[expert] * top_k_weights[token, k, None]
            )
        return output


class Skewed(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.experts = Experts()
        self.embedding = nn.Parameter(torch.ones(TOKENS, 4, dtype=torch.float64))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        index = torch.repeat_interleave(torch.arange(EXPERTS), torch.tensor(TOKENS_OF_EXPERT)).unsqueeze(1)
        hidden = self.embedding
        return self.experts(hidden, index, torch.ones(TOKENS, 1, dtype=torch.float64)).mean()

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.training_step(batch, batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


def train(folder: str) -> None:
    logger = CSVLogger(folder, name="", version="")
    trainer = trainer_for(
        2,
        max_steps=STEPS,
        val_check_interval=1,
        logger=logger,
        log_every_n_steps=1,
        callbacks=[EPLBCallback(step_interval=16)],
    )
    trainer.fit(Skewed(), loader(token_batches(STEPS * 2), 1), loader(token_batches(4), 1))


def test_logged_balancedness_is_the_count_by_hand(workers: Workers, tmp_path: Path) -> None:
    workers.run(2, train, str(tmp_path))
    with open(tmp_path / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["eplb/balancedness"]]
    balancedness = [float(row["eplb/balancedness"]) for row in rows]
    # Both ranks send 60 of 100 tokens to rank 0: it serves 120, rank 1 serves 80, the mean is 100.
    assert balancedness[:4] == pytest.approx([100 / 120] * 4, abs=1e-6)  # Lightning logs float32
    assert [float(row["eplb/max_tokens"]) for row in rows[:4]] == [120.0] * 4
    assert [float(row["eplb/avg_tokens"]) for row in rows] == [100.0] * STEPS
    assert min(balancedness[4:]) > 0.95
    assert float(rows[2]["eplb/rearrangements"]) == 0
    assert rows[2]["eplb/rearranged_bytes"] == ""
    assert float(rows[-1]["eplb/rearrangements"]) == 1
    expert_bytes = 2 * 4 * 4 * 8  # float64 weights and as much momentum
    assert float(rows[-1]["eplb/rearranged_bytes"]) in [expert_bytes * experts for experts in range(2, 9, 2)]


def test_one_process_only_watches(tmp_path: Path) -> None:
    logger = CSVLogger(str(tmp_path), name="", version="")
    callback = EPLBCallback(step_interval=4)
    trainer = trainer_for(1, max_steps=STEPS, logger=logger, log_every_n_steps=1, callbacks=[callback])
    trainer.fit(Skewed(), loader(token_batches(STEPS), 1))
    with open(tmp_path / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["eplb/balancedness"]]
    assert [float(row["eplb/balancedness"]) for row in rows] == pytest.approx([12.5 / 20] * STEPS)
    assert [float(row["eplb/max_tokens"]) for row in rows] == [20.0] * STEPS
    assert float(rows[-1]["eplb/rearrangements"]) == 0
