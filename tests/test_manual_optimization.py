"""Manual optimization: own accumulation, own clipping, two optimizers, one of them with gradients still pending."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_eplb import EPLBCallback
from tests.fidelity import SEQUENCES, TOLERANCE, ShufflePolicy, trainer_for
from tests.models import LanguageModel, hugging_face_model, language_loss, loader, token_batches
from tests.workers import Workers

BATCHES, CLIP = 12, 0.3


def split(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    named = list(model.named_parameters())
    return [p for n, p in named if "experts" in n], [p for n, p in named if "experts" not in n]


def optimizers_of(model: nn.Module) -> list[torch.optim.Optimizer]:
    experts, dense = split(model)
    return [torch.optim.SGD(experts, lr=0.1, momentum=0.9), torch.optim.AdamW(dense, lr=3e-3)]


class Manual(LanguageModel):
    """The experts' optimizer steps every third batch, the other one with each: experts move while gradients pend."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, "")
        self.automatic_optimization = False

    def training_step(self, batch: tuple[Tensor], batch_idx: int) -> None:  # type: ignore[override]
        experts, dense = self.optimizers()  # type: ignore[misc]
        loss = language_loss(self.model, batch[0])
        self.losses.append(loss.item())
        self.manual_backward(loss)
        self.clip_gradients(dense, gradient_clip_val=CLIP, gradient_clip_algorithm="norm")
        dense.step()
        dense.zero_grad()
        if batch_idx % 3 == 2:
            self.clip_gradients(experts, gradient_clip_val=CLIP, gradient_clip_algorithm="norm")
            experts.step()
            experts.zero_grad()

    def configure_optimizers(self) -> Any:
        return optimizers_of(self.model)


def tokens() -> Tensor:
    return token_batches(BATCHES * 2 * SEQUENCES)


def train() -> tuple[list[float], dict[str, Tensor], int]:
    callback = EPLBCallback(2, policy=ShufflePolicy(), step_interval=1)
    trainer = trainer_for(2, max_epochs=1, callbacks=[callback])
    module = Manual(hugging_face_model("mixtral"))
    trainer.fit(module, loader(tokens(), SEQUENCES))
    assert callback.balancer is not None
    return module.losses, module.model.state_dict(), callback.balancer.num_rearrangements


def test_manual_optimization_with_two_optimizers_trains_as_one_process(workers: Workers) -> None:
    model = hugging_face_model("mixtral")
    experts, dense = optimizers_of(model)
    losses = []
    for i, batch in enumerate(tokens().split(2 * SEQUENCES)):
        loss = language_loss(model, batch)
        losses.append(loss.item())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(split(model)[1], CLIP)
        dense.step()
        dense.zero_grad()
        if i % 3 == 2:
            torch.nn.utils.clip_grad_norm_(split(model)[0], CLIP)
            experts.step()
            experts.zero_grad()
    ranks = workers.run(2, train)
    mean = torch.tensor([ours for ours, _, _ in ranks], dtype=torch.float64).mean(dim=0)
    assert mean.tolist() == pytest.approx(losses, abs=TOLERANCE)
    for _, weights, rearrangements in ranks:
        assert rearrangements == BATCHES
        for name, tensor in model.state_dict().items():
            assert float((weights[name] - tensor).abs().max()) < TOLERANCE, name
