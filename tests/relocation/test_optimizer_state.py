"""Which state moves with an expert, and which optimizer is refused."""

import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD, Adafactor, AdamW, Optimizer

from lightning_eplb.relocation.optimizer_check import check_optimizers, check_state
from lightning_eplb.relocation.optimizer_state import nested_optimizers, state_rows
from tests.relocation.optimizers import (
    CAME,
    AggregatedMomentum,
    AveragesWeights,
    Composite,
    FlatMomentum,
    Lookahead,
    NormalizedByMatrix,
    StableAdamW,
    SwitchesLater,
    UpdatesCopies,
)

Make = Callable[[Iterable[Any]], Optimizer]


def made(make: Make, rows: int = 3) -> tuple[Optimizer, nn.Parameter]:
    """An optimizer of something else and of experts."""
    parameter, other = nn.Parameter(torch.randn(rows, 4, 5)), nn.Parameter(torch.randn(6))
    return make([other, parameter]), parameter


def stepped(make: Make, **kwargs: Any) -> tuple[Optimizer, nn.Parameter]:
    optimizer, parameter = made(lambda parameters: make(parameters, **kwargs))  # type: ignore[call-arg]

    def closure() -> float:
        for group in optimizer.param_groups:
            for each in group["params"]:
                each.grad = torch.ones_like(each)
        return 1.0

    optimizer.step(closure)
    return optimizer, parameter


@pytest.mark.parametrize(
    ("make", "kwargs", "shapes"),
    [
        (AdamW, {}, [(3, 4, 5), (3, 4, 5)]),
        (AdamW, {"amsgrad": True}, [(3, 4, 5)] * 3),
        (SGD, {"lr": 0.1, "momentum": 0.9}, [(3, 4, 5)]),
        (SGD, {"lr": 0.1}, []),
        (Adafactor, {}, [(3, 1, 5), (3, 4, 1)]),
        (AggregatedMomentum, {}, [(3, 4, 5)] * 3),
        (Composite, {}, [(3, 4, 5)] * 2),
        (lambda parameters: Lookahead(AdamW(parameters)), {}, [(3, 4, 5)] * 3),
    ],
)
def test_state_rows_of_optimizer_are_those_with_expert_dimension(
    make: Make, kwargs: dict, shapes: list[tuple[int, ...]]
) -> None:
    optimizer, parameter = stepped(make, **kwargs)
    assert [tuple(tensor.shape) for tensor in state_rows(nested_optimizers([optimizer]), parameter)] == shapes
    check_state([optimizer], {"experts.up": parameter})


def test_nested_optimizers_that_hold_each_other_are_found_once() -> None:
    inner = SGD([nn.Parameter(torch.zeros(2))], lr=0.1)
    outer = Lookahead(inner)
    inner.back = [outer, {"again": inner}]  # type: ignore[attr-defined]
    assert nested_optimizers([outer, inner]) == [outer, inner]


SEPARABLE: dict[str, Make] = {
    "adamw": AdamW,
    "amsgrad, foreach": lambda p: AdamW(p, amsgrad=True, foreach=True),
    "fused": lambda p: AdamW(p, fused=True),
    "a learning rate in a tensor": lambda p: AdamW(p, lr=torch.tensor(1e-3), foreach=False),
    "nesterov": lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "sgd": lambda p: SGD(p, lr=0.1),
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
    "adadelta": torch.optim.Adadelta,
    "adamax": torch.optim.Adamax,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "rprop": torch.optim.Rprop,
    "asgd": lambda p: torch.optim.ASGD(p, t0=0),
    "groups": lambda p: AdamW([{"params": [each], "lr": 10.0**-i} for i, each in enumerate(p)]),
    "momenta in a dictionary": AggregatedMomentum,
    "by matrix, in bfloat16": NormalizedByMatrix,
    "composite": Composite,
    "lookahead": lambda p: Lookahead(AdamW(p)),
}


@pytest.mark.filterwarnings("error:.*could not be tried out")
@pytest.mark.parametrize("name", SEPARABLE)
def test_check_optimizers_of_separable_update_passes(name: str) -> None:
    optimizer, parameter = made(SEPARABLE[name])
    before = [each.detach().clone() for group in optimizer.param_groups for each in group["params"]]
    check_optimizers([optimizer], {"experts.up": parameter}, use_async=True)
    after = [each for group in optimizer.param_groups for each in group["params"]]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert all(each.grad is None for each in after)


class WarmsUp(StableAdamW):
    """Starts with a learning rate of zero, as under a scheduler."""

    def __init__(self, params: Iterable[Any]) -> None:
        super().__init__([{"params": params, "lr": 0.0, "initial_lr": 1e-3}])


MIXING: dict[str, Make] = {
    "StableAdamW": StableAdamW,
    "CAME": CAME,
    "Adafactor": Adafactor,
    "LBFGS": torch.optim.LBFGS,
    "SwitchesLater": lambda p: SwitchesLater(p, lr=0.1, momentum=0.9),
    "Lookahead": lambda p: Lookahead(StableAdamW(p)),
    "WarmsUp": WarmsUp,
}


@pytest.mark.parametrize("name", MIXING)
def test_check_optimizers_of_mixing_update_raises(name: str) -> None:
    optimizer, parameter = made(MIXING[name])
    with pytest.raises(ValueError, match=rf"{name} updates each row of a parameter by what is in the others \(up\)"):
        check_optimizers([optimizer], {"up": parameter})
    check_optimizers([optimizer], {"up": nn.Parameter(torch.zeros(3, 4, 5))})  # not its parameter


def test_check_optimizers_with_mixing_of_other_group_passes() -> None:
    experts, other = nn.Parameter(torch.randn(3, 4, 5)), nn.Parameter(torch.randn(6, 7))
    separable = SGD([{"params": [other]}, {"params": [experts]}], lr=0.1)
    check_optimizers([separable, StableAdamW([other])], {"up": experts})


