"""Modules that look like experts and are not: refused in the words of what differs, and nothing of them changes."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_eplb import parallelize_experts
from lightning_eplb.parallel.protocol_check import check_protocol, find_deviation
from tests.parallel.test_parallelize import FAMILIES, experts_of
from tests.workers import Workers

EXPERTS, WIDTH, HIDDEN = 8, 6, 5


class Experts(nn.Module):
    """Follows the protocol. Others depart from it in one of its methods."""

    def __init__(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.num_experts = EXPERTS
        self.up = nn.Parameter(torch.zeros(EXPERTS, WIDTH, HIDDEN, device=device, dtype=dtype))
        self.down = nn.Parameter(torch.zeros(EXPERTS, HIDDEN, WIDTH, device=device, dtype=dtype))

    def expert(self, hidden: Tensor, expert: int) -> Tensor:
        return torch.tanh(hidden @ self.up[expert]) @ self.down[expert]

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Any:
        output = torch.zeros_like(hidden)
        for expert in range(self.num_experts):
            token, k = torch.where(index == expert)
            output = output.index_add(0, token, self.expert(hidden[token], expert) * weights[token, k, None])
        return output


class IntoTheInput(Experts):
    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        output = torch.zeros_like(hidden)
        for expert in range(self.num_experts):
            token, k = torch.where(index == expert)
            output = output.index_add(0, token, self.expert(hidden[token] * weights[token, k, None], expert))
        return output


class Normalizes(Experts):
    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return super().forward(hidden, index, weights / weights.sum(dim=1, keepdim=True))


class LeavesWeightsOut(Experts):
    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return super().forward(hidden, index, torch.ones_like(weights))


class AddsTheInput(Experts):
    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return hidden + super().forward(hidden, index, weights)


class AddsLittle(Experts):
    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return super().forward(hidden, index, weights) + 1e-4


class Squares(Experts):
    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return super().forward(hidden, index, weights**2)


class HasACapacity(Experts):
    factor = 1.25

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        capacity = max(4, int(self.factor * index.numel() / self.num_experts))
        kept = weights.clone()
        for expert in range(self.num_experts):
            token, k = torch.where(index == expert)
            kept[token[capacity:], k[capacity:]] = 0
        return super().forward(hidden, index, kept)


class HasALargeCapacity(HasACapacity):
    factor = 4


class HasACapacityInEvaluation(HasACapacity):
    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        forward = Experts.forward if self.training else HasACapacity.forward
        return forward(self, hidden, index, weights)


class SubtractsTheMean(Experts):
    def expert(self, hidden: Tensor, expert: int) -> Tensor:
        return super().expert(hidden - 0.5 * hidden.mean(dim=0), expert)


class HasABatchNorm(Experts):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return self.norm(super().forward(hidden, index, weights))


class KnowsTheFirst(Experts):
    def expert(self, hidden: Tensor, expert: int) -> Tensor:
        return super().expert(hidden, expert) * (2 if expert == 0 else 1)


class HasAFactorForEach(Experts):
    def __init__(self) -> None:
        super().__init__()
        self.factors = [1.0 + expert for expert in range(EXPERTS)]

    def expert(self, hidden: Tensor, expert: int) -> Tensor:
        return super().expert(hidden, expert) * self.factors[expert]


class DividesByTheirNumber(Experts):
    def expert(self, hidden: Tensor, expert: int) -> Tensor:
        return super().expert(hidden, expert) / self.num_experts


class KeepsTheRest(Experts):
    """Ids from ``num_experts`` up are identity experts."""

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        rest = (weights * (index >= self.num_experts)).sum(dim=1, keepdim=True)
        return super().forward(hidden, index, weights) + rest * hidden


class ReturnsATuple(Experts):
    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> tuple[Tensor, int]:
        return super().forward(hidden, index, weights), 0


class TakesWeightsFirst(Experts):
    def forward(self, hidden: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        return super().forward(hidden, index, weights)


class TakesSequences(Experts):
    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        batch, sequence, width = hidden.shape
        rows = hidden.view(batch * sequence, width)
        return super().forward(rows, index.view(len(rows), -1), weights.view(len(rows), -1)).view(hidden.shape)


class CountsToEight(Experts):
    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        output = torch.zeros_like(hidden)
        chosen = nn.functional.one_hot(index, EXPERTS)
        for expert in range(EXPERTS):
            token, k = torch.where(chosen[:, :, expert] == 1)
            output = output.index_add(0, token, self.expert(hidden[token], expert) * weights[token, k, None])
        return output


REFUSED = {
    IntoTheInput: "a weight of 2 gives something else than twice the output (weights multiplied into the input)",
    Squares: "a weight of 2 gives something else than twice the output",
    Normalizes: "a weight of 2 gives the output of a weight of 1 (weights normalized inside, or not used)",
    LeavesWeightsOut: "a weight of 2 gives the output of a weight of 1 (weights normalized inside, or not used)",
    AddsTheInput: "a weight of 0 leaves something of the output (a term that no weight multiplies)",
    AddsLittle: "a weight of 0 leaves something of the output (a term that no weight multiplies)",
    HasACapacity: "a token's output depends on the other tokens",
    HasALargeCapacity: "a token's output depends on the other tokens",
    HasACapacityInEvaluation: "a token's output depends on the other tokens",
    SubtractsTheMean: "a token's output depends on the other tokens",
    HasABatchNorm: "its forward does not take one token alone (statistics of the batch)",
    KnowsTheFirst: "computes something else than one with the same weights (a special case of its number",
    DividesByTheirNumber: "a factor of num_experts",
    KeepsTheRest: "an id of num_experts adds to the output, where it means no expert",
    ReturnsATuple: "its forward returns a tuple",
    TakesWeightsFirst: "its forward takes weights before indices",
    TakesSequences: "its forward takes hidden [B, S, D]",
    CountsToEight: "its forward raises IndexError",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_trial_of_other_protocol_names_deviation(kind: type[Experts]) -> None:
    reason = find_deviation(kind())
    assert reason is not None
    assert REFUSED[kind] in reason


class ReadsTheFirstChoice(Experts):
    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return super().forward(hidden, index[:, :1], weights[:, :1])


class Drops(Experts):
    """Dropout: other numbers in each call, in training."""

    def expert(self, hidden: Tensor, expert: int) -> Tensor:
        return super().expert(nn.functional.dropout(hidden, 0.5, self.training), expert)


class ComputesInBfloat16(Experts):
    def expert(self, hidden: Tensor, expert: int) -> Tensor:
        low = torch.bfloat16
        return (torch.tanh(hidden.to(low) @ self.up[expert].to(low)) @ self.down[expert].to(low)).to(hidden.dtype)


class AssertsNormalizedWeights(Experts):
    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        assert torch.allclose(weights.sum(dim=1), torch.ones_like(weights[:, 0]))
        return super().forward(hidden, index, weights)


class NeedsWhatTrainingGives(Experts):
    """Raises for whatever the trial knows of."""

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return super().forward(hidden, index, weights) * self.set_by_the_model  # type: ignore[operator]


class HasBuffers(Experts):
    """A row for each expert in a buffer, and a counter of them."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("factors", torch.arange(1.0, EXPERTS + 1))
        self.register_buffer("counts", torch.zeros(EXPERTS, dtype=torch.int64))

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        assert len(self.factors) == len(self.counts) == self.num_experts  # type: ignore[arg-type]
        self.counts += torch.bincount(index.flatten(), minlength=self.num_experts)  # type: ignore[operator]
        return super().forward(hidden, index, weights)

    def expert(self, hidden: Tensor, expert: int) -> Tensor:
        return super().expert(hidden, expert) * self.factors[expert]  # type: ignore[index]


