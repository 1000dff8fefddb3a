"""Ranks whose copies of what DDP averages drift apart are told."""

import warnings
from typing import Any
from unittest.mock import patch

import pytest
import torch
from lightning.pytorch import Callback

from lightning_eplb import EPLBCallback, ExpertParallelStrategy
from lightning_eplb.integrations.ddp import PIECE
from tests.fidelity import SEQUENCES, ShufflePolicy, trainer_for
from tests.models import LanguageModel, ShardedLanguageModel, hugging_face_model, loader, token_batches
from tests.workers import Workers

CLIP, STEPS = 0.3, 4


class ClipsByItself(LanguageModel):
    """By the norm of what this rank has."""

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        torch.nn.utils.clip_grad_norm_(self.parameters(), CLIP)


class ClipsLater(LanguageModel):
    """Not in the first step."""

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.global_step > 1:
            torch.nn.utils.clip_grad_norm_(self.parameters(), CLIP)


class ClipsThroughLightning(LanguageModel):
    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        self.clip_gradients(optimizer, CLIP, "norm")


def warnings_of(kind: type[LanguageModel], piece: int = PIECE) -> list[str]:
    """On every worker: those of a short training, with so many elements added up at a time."""
    callbacks: list[Callback] = [EPLBCallback(policy=ShufflePolicy(), step_interval=1)]
    strategy = ExpertParallelStrategy() if kind is ShardedLanguageModel else None
    with warnings.catch_warnings(record=True) as caught, patch("lightning_eplb.integrations.ddp.PIECE", piece):
        warnings.simplefilter("always")
        trainer = trainer_for(2, strategy, max_steps=STEPS, callbacks=callbacks)
        trainer.fit(kind(hugging_face_model("mixtral"), "sgd"), loader(token_batches(2 * STEPS * SEQUENCES), SEQUENCES))
    return [str(each.message) for each in caught if "all ranks" in str(each.message)]


@pytest.mark.parametrize(("kind", "piece"), [(ClipsByItself, PIECE), (ClipsLater, PIECE), (ClipsByItself, 100)])
def test_dense_weights_clipped_by_local_norm_warn_once(kind: type[LanguageModel], piece: int, workers: Workers) -> None:
    (message,), nothing = workers.run(2, warnings_of, kind, piece)  # rank 0 warns
    assert message.startswith("model.model.embed_tokens.weight is no longer the same on all ranks")
    assert "self.clip_gradients(optimizer, ...)" in message
    assert nothing == []


@pytest.mark.parametrize("kind", [LanguageModel, ClipsThroughLightning, ShardedLanguageModel])
def test_dense_weights_equal_on_ranks_warn_nothing(kind: type[LanguageModel], workers: Workers) -> None:
    assert workers.run(2, warnings_of, kind) == [[], []]