@pytest.mark.parametrize("ndim", [1, 2, 3, 4])
def test_check_optimizers_of_any_ndim_tells_mixing_apart(ndim: int) -> None:
    parameter = nn.Parameter(torch.randn((2, 3, 4, 5)[:ndim]))
    check_optimizers([AdamW([parameter])], {"up": parameter})
    with pytest.raises(ValueError, match="StableAdamW updates each row"):
        check_optimizers([StableAdamW([parameter])], {"up": parameter})


class Langevin(SGD):
    """Adds noise to each element."""

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        super().step(closure)  # type: ignore[arg-type]
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.add_(torch.randn_like(parameter), alpha=group["lr"])


def test_check_optimizers_of_noisy_update_passes() -> None:
    """Nor does trying it out take numbers from the generators that training draws from."""
    optimizer, parameter = made(lambda p: Langevin(p, lr=0.1))
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
    check_optimizers([optimizer], {"experts.up": parameter})
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]  # type: ignore[index]


class Wrapper:
    """Steps an optimizer, and is none."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.param_groups, self.state = optimizer.param_groups, optimizer.state


def test_check_optimizers_that_cannot_be_tried_warns() -> None:
    optimizer, parameter = made(AdamW)
    with pytest.warns(UserWarning, match=r"Wrapper could not be tried out on toy parameters \(AttributeError: .*step"):
        check_optimizers([Wrapper(optimizer)], {"experts.up": parameter})  # type: ignore[list-item]


def test_check_optimizers_with_hooks_does_not_call_them() -> None:
    optimizer, parameter = made(AdamW)
    optimizer.register_step_pre_hook(lambda *_: pytest.fail("called"))
    torch.optim.lr_scheduler.StepLR(optimizer, 1)  # replaces optimizer.step
    check_optimizers([optimizer], {"experts.up": parameter})


def test_check_optimizers_of_adamw_takes_below_half_a_second() -> None:
    optimizer, parameter = made(AdamW)
    check_optimizers([optimizer], {"experts.up": parameter})
    start = time.process_time()
    check_optimizers([optimizer], {"experts.up": parameter})
    assert time.process_time() - start < 0.5  # 0.03 s on one core of 2025


ELSEWHERE: dict[str, tuple[Make, str]] = {
    "AveragesWeights": (lambda p: AveragesWeights(AdamW(p)), r"keeps a copy of up, .* in averages\[1\] and not in"),
    "FlatMomentum": (FlatMomentum, r"keeps something of up elsewhere than in state\[parameter\]"),
    "UpdatesCopies": (lambda p: UpdatesCopies(AdamW(p)), "updates a copy of up, whose rows can't follow"),
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_check_optimizers_with_state_elsewhere_raises(name: str) -> None:
    make, message = ELSEWHERE[name]
    optimizer, parameter = made(make)
    with pytest.raises(ValueError, match=f"{name} {message}"):
        check_optimizers([optimizer], {"up": parameter})


class Silent(SGD):
    """Does not call ``Optimizer.__init__``, so that hooks on its steps can't be registered."""

    def __init__(self, params: Iterable[Any]) -> None:
        self.state, self.defaults = defaultdict(dict), {}
        self.param_groups = [{"params": list(params), "lr": 0.1}]

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            parameter.sub_(parameter.grad, alpha=0.1)


def test_check_optimizers_without_step_hooks_raises_with_use_async() -> None:
    optimizer, parameter = made(Silent)
    check_optimizers([optimizer], {"up": parameter})
    with pytest.raises(ValueError, match=r"Silent calls no hooks .* and use_async=True must know"):
        check_optimizers([optimizer], {"up": parameter}, use_async=True)


class Blockwise(AdamW):
    """Keeps a scale for blocks of elements, as 8-bit optimizers do."""

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        super().step(closure)  # type: ignore[arg-type]
        for state in self.state.values():
            state["absmax"] = torch.ones(7)


def test_check_state_without_rows_raises_and_names_it() -> None:
    optimizer, parameter = made(Blockwise)
    with pytest.raises(ValueError, match=r"Blockwise keeps 'absmax' of experts\.up as a tensor of shape \[7\]"):
        check_optimizers([optimizer], {"experts.up": parameter})
    optimizer, parameter = stepped(Blockwise)
    with pytest.raises(ValueError, match=r"Blockwise keeps 'absmax' of experts\.up as a tensor of shape \[7\]"):
        check_state([optimizer], {"experts.up": parameter})


class Quantized(torch.Tensor):
    """A tensor of its own kind."""


class Quantizing(AdamW):
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        super().step(closure)  # type: ignore[arg-type]
        for state in self.state.values():
            state["exp_avg"] = state["exp_avg"].as_subclass(Quantized)


def test_check_state_in_tensor_subclass_raises_and_names_it() -> None:
    optimizer, parameter = stepped(Quantizing)
    with pytest.raises(ValueError, match="Quantizing keeps 'exp_avg' of up as Quantized, a tensor of its own kind"):
        check_state([optimizer], {"up": parameter})


def test_check_optimizers_of_torchao_raises_before_trial() -> None:
    kind = type("AdamW8bit", (AdamW,), {"__module__": "torchao.optim.adam"})
    optimizer, parameter = made(kind)
    with pytest.raises(ValueError, match="AdamW8bit of torchao keeps the state of up in quantized blocks"):
        check_optimizers([optimizer], {"up": parameter})


def test_check_state_of_other_parameters_passes() -> None:
    optimizer, _ = stepped(Blockwise)
    check_state([optimizer], {"experts.up": nn.Parameter(torch.zeros(3, 4, 5))})