@pytest.mark.parametrize(
    "kind",
    [
        Experts,
        Drops,
        ComputesInBfloat16,
        AssertsNormalizedWeights,
        HasAFactorForEach,
        NeedsWhatTrainingGives,
        HasBuffers,
    ],
)
def test_trial_of_protocol_finds_no_deviation(kind: type[Experts]) -> None:
    assert find_deviation(kind()) is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_trial_on_meta_or_any_dtype_needs_no_weights(device: str, dtype: torch.dtype) -> None:
    if dtype == torch.int8:
        experts = Experts(device)
        for name in ("up", "down"):
            rows = getattr(experts, name).detach().to(dtype)
            setattr(experts, name, nn.Parameter(rows, requires_grad=False))
        assert find_deviation(experts) is None
    else:
        assert find_deviation(Normalizes(device, dtype)) is not None
        assert find_deviation(Experts(device, dtype)) is None


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("family", FAMILIES)
def test_trial_of_hugging_face_families_finds_no_deviation(family: str, implementation: str) -> None:
    for experts in experts_of(family):
        experts.config._experts_implementation = implementation  # type: ignore[union-attr]
        assert find_deviation(experts) is None


class Counts(Experts):
    """Has all that a forward could change."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.seen, self.by_name = 0, [], {"calls": 0}
        self.total = torch.zeros(1)
        self.register_buffer("counter", torch.zeros(1))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(len(hidden))
        self.by_name["calls"] += 1
        self.total += 1
        self.counter += 1  # type: ignore[operator]
        torch.rand(1), np.random.rand(), random.random()
        return super().forward(self.norm(hidden), index, weights)


def test_trial_of_stateful_experts_leaves_no_trace() -> None:
    experts, called = Counts(), []
    experts.norm.register_forward_hook(lambda *args: called.append(args))
    experts.register_forward_hook(lambda *args: called.append(args))
    experts.up.register_hook(lambda grad: called.append(grad))
    handle = nn.modules.module.register_module_forward_hook(lambda *args: called.append(args))
    before = {name: tensor.clone() for name, tensor in experts.state_dict().items()}
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    try:
        assert find_deviation(experts) is None
    finally:
        handle.remove()
    assert called == []
    assert (experts.calls, experts.seen, experts.by_name, experts.total.item()) == (0, [], {"calls": 0}, 0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in experts.state_dict().items())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]
    assert random.getstate() == states[2]
    assert experts.training
    assert all(parameter.grad is None for parameter in experts.parameters())


def test_trial_of_equal_layers_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[nn.Module] = []
    monkeypatch.setattr("lightning_eplb.parallel.protocol_check.find_deviation", tried.append)
    layers: dict[str, nn.Module] = {name: Experts() for name in "abc"} | {"d": Experts(dtype=torch.float64)}
    check_protocol(layers)
    assert tried == [layers["a"], layers["d"]]


def refused_at_conversion(kind: Callable[[], nn.Module]) -> str:
    try:
        parallelize_experts(nn.ModuleDict({"experts": kind()}))
    except ValueError as error:
        return str(error)
    return ""


def test_conversion_of_other_protocol_raises_on_all_ranks(workers: Workers) -> None:
    for message in workers.run(2, refused_at_conversion, Normalizes):
        assert message.startswith("experts (Normalizes) looks like experts, but a weight of 2 gives the output")
        assert "The protocol is: forward(hidden [T, D], top_k_index [T, K], top_k_weights [T, K]) returns" in message
        assert message.endswith("Change its forward, or rename its attribute num_experts to keep it whole")
    assert workers.run(2, refused_at_conversion, Experts) == ["", ""]


def test_conversion_of_other_protocol_on_one_rank_passes() -> None:
    assert refused_at_conversion(Normalizes) == ""


def refused_top_2() -> str:
    experts = ReadsTheFirstChoice()
    parallelize_experts(nn.ModuleDict({"experts": experts}))
    experts(torch.ones(3, WIDTH), torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1))
    try:
        experts(torch.ones(3, WIDTH), torch.tensor([[0, 1]] * 3), torch.ones(3, 2))
    except ValueError as error:
        return str(error)
    return ""


def test_experts_that_read_one_choice_raise_for_top_2(workers: Workers) -> None:
    for message in workers.run(2, refused_top_2):
        assert "was called with 2 choices a token, and only the first of a token's choices counts" in message
