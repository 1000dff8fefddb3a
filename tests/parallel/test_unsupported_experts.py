"""Experts that can't be spread over ranks are refused in one sentence, on all ranks, before any communication."""

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelPruning
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, weight_norm
from torch.testing._internal.two_tensor import TwoTensor

from lightning_eplb import EPLBCallback, parallelize_experts
from lightning_eplb.parallel.discovery import check_experts, find_experts
from tests.fidelity import trainer_for
from tests.models import LanguageModel, hugging_face_model
from tests.parallel.test_per_expert_state import EXPERTS, TOLERANCE, WIDTH, Experts
from tests.test_callback_errors import fails_in_setup, tokens
from tests.workers import Workers


class Moving(Experts):
    """Averages its load over time: what an expert without tokens brings depends on what there was."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("load", torch.ones(EXPERTS, dtype=torch.float64))

    def count(self, hidden: Tensor, index: Tensor) -> None:
        self.load.mul_(0.9).add_(torch.bincount(index.flatten(), minlength=self.num_experts), alpha=0.1)


class CountsInTraining(Experts):
    """Counts its calls, in a buffer without rows, in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def count(self, hidden: Tensor, index: Tensor) -> None:
        if self.training:
            self.calls += 1


class CountsInList(Experts):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = [0] * EXPERTS

    def count(self, hidden: Tensor, index: Tensor) -> None:
        for expert in range(self.num_experts):
            self.tokens[expert] += int((index == expert).sum())


class WeightedCounts(Experts):
    """Sums routing weights, which only the ranks of the tokens know."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("importance", torch.zeros(EXPERTS, dtype=torch.float64))

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        self.importance.index_add_(0, index.flatten(), weights.detach().flatten())
        return super().forward(hidden, index, weights)


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(EXPERTS, WIDTH, dtype=torch.float64))


class Inner(Experts):
    """Has rows of experts in a submodule."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = Scale()

    def change(self, expert: int, rows: Tensor) -> Tensor:
        return rows * self.scale.weight[expert]


class Property(Experts):
    def __init__(self) -> None:
        super().__init__()

    @property
    def num_experts(self) -> int:
        return EXPERTS

    @num_experts.setter
    def num_experts(self, number: int) -> None:
        pass


def pruned() -> nn.Module:
    experts = Experts()
    prune.l1_unstructured(experts, "up", amount=0.5)
    return experts


def weight_normed() -> nn.Module:
    return weight_norm(Experts(), "down")


def parametrized() -> nn.Module:
    experts = Experts()
    parametrize.register_parametrization(experts, "up", nn.Tanh())
    return experts


def patched() -> nn.Module:
    experts = Experts()
    experts.forward = types.MethodType(lambda self, *args: 2 * Experts.forward(self, *args), experts)  # type: ignore
    return experts


def quantized() -> nn.Module:
    experts = Experts()
    experts.up = nn.Parameter(TwoTensor(experts.up.data, experts.up.data.clone()), requires_grad=False)
    return experts


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "moving average": (Moving, "model.experts changes load in its forward otherwise than by adding to the row of an"),
    "calls": (CountsInTraining, "model.experts changes calls in its forward otherwise than by adding"),
    "list": (CountsInList, "model.experts changes tokens in its forward otherwise than by adding"),
    "weights": (WeightedCounts, "model.experts changes importance in its forward otherwise than by adding"),
    "submodule": (
        Inner,
        "model.experts computes another output with some of its experts than with all: it holds scale,",
    ),
    "property": (
        Property,
        "model.experts.num_experts is 8 also where the module is to compute 1 of its 8 experts. Make",
    ),
    "pruned": (pruned, "model.experts.up is computed in each forward, by L1Unstructured, from the weights of all"),
    "weight norm": (
        weight_normed,
        "model.experts.down is computed in each forward, by WeightNorm, from the weights of",
    ),
    "parametrized": (
        parametrized,
        "model.experts.up is computed in each forward, by a parametrization, from the weigh",
    ),
    "patched": (patched, "model.experts.forward was replaced on the module itself, and expert parallelism calls"),
    "quantized": (quantized, "model.experts.up is a TwoTensor, whose rows can't be moved between ranks."),
}


