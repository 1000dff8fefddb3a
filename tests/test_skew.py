"""A router that sends 60 % of the tokens to one rank: what is logged is what a person counts, and it is mended."""

import csv
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from lightning_eplb import EPLBCallback
from lightning_eplb.policies import Costs
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


def test_training_with_skew_logs_balancedness_of_hand_calculation(workers: Workers, tmp_path: Path) -> None:
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


def test_training_on_one_process_only_logs(tmp_path: Path) -> None:
    logger = CSVLogger(str(tmp_path), name="", version="")
    callback = EPLBCallback(step_interval=4)
    trainer = trainer_for(1, max_steps=STEPS, logger=logger, log_every_n_steps=1, callbacks=[callback])
    trainer.fit(Skewed(), loader(token_batches(STEPS), 1))
    with open(tmp_path / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["eplb/balancedness"]]
    assert [float(row["eplb/balancedness"]) for row in rows] == pytest.approx([12.5 / 20] * STEPS)
    assert [float(row["eplb/max_tokens"]) for row in rows] == [20.0] * STEPS
    assert float(rows[-1]["eplb/rearrangements"]) == 0


def reports(costs: Costs | None) -> tuple[list[str], list[int]]:
    """Return what is told of each decision, on this rank; and the rows that moved."""
    told: list[str] = []
    callback = EPLBCallback(step_interval=4)

    class WithCosts(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            assert callback.balancer is not None
            callback.balancer.costs = costs

    trainer = trainer_for(2, max_steps=STEPS, callbacks=[callback, WithCosts()])
    with patch("lightning_eplb.logging.rearrangement.rank_zero_info", told.append):
        trainer.fit(Skewed(), loader(token_batches(STEPS * 2), 1))
    assert callback.balancer is not None
    latest = callback.balancer.last_rearrangement
    return told, [callback.balancer.num_rearrangements, latest.num_rows if latest is not None else 0]


def test_rearrangement_that_moves_nothing_is_reported(workers: Workers) -> None:
    """After one step and after five."""
    stays = "no expert moved, in no layer would it pay"
    for told, moved in workers.run(2, reports, Costs(1.0, row_within_node=1e9, row_between_nodes=1e9)):
        assert told == [f"step 1: {stays}", f"step 5: {stays}"]
        assert moved == [0, 0]


def test_rearrangement_that_moves_experts_is_reported(workers: Workers) -> None:
    for told, (rearrangements, rows) in workers.run(2, reports, Costs(1.0)):
        assert rearrangements == 1
        assert told[0].startswith(f"step 1: {rows} experts in 1 layer changed ranks, ")
        assert "balancedness of the window 0.833 -> " in told[0]
        assert told[1] == "step 5: no expert moved, in no layer would it pay"


def logged_errors(folder: str) -> list[dict[str, float]]:
    """Return what a logger would be given after each step, on every rank."""
    logged: list[dict[str, float]] = []

    class Listening(Skewed):
        def log_dict(self, values: dict[str, float], *args: Any, **kwargs: Any) -> None:
            logged.append(dict(values))
            super().log_dict(values, *args, **kwargs)

    callback = EPLBCallback(step_interval=4)
    logger = CSVLogger(folder, name="", version="")
    trainer = trainer_for(2, max_steps=STEPS, logger=logger, log_every_n_steps=1, callbacks=[callback])
    trainer.fit(Listening(), loader(token_batches(STEPS * 2), 1))
    return logged


def test_forecast_error_after_first_interval_is_logged(workers: Workers, tmp_path: Path) -> None:
    """Decisions come after 1 and after 5 steps; the load is the same in each step, so the forecast was right."""
    for logged in workers.run(2, logged_errors, str(tmp_path)):
        assert [values.get("eplb/forecast_error") for values in logged] == [None] * 4 + [0.0] * 4
    with open(tmp_path / "metrics.csv") as file:
        rows = [row["eplb/forecast_error"] for row in csv.DictReader(file) if row["eplb/balancedness"]]
    assert rows == [""] * 4 + ["0.0"] * 4
