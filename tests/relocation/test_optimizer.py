"""Which state moves with an expert, and which optimizer is refused."""

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adafactor, AdamW, Optimizer

from lightning_eplb.relocation.optimizer import check_optimizers, mixes_rows, state_rows


def stepped(optimizer_class: type[Optimizer], rows: int = 3, **kwargs: object) -> tuple[Optimizer, nn.Parameter]:
    parameter, other = nn.Parameter(torch.randn(rows, 4, 5)), nn.Parameter(torch.randn(6))
    optimizer = optimizer_class([other, parameter], **kwargs)  # type: ignore[call-arg]

    def closure() -> float:
        optimizer.zero_grad()
        loss = parameter.square().sum() + other.square().sum()
        loss.backward()
        return float(loss.detach())

    optimizer.step(closure)
    return optimizer, parameter


@pytest.mark.parametrize(
    ("optimizer_class", "kwargs", "shapes"),
    [
        (AdamW, {}, [(3, 4, 5), (3, 4, 5)]),
        (AdamW, {"amsgrad": True}, [(3, 4, 5)] * 3),
        (SGD, {"lr": 0.1, "momentum": 0.9}, [(3, 4, 5)]),
        (SGD, {"lr": 0.1}, []),
        (Adafactor, {}, [(3, 1, 5), (3, 4, 1)]),
    ],
)
def test_state_with_rows(optimizer_class: type[Optimizer], kwargs: dict, shapes: list[tuple[int, ...]]) -> None:
    optimizer, parameter = stepped(optimizer_class, **kwargs)
    assert [tuple(tensor.shape) for tensor in state_rows([optimizer], parameter)] == shapes


@pytest.mark.parametrize(
    ("optimizer_class", "kwargs"),
    [
        (AdamW, {}),
        (AdamW, {"amsgrad": True, "foreach": True}),
        (SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
        (torch.optim.RMSprop, {}),
        (torch.optim.Adagrad, {}),
    ],
)
def test_updates_by_element_are_welcome(optimizer_class: type[Optimizer], kwargs: dict) -> None:
    optimizer, parameter = stepped(optimizer_class, **kwargs)
    assert not mixes_rows(optimizer)
    check_optimizers([optimizer], {"experts.up": parameter})


class Langevin(SGD):
    """Adds noise to each element."""

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        super().step(closure)  # type: ignore[arg-type]
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.add_(torch.randn_like(parameter), alpha=group["lr"])


def test_noise_is_no_dependence_on_other_rows() -> None:
    """Nor does trying it out take numbers from the generator that training draws from."""
    optimizer, parameter = stepped(Langevin, lr=0.1)
    before = torch.get_rng_state()
    check_optimizers([optimizer], {"experts.up": parameter})
    assert torch.equal(torch.get_rng_state(), before)


class Wrapper:
    """Steps an optimizer, and is none."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.param_groups, self.state = optimizer.param_groups, optimizer.state


def test_what_can_not_be_tried_is_welcome() -> None:
    optimizer, parameter = stepped(AdamW)
    check_optimizers([Wrapper(optimizer)], {"experts.up": parameter})  # type: ignore[list-item]


def test_updates_by_a_norm_of_all_rows_are_refused() -> None:
    """Adafactor scales a step by the root mean square of the parameter, and of the update: of all experts."""
    optimizer, parameter = stepped(Adafactor)
    assert mixes_rows(optimizer)
    with pytest.raises(ValueError, match="Adafactor updates each row of a parameter by what is in the others"):
        check_optimizers([optimizer], {"experts.up": parameter})
    check_optimizers([optimizer], {"experts.up": nn.Parameter(torch.zeros(3, 4, 5))})  # not its parameter


def test_flat_state_is_refused_by_name() -> None:
    optimizer, parameter = stepped(torch.optim.LBFGS)
    with pytest.raises(ValueError, match=r"LBFGS keeps its state for experts\.up elsewhere"):
        check_optimizers([optimizer], {"experts.up": parameter})


class Blockwise(AdamW):
    """Keeps a scale for blocks of elements, as 8-bit optimizers do."""

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        super().step(closure)  # type: ignore[arg-type]
        for state in self.state.values():
            state["absmax"] = torch.ones(7)


def test_state_without_rows_is_refused_by_name() -> None:
    optimizer, parameter = stepped(Blockwise)
    with pytest.raises(ValueError, match=r"Blockwise keeps 'absmax' of experts\.up as a tensor of shape \[7\]"):
        check_optimizers([optimizer], {"experts.up": parameter})


def test_an_optimizer_of_other_parameters_may_be_anything() -> None:
    optimizer, _ = stepped(Blockwise)
    check_optimizers([optimizer], {"experts.up": nn.Parameter(torch.zeros(3, 4, 5))})
