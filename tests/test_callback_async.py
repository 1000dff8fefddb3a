"""Experts that move behind the steps, in what people do with a Trainer: the same training as when they move between."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_eplb import EPLBCallback
from tests.fidelity import SEQUENCES, TOLERANCE, ShufflePolicy, trainer_for
from tests.models import LanguageModel, hugging_face_model, loader, token_batches
from tests.workers import Workers

LAYERS, BATCHES, RANKS = 3, 12, 2


class Model(LanguageModel):
    def __init__(self) -> None:
        super().__init__(hugging_face_model("mixtral", layers=LAYERS), "adamw")


class FailsOnce(Model):
    has_failed = False

    def training_step(self, batch: tuple[Tensor], batch_idx: int) -> Tensor:
        if self.trainer.global_step == 3 and not self.has_failed:
            self.has_failed = True
            raise ValueError("once")
        return super().training_step(batch, batch_idx)


class StepsOnEverySecondBatch(Model):
    """Lightning's own way to do it; its ``global_step`` rises with every batch."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        if batch_idx % 2:
            optimizer.step(closure=optimizer_closure)
        else:
            optimizer_closure()

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        if batch_idx % 2 == 0:
            optimizer.zero_grad()


class WithCritic(Model):
    """An optimizer without experts steps while the experts' graph is alive."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(0)
        self.critic = nn.Linear(64, 1).double()
        self._ddp_params_and_buffers_to_ignore = ["critic.weight", "critic.bias"]

    def training_step(self, batch: tuple[Tensor], batch_idx: int) -> None:
        models, critics = self.optimizers()  # type: ignore[misc]
        logits = self.model(input_ids=batch[0], use_cache=False).logits
        (self.critic(logits.detach()) - 1).square().mean().backward()
        critics.step()
        critics.zero_grad()
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[0][:, 1:].flatten())
        self.manual_backward(loss)
        models.step()
        models.zero_grad()

    def configure_optimizers(self) -> Any:
        return [super().configure_optimizers(), torch.optim.SGD(self.critic.parameters(), lr=0.1)]


class WithNewOptimizers(Model):
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 4:
            self.trainer.strategy.setup_optimizers(self.trainer)


class FrozenExperts(Model):
    """No optimizer holds an expert, as where adapters are trained."""

    def __init__(self) -> None:
        super().__init__()
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_("experts" not in name)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=3e-3)


def data(ranks: int = RANKS) -> Any:
    return loader(token_batches(BATCHES * RANKS * SEQUENCES), RANKS * SEQUENCES // ranks)


def eplb(use_async: bool) -> EPLBCallback:
    return EPLBCallback(2, policy=ShufflePolicy(), step_interval=8, use_async=use_async)


def train(kind: type[Model], use_async: bool) -> tuple[dict[str, Tensor], int]:
    """On every worker: the weights at the end, and how many rearrangements were told."""
    model, callback = kind(), eplb(use_async)
    with patch("lightning_eplb.balancer.cost_model.MAX_BYTES_IN_FLIGHT", 1):  # a layer between two steps
        trainer_for(RANKS, max_epochs=1, callbacks=[callback]).fit(model, data())
    assert callback.balancer is not None
    return {name: tensor.clone() for name, tensor in model.model.state_dict().items()}, (
        callback.balancer.num_rearrangements
    )


def difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    return max(float((ours[name] - tensor).abs().max()) for name, tensor in theirs.items())


@pytest.mark.parametrize("use_async", [False, True])
@pytest.mark.parametrize("kind", [StepsOnEverySecondBatch, WithNewOptimizers])
def test_callback_with_kept_gradients_or_new_optimizers_trains_as_unmodified(
    kind: type[Model], use_async: bool, workers: Workers
) -> None:
    """Against one process without us."""
    alone = kind()
    trainer_for(1, max_epochs=1).fit(alone, data(1))
    for weights, rearrangements in workers.run(RANKS, train, kind, use_async):
        assert rearrangements
        assert difference(weights, alone.model.state_dict()) < TOLERANCE


def test_callback_async_with_optimizer_without_experts_trains_as_sync(workers: Workers) -> None:
    between, behind = (workers.run(RANKS, train, WithCritic, use_async) for use_async in (False, True))
    for (ours, rearrangements), (theirs, _) in zip(behind, between, strict=True):
        assert rearrangements
        assert difference(ours, theirs) < TOLERANCE


def test_callback_async_with_frozen_experts_trains_as_sync(workers: Workers) -> None:
    between, behind = (workers.run(RANKS, train, FrozenExperts, use_async) for use_async in (False, True))
    for (ours, rearrangements), (theirs, _) in zip(behind, between, strict=True):
        assert rearrangements
        assert difference(ours, theirs) < TOLERANCE


def fail_and_resume(use_async: bool, folder: str) -> dict[str, Tensor]:
    """On every worker: training fails while rows are under way, and goes on from a file with the same objects."""
    model, callback = FailsOnce(), eplb(use_async)
    checkpoint = ModelCheckpoint(folder, "x", every_n_train_steps=1, enable_version_counter=False)
    with patch("lightning_eplb.balancer.cost_model.MAX_BYTES_IN_FLIGHT", 1):
        with pytest.raises(ValueError, match="once"):
            trainer_for(RANKS, max_steps=4, callbacks=[callback, checkpoint], enable_checkpointing=True).fit(
                model, data()
            )
        assert callback.balancer is not None
        assert callback.balancer._mover.is_in_flight == use_async
        trainer_for(RANKS, max_steps=8, callbacks=[callback]).fit(model, data(), ckpt_path=folder + "/x.ckpt")
    return {name: tensor.clone() for name, tensor in model.model.state_dict().items()}


def test_callback_async_after_loading_weights_cancels_transfer(workers: Workers, tmp_path: Path) -> None:
    between, behind = (
        workers.run(RANKS, fail_and_resume, use_async, str(tmp_path / str(use_async))) for use_async in (False, True)
    )
    for ours, theirs in zip(behind, between, strict=True):
        assert difference(ours, theirs) < TOLERANCE


def save_under_way(path: str) -> tuple[int, int]:
    """On every worker: rearrangements told until the file is saved, and right after a run goes on from it."""
    first, second = eplb(True), eplb(True)

    class Save(pl.Callback):
        told = -1

        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 3:
                assert first.balancer is not None
                self.told = first.balancer.num_rearrangements
                trainer.save_checkpoint(path)

    save = Save()
    with patch("lightning_eplb.balancer.cost_model.MAX_BYTES_IN_FLIGHT", 1):
        trainer_for(RANKS, max_steps=4, callbacks=[first, save]).fit(Model(), data())
        trainer_for(RANKS, max_steps=5, callbacks=[second]).fit(Model(), data(), ckpt_path=path)
    assert second.balancer is not None
    return save.told, second.balancer.num_rearrangements


def test_callback_async_resumed_in_flight_rearranges(workers: Workers, tmp_path: Path) -> None:
    assert workers.run(RANKS, save_under_way, str(tmp_path / "x.ckpt")) == [(0, 1)] * RANKS


def save_when_due(path: str) -> tuple[int, int]:
    """On every worker: the same, saved after the step in which a decision became due and before it was made."""
    first, second = eplb(True), eplb(True)

    class Save(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 2:
                trainer.save_checkpoint(path)

    trainer_for(RANKS, max_steps=2, callbacks=[first, Save()]).fit(Model(), data())
    trainer_for(RANKS, max_steps=3, callbacks=[second]).fit(Model(), data(), ckpt_path=path)
    assert first.balancer is not None
    assert second.balancer is not None
    return first.balancer.num_rearrangements, second.balancer.num_rearrangements


def test_callback_async_resumed_when_due_rearranges(workers: Workers, tmp_path: Path) -> None:
    assert workers.run(RANKS, save_when_due, str(tmp_path / "x.ckpt")) == [(0, 1)] * RANKS
