"""Clipping by the whole model's norm also where training begins before ``on_fit_start``."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LearningRateFinder

from lightning_eplb import EPLBCallback
from tests.fidelity import SEQUENCES, TOLERANCE, ShufflePolicy, trainer_for
from tests.models import LanguageModel, hugging_face_model, loader, token_batches
from tests.workers import Workers

TRIED, STEPS = 6, 10


class WithRate(LanguageModel):
    lr = 0.1

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def losses_while_rates_are_tried(ours: bool, folder: str) -> list[float]:
    """On every worker: of the tried steps and of those that follow."""
    finder = LearningRateFinder(0.01, 1.0, num_training_steps=TRIED, early_stop_threshold=None, update_attr=False)
    callbacks: list[Callback] = [EPLBCallback(2, policy=ShufflePolicy(), step_interval=1)] if ours else []
    module = WithRate(hugging_face_model("mixtral"), "")
    trainer = trainer_for(
        2, max_steps=STEPS, gradient_clip_val=0.3, callbacks=[*callbacks, finder], default_root_dir=folder
    )
    trainer.fit(module, loader(token_batches(2 * STEPS * SEQUENCES), SEQUENCES))
    return module.losses


def test_learning_rate_finder_computes_losses_as_unmodified(workers: Workers, tmp_path: Path) -> None:
    unmodified = workers.run(2, losses_while_rates_are_tried, False, str(tmp_path))
    for ours, theirs in zip(workers.run(2, losses_while_rates_are_tried, True, str(tmp_path)), unmodified, strict=True):
        assert len(ours) > STEPS
        assert ours == pytest.approx(theirs, abs=TOLERANCE)
