"""Training by optimizers that hold others, with experts that move all the time, against one process."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from lightning_eplb import ExpertLoadBalancer, parallelize_experts
from lightning_eplb.checkpoint import install_optimizer_hooks
from tests.balancer.test_balancer import Model, inputs
from tests.fidelity import TOLERANCE, ShufflePolicy
from tests.relocation.optimizers import CAME, AggregatedMomentum, Composite, Lookahead, StableAdamW
from tests.workers import WorkerError, Workers

STEPS, HALF = 10, 5


def optimizer_of(name: str, model: nn.Module) -> Optimizer:
    parameters = list(model.parameters())
    if name == "lookahead":
        return Lookahead(AdamW(parameters, lr=0.05))
    if name == "list":
        return Listed(parameters)
    kinds = {"composite": Composite, "momenta": AggregatedMomentum, "StableAdamW": StableAdamW, "CAME": CAME}
    return kinds[name](parameters, lr=0.05)


class Listed(Optimizer):
    """Optimizers in a list, and the state dict of ``Optimizer``, which has nothing of theirs, as of old."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": 0.05})
        self.optimizers = [AdamW(parameters[:3], lr=0.05), SGD(parameters[3:], lr=0.05, momentum=0.9)]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for optimizer in self.optimizers:
            optimizer.step()


def train(
    model: nn.Module, optimizer: Optimizer, steps: range, balancer: ExpertLoadBalancer | None = None
) -> dict[str, Tensor]:
    """Steps on the same tokens, whether one process has them or two; the weights after the last."""
    for step in steps:
        optimizer.zero_grad()
        if balancer is None:
            model(torch.cat([inputs(step, rank) for rank in range(2)])).square().mean().backward()
        else:
            model(inputs(step, dist.get_rank())).square().mean().backward()
            for parameter in model.router.parameters():  # type: ignore[union-attr]
                assert parameter.grad is not None
                dist.all_reduce(parameter.grad)
                parameter.grad /= 2
            balancer.before_optimizer_step()
        optimizer.step()
        if balancer is not None:
            balancer.step(with_gradients=False)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def spread(name: str, use_async: bool) -> tuple[Model, Optimizer, ExpertLoadBalancer]:
    model = Model()
    parallelize_experts(model)
    optimizer = optimizer_of(name, model)
    balancer = ExpertLoadBalancer(model, [optimizer], policy=ShufflePolicy(), step_interval=1, use_async=use_async)
    install_optimizer_hooks(optimizer, model)
    return model, optimizer, balancer


def trained(name: str, use_async: bool, path: str | None = None) -> tuple[dict[str, Tensor], Any, int]:
    """Saves half-way, if it is told where."""
    model, optimizer, balancer = spread(name, use_async)
    train(model, optimizer, range(HALF), balancer)
    if path is not None:
        saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        if dist.get_rank() == 0:
            torch.save(saved, path)
        dist.barrier()
    weights = train(model, optimizer, range(HALF, STEPS), balancer)
    return weights, optimizer.state_dict(), balancer.rearranged_rows


def resumed(name: str, path: str) -> dict[str, Tensor]:
    model, optimizer, balancer = spread(name, use_async=False)
    saved = torch.load(path, weights_only=True)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    return train(model, optimizer, range(HALF, STEPS), balancer)


def difference(ours: Any, theirs: Any) -> float:
    """The largest of any two tensors or numbers in the same place."""
    if isinstance(theirs, dict):
        assert set(ours) == set(theirs)
        return max((difference(ours[key], theirs[key]) for key in theirs), default=0.0)
    if isinstance(theirs, (list, tuple)):
        assert len(ours) == len(theirs)
        return max((difference(one, other) for one, other in zip(ours, theirs, strict=True)), default=0.0)
    if isinstance(theirs, Tensor):
        assert ours.shape == theirs.shape
        return float((ours - theirs).abs().max())
    return abs(ours - theirs) if isinstance(theirs, (int, float)) else 0.0


@pytest.mark.parametrize("use_async", [False, True])
@pytest.mark.parametrize("name", ["composite", "list", "lookahead", "momenta"])
def test_nested_optimizer_moments_follow_experts(name: str, use_async: bool, workers: Workers) -> None:
    model = Model()
    optimizer = optimizer_of(name, model)
    weights = train(model, optimizer, range(STEPS))
    for ours, state, num_rows in workers.run(2, trained, name, use_async):
        assert num_rows > 0
        assert difference(ours, weights) < TOLERANCE
        assert difference(state, optimizer.state_dict()) < TOLERANCE


@pytest.mark.parametrize("name", ["composite", "lookahead", "momenta"])
def test_nested_optimizer_state_dict_is_that_of_unmodified(name: str, workers: Workers, tmp_path: Path) -> None:
    path = tmp_path / "half.pt"
    workers.run(2, trained, name, False, str(path))
    model = Model()
    optimizer = optimizer_of(name, model)
    weights = train(model, optimizer, range(STEPS))
    for ours in workers.run(2, resumed, name, str(path)):
        assert difference(ours, weights) < TOLERANCE
    model = Model()
    optimizer = optimizer_of(name, model)
    saved = torch.load(path, weights_only=True)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    assert difference(train(model, optimizer, range(HALF, STEPS)), weights) < TOLERANCE


@pytest.mark.parametrize("name", ["CAME", "StableAdamW"])
def test_nested_optimizer_that_mixes_experts_raises_on_all_ranks(name: str, workers: Workers) -> None:
    with pytest.raises(WorkerError, match=f"{name} updates each row of a parameter by what is in the others"):
        workers.run(2, spread, name, False)
    assert workers.run(2, dist.get_rank) == [0, 1]
