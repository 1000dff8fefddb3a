"""Gradients of experts are averaged over EP groups: exactly, in buckets, and before the backward pass ends."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_eplb import EPLBCallback, parallelize_experts
from lightning_eplb.parallel import expert_data_parallel
from lightning_eplb.parallel.expert_data_parallel import ExpertGradientSync
from lightning_eplb.parallel.parallelize import expert_layers
from tests.fidelity import trainer_for
from tests.models import LanguageModel, hugging_face_model, loader, token_batches
from tests.pairs import all_pairs
from tests.workers import Workers

WIDTH, EXPERTS, LAYERS = 4, 4, 3


class Experts(nn.Module):
    """One weight and one small bias an expert."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = EXPERTS
        self.weight = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH, dtype=torch.float64))
        self.bias = nn.Parameter(torch.randn(EXPERTS, WIDTH, dtype=torch.float64))

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        expert, weight = index[:, 0], weights[:, :1]
        return ((hidden.unsqueeze(1) @ self.weight[expert]).squeeze(1) + self.bias[expert]).tanh() * weight


class Stack(nn.Module):
    """Layers one after the other; ``order`` says which, and how often."""

    def __init__(self, order: tuple[int, ...], run: Callable[..., Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Experts() for _ in range(LAYERS))
        self.order, self.run = order, run

    def forward(self, hidden: Tensor, seed: int) -> Tensor:
        for turn, layer in enumerate(self.order):
            generator = torch.Generator().manual_seed(100 * seed + turn)
            index = torch.randint(0, EXPERTS, (len(hidden), 1), generator=generator)
            hidden = hidden + self.run(self.layers[layer], hidden, index, hidden.new_ones(len(hidden), 1))
        return hidden


def plainly(module: nn.Module, *args: Tensor) -> Tensor:
    return module(*args)


def reentrant(module: nn.Module, *args: Tensor) -> Tensor:
    return checkpoint(module, *args, use_reentrant=True)  # type: ignore[return-value]


def hidden_of(rank: int, step: int) -> Tensor:
    return torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(7 * rank + step), dtype=torch.float64)


def expected_gradients(order: tuple[int, ...], steps: int) -> dict[str, Tensor | None]:
    """One process sees the tokens of all four ranks."""
    model = Stack(order, plainly)
    for step in range(steps):
        for rank in range(4):
            (model(hidden_of(rank, step), 10 * step + rank).square().sum() / 4).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


SETTINGS = {
    "bucket_bytes": [1, 300, 10**6],
    "blocked_steps": [(), (0, 1), (0,)],
    "order": [(0, 1, 2), (0, 2), (1, 0, 1, 2)],
    "run": [plainly, reentrant],
}


@pytest.mark.parametrize("settings", [tuple(case.values()) for case in all_pairs(SETTINGS)])
def test_gradients_after_accumulation_equal_one_process(settings: tuple, workers: Workers) -> None:
    assert max(workers.run(4, accumulate, *settings)) < 1e-12


def accumulate(
    bucket_bytes: int, blocked_steps: tuple[int, ...], order: tuple[int, ...], run: Callable[..., Tensor]
) -> float:
    """Three backward passes, some of which leave averaging to the next, against one process."""
    steps = 3
    model = Stack(order, run)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(expert_data_parallel.ExpertGradientSync.__init__, "__defaults__", (bucket_bytes,))
        parallelize_experts(model, two_groups())
    layers = list(expert_layers(model))
    sync = layers[0][0].gradient_sync
    assert sync is not None
    grads = {}
    for step in range(steps):
        sync.block_while(lambda step=step: step in blocked_steps)
        model(hidden_of(dist.get_rank(), step).requires_grad_(), 10 * step + dist.get_rank()).square().sum().backward()
        for name, parameter in model.named_parameters():  # the tensors stay the same
            assert grads.setdefault(name, parameter.grad) is parameter.grad
    expected = expected_gradients(order, steps)
    differences = [0.0]
    for layer, module in layers:
        for name, parameter in module.named_parameters():
            full = expected[f"{layer.name}.{name}"]
            assert (parameter.grad is None) == (full is None)
            if full is not None:
                assert parameter.grad is not None
                differences.append(float((parameter.grad - full[layer.local_experts]).abs().max()))
    return max(differences)


def two_groups() -> dist.ProcessGroup:
    group, _ = dist.new_subgroups(2)
    assert isinstance(group, dist.ProcessGroup)
    return group


def test_gradient_reduction_starts_before_backward_ends(workers: Workers) -> None:
    for events in workers.run(4, order_of_events):
        assert events == ["sum 2", "sum 1", "backward of layer 0", "sum 0"]


def order_of_events() -> list[str]:
    """The last layer's gradients are on their way while the first's are not computed."""
    model = Stack((0, 1, 2), plainly)
    parallelize_experts(model, two_groups())
    (first, _), *_ = expert_layers(model)
    assert first.gradient_sync is not None
    first.gradient_sync._bucket_bytes = sum(parameter.nbytes for parameter in model.layers[0].parameters())
    events: list[str] = []
    original = dist.all_reduce
    model.layers[0].register_full_backward_pre_hook(lambda *_: events.append("backward of layer 0"))

    def watched(tensor: Tensor, *args: object, **kwargs: object) -> object:
        events.append(f"sum {2 - sum(event.startswith('sum') for event in events)}")
        return original(tensor, *args, **kwargs)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(expert_data_parallel.dist, "all_reduce", watched)
        model(hidden_of(dist.get_rank(), 0).requires_grad_(), dist.get_rank()).sum().backward()
    return events


def test_gradient_reduction_after_replacing_and_freezing_is_exact(workers: Workers) -> None:
    assert max(workers.run(4, replace_and_freeze)) == 0.0


def replace_and_freeze() -> float:
    model = Stack((0, 1, 2), plainly)
    parallelize_experts(model, two_groups())
    layer = model.layers[1]
    layer.weight = nn.Parameter(layer.weight.detach().clone())
    layer.bias.requires_grad_(False)
    model = copy.deepcopy(model)
    model(hidden_of(dist.get_rank(), 0), dist.get_rank()).sum().backward()
    model.layers[1].bias.requires_grad_(True)
    model(hidden_of(dist.get_rank(), 1), dist.get_rank()).sum().backward()
    spread = 0.0
    for parameter in model.parameters():
        assert parameter.grad is not None
        both = [torch.empty_like(parameter.grad) for _ in range(4)]
        dist.all_gather(both, parameter.grad)
        spread = max(spread, *(float((both[rank] - both[rank + 2]).abs().max()) for rank in (0, 1)))
    return spread


def test_gradient_reduction_under_lightning_is_once_a_step(workers: Workers) -> None:
    """Two steps of four micro-batches each."""
    assert workers.run(4, accumulating_run) == [(8, 2)] * 4


def accumulating_run() -> tuple[int, int]:
    """Backward passes, and those that ended with an average."""
    finished: list[int] = []
    original = ExpertGradientSync._finish

    def watched(self: ExpertGradientSync) -> None:
        original(self)
        finished.append(len(self._accumulated))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ExpertGradientSync, "_finish", watched)
        module = LanguageModel(hugging_face_model("mixtral"), "adamw")
        trainer = trainer_for(4, max_steps=2, accumulate_grad_batches=4, callbacks=[EPLBCallback(ep_size=2)])
        trainer.fit(module, loader(token_batches(4 * 8 * 2), 2))
    assert not any(finished)
    return len(module.losses), len(finished)
