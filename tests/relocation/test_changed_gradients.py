"""Gradients that change between the backward pass and the optimizer step, while experts move behind the steps."""

import contextlib
from collections.abc import Callable, Iterable
from typing import Any
from unittest.mock import patch

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_eplb import EPLBCallback, ExpertLoadBalancer, parallelize_experts
from tests.fidelity import TOLERANCE, ShufflePolicy, trainer_for
from tests.models import LanguageModel, hugging_face_model, language_loss, loader, optimizer_of, token_batches
from tests.workers import Workers

LAYERS, STEPS, SEQUENCES, SCALE = 3, 10, 2, 1024.0

Weights = dict[str, Tensor]


class Change:
    """Something that halves the gradients of experts, or leaves them as they are."""

    def after_backward(self, parameters: list[nn.Parameter], optimizer: Optimizer) -> None: ...

    def before_forward(self, parameters: list[nn.Parameter]) -> None: ...

    def step(self, optimizer: Optimizer) -> None:
        optimizer.step()

    def scaled(self, loss: Tensor) -> Tensor:
        return loss


class Scaler(Change):
    """Unscales right before the step: no version of a gradient rises."""

    def __init__(self) -> None:
        self.scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)

    def scaled(self, loss: Tensor) -> Tensor:
        return self.scaler.scale(loss)

    def after_backward(self, parameters: list[nn.Parameter], optimizer: Optimizer) -> None:
        self.scaler.unscale_(optimizer)

    def step(self, optimizer: Optimizer) -> None:
        self.scaler.step(optimizer)
        self.scaler.update()


class Data(Change):
    def after_backward(self, parameters: list[nn.Parameter], optimizer: Optimizer) -> None:
        for parameter in parameters:
            assert parameter.grad is not None
            parameter.grad.data.mul_(0.5)


class Replaced(Change):
    def after_backward(self, parameters: list[nn.Parameter], optimizer: Optimizer) -> None:
        for parameter in parameters:
            assert parameter.grad is not None
            parameter.grad = parameter.grad / 2


class LateHook(Change):
    """A hook that runs behind all that were registered before the backward pass."""

    def __init__(self) -> None:
        self.handles: list[Any] = []

    def before_forward(self, parameters: list[nn.Parameter]) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = [parameter.register_post_accumulate_grad_hook(halve) for parameter in parameters]


class OtherGradient(LateHook):
    def before_forward(self, parameters: list[nn.Parameter]) -> None:
        if not self.handles:
            self.handles = [parameter.register_hook(lambda grad: grad / 2) for parameter in parameters]


class Clip(Change):
    def after_backward(self, parameters: list[nn.Parameter], optimizer: Optimizer) -> None:
        torch.nn.utils.clip_grad_value_(parameters, 1e-3)


def halve(parameter: Tensor) -> None:
    assert parameter.grad is not None
    parameter.grad.data.mul_(0.5)


CHANGES: dict[str, Callable[[], Change]] = {
    "nothing": Change,
    "scaler": Scaler,
    "data": Data,
    "replaced": Replaced,
    "late-hook": LateHook,
    "other-gradient": OtherGradient,
    "clip": Clip,
}


def experts_of(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for name, parameter in model.named_parameters() if "experts" in name]


def batches(accumulation: int) -> Iterable[tuple[Tensor, ...]]:
    size = 2 * SEQUENCES
    return zip(*[iter(token_batches(STEPS * accumulation * size).split(size))] * accumulation, strict=True)


def one_process(change_name: str, accumulation: int) -> Weights:
    model = hugging_face_model("mixtral", layers=LAYERS)
    optimizer, change, experts = optimizer_of("sgd", model), CHANGES[change_name](), experts_of(model)
    for micro_batches in batches(accumulation):
        for batch in micro_batches:
            change.before_forward(experts)
            loss = language_loss(model, batch)
            change.scaled(loss / accumulation).backward()
        change.after_backward(experts, optimizer)
        change.step(optimizer)
        optimizer.zero_grad()
    return dict(model.state_dict())