def refused(name: str) -> str:
    make, _ = REFUSED[name]
    return fails_in_setup({}, model=nn.ModuleDict({"experts": make(), "head": nn.Linear(2, 2)}))


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_experts_on_two_ranks_raise_on_all(name: str, workers: Workers) -> None:
    (message,) = set(workers.run(2, refused, name))
    assert message.startswith(REFUSED[name][1])


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_experts_on_one_rank_are_accepted(name: str) -> None:
    model = nn.ModuleDict({"experts": REFUSED[name][0]()})
    if name != "parametrized":
        check_experts(model, dict(find_experts(model)), 1, 0)


class BuiltInSetup(LanguageModel):
    def __init__(self) -> None:
        super().__init__(nn.Linear(2, 2), "adamw")

    def setup(self, stage: str) -> None:
        self.model = hugging_face_model("mixtral")


def pruning(model: LanguageModel) -> list[Any]:
    experts: Any = model.model.get_submodule("model.layers.0.mlp.experts")
    return [ModelPruning("l1_unstructured", [(experts, "down_proj")])]


FITS: dict[str, tuple[Callable[[], LanguageModel], Callable[[Any], list[Any]], str]] = {
    "setup": (
        BuiltInSetup,
        lambda _: [],
        "no MoE layer found in BuiltInSetup, whose setup() runs after that of EPLBCallback: build the model in",
    ),
    "pruning": (
        lambda: LanguageModel(hugging_face_model("mixtral"), "adamw"),
        pruning,
        "ModelPruning prunes 'down_proj' of a MixtralExperts, and EPLBCallback spreads experts over ranks",
    ),
}


def fit(name: str) -> str:
    make, callbacks, _ = FITS[name]
    model = make()
    trainer = trainer_for(2, max_steps=2, callbacks=[EPLBCallback(step_interval=1), *callbacks(model)])
    with pytest.raises(ValueError, match=r"\w") as raised:
        trainer.fit(model, tokens())
    return str(raised.value)


@pytest.mark.parametrize("name", FITS)
def test_fit_with_unsupported_experts_raises(name: str, workers: Workers) -> None:
    (message,) = set(workers.run(2, fit, name))
    assert message.startswith(FITS[name][2])


def changed_after_conversion(change: Callable[[nn.Module], object]) -> str:
    experts = Experts()
    parallelize_experts(nn.ModuleDict({"experts": experts}))
    change(experts)
    hidden, weights = torch.randn(4, WIDTH, dtype=torch.float64), torch.rand(4, 1, dtype=torch.float64)
    with pytest.raises(
        RuntimeError, match="pruning and parametrizations of experts, which are not supported"
    ) as raised:
        experts(hidden, torch.arange(4).unsqueeze(-1), weights)
    return str(raised.value)


def prune_up(experts: nn.Module) -> None:
    prune.l1_unstructured(experts, "up", amount=0.5)


def parametrize_up(experts: nn.Module) -> None:
    parametrize.register_parametrization(experts, "up", nn.Tanh())


@pytest.mark.parametrize("change", [prune_up, parametrize_up])
def test_experts_changed_after_conversion_raise(change: Callable, workers: Workers) -> None:
    for message in workers.run(2, changed_after_conversion, change):
        assert message.startswith(
            "experts had the parameters ['up', 'down'] when its experts were distributed over ranks"
        )


class Float8(Experts):
    """Frozen weights in eight bits beside trained ones."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.up = nn.Parameter(torch.randn(EXPERTS, WIDTH, 12).to(torch.float8_e4m3fn), requires_grad=False)

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        whole = self.up
        self.__dict__["up"] = whole.double()
        output = super().forward(hidden, index, weights)
        del self.__dict__["up"]
        return output


def difference_of_float8() -> float:
    experts, expected = Float8(), Float8()
    parallelize_experts(nn.ModuleDict({"experts": experts}), num_redundant_experts=4)
    hidden, weights = torch.randn(9, WIDTH, dtype=torch.float64), torch.rand(9, 2, dtype=torch.float64)
    index = torch.rand(9, EXPERTS).topk(2).indices
    saved = experts.state_dict()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(saved[name].view(torch.uint8), tensor.view(torch.uint8))
    return float((experts(hidden, index, weights) - expected(hidden, index, weights)).abs().max())


def test_frozen_float8_experts_compute_as_unmodified(workers: Workers) -> None:
    assert max(workers.run(2, difference_of_float8)) < TOLERANCE