def two_ranks(change_name: str, accumulation: int, use_async: bool) -> tuple[Weights, int]:
    """On every worker: the same in a plain loop, experts moving all the time."""
    model = hugging_face_model("mixtral", layers=LAYERS)
    parallelize_experts(model, num_redundant_experts=2)
    optimizer, change, experts = optimizer_of("sgd", model), CHANGES[change_name](), experts_of(model)
    ids = {id(parameter) for parameter in experts}
    with patch("lightning_eplb.balancer.cost_model.MAX_BYTES_IN_FLIGHT", 1):
        balancer = ExpertLoadBalancer(model, [optimizer], policy=ShufflePolicy(), step_interval=1, use_async=use_async)
        for micro_batches in batches(accumulation):
            for batch in micro_batches:
                change.before_forward(experts)
                loss = language_loss(model, batch[dist.get_rank() :: 2])
                change.scaled(loss / accumulation).backward()
            for parameter in model.parameters():
                if id(parameter) not in ids and parameter.grad is not None:
                    dist.all_reduce(parameter.grad)
                    parameter.grad /= 2
            change.after_backward(experts, optimizer)
            balancer.before_optimizer_step()
            change.step(optimizer)
            optimizer.zero_grad()
            balancer.step(with_gradients=False)
        balancer.finish_rearrangement()
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}, balancer.num_rearrangements


def difference(ours: Weights, theirs: Weights) -> float:
    return max(float((ours[name] - tensor).abs().max()) for name, tensor in theirs.items())


@pytest.mark.parametrize("accumulation", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("change", CHANGES)
def test_gradients_changed_after_backward_move_with_experts(change: str, accumulation: int, workers: Workers) -> None:
    expected = one_process(change, accumulation)
    for use_async in (True, False):
        for weights, num_rearrangements in workers.run(2, two_ranks, change, accumulation, use_async):
            assert num_rearrangements > 1
            assert difference(weights, expected) < TOLERANCE


class ScaledDoublePrecision(MixedPrecision):
    """``16-mixed`` that scales losses and casts nothing, so that it can be compared exactly."""

    def __init__(self) -> None:
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=SCALE))  # type: ignore[arg-type]

    def forward_context(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


class EditsGradients(LanguageModel):
    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        for parameter in experts_of(self):
            halve(parameter)


class HalvesAfterBackward(pl.Callback):
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for parameter in experts_of(pl_module):
            halve(parameter)


def trainer_on_two_ranks(use_async: bool) -> tuple[Weights, int]:
    """On every worker: a loss scaler, and gradients that are halved twice."""
    eplb = EPLBCallback(2, policy=ShufflePolicy(), step_interval=1, use_async=use_async)
    module = EditsGradients(hugging_face_model("mixtral", layers=LAYERS), "sgd")
    with patch("lightning_eplb.balancer.cost_model.MAX_BYTES_IN_FLIGHT", 1):
        trainer_for(2, max_steps=STEPS, callbacks=[eplb, HalvesAfterBackward()], plugins=[ScaledDoublePrecision()]).fit(
            module, loader(token_batches(STEPS * 2 * SEQUENCES), SEQUENCES)
        )
    assert eplb.balancer is not None
    return {
        name: tensor.clone() for name, tensor in module.model.state_dict().items()
    }, eplb.balancer.num_rearrangements


def test_gradients_changed_under_trainer_move_with_experts(workers: Workers) -> None:
    model = hugging_face_model("mixtral", layers=LAYERS)
    optimizer = optimizer_of("sgd", model)
    for (batch,) in batches(1):
        language_loss(model, batch).backward()
        for parameter in experts_of(model):
            assert parameter.grad is not None
            parameter.grad /= 4
        optimizer.step()
        optimizer.zero_grad()
    for use_async in (True, False):
        for weights, num_rearrangements in workers.run(2, trainer_on_two_ranks, use_async):
            assert num_rearrangements > 1
            assert difference(weights, dict(model.state_dict())) < TOLERANCE
