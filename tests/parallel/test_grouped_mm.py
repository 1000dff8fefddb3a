"""Grouped experts on sorted rows, against transformers' own forward on the same rows in any order."""

import copy

import pytest
import torch
from torch import Tensor, nn

from lightning_eplb.parallel.grouped_mm import let_take_sorted_rows, takes_sorted_rows
from tests.models import hugging_face_model

EXPERTS, WIDTH = 4, 16


def experts(name: str) -> nn.Module:
    model = hugging_face_model(name, num_experts=EXPERTS, layers=1).float()
    model.set_experts_implementation("grouped_mm")  # type: ignore[operator]
    return next(module for module in model.modules() if type(module).__name__.endswith("Experts"))


def run(module: nn.Module, hidden: Tensor, slots: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The output, and the gradients of the input and of all parameters."""
    hidden = hidden.clone().requires_grad_()
    output = module(hidden, slots.unsqueeze(-1), torch.ones(len(slots), 1))
    weights = [hidden, *module.parameters()]
    return output, list(torch.autograd.grad((output * torch.arange(WIDTH)).sum(), weights))


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("counts", [[3, 2, 4, 1], [0, 6, 0, 2]])
def test_sorted_rows_with_grouped_mm_equal_transformers(name: str, counts: list[int]):
    module = experts(name)
    assert takes_sorted_rows(module)
    slots = torch.repeat_interleave(torch.arange(EXPERTS), torch.tensor(counts))
    hidden = torch.randn(len(slots), WIDTH, generator=torch.Generator().manual_seed(0))
    expected = run(module, hidden, slots)
    ours = copy.copy(module)
    ours.__dict__ = dict(module.__dict__)
    let_take_sorted_rows(ours, torch.tensor(counts).cumsum(0).to(torch.int32))
    output, grads = run(ours, hidden, slots)
    torch.testing.assert_close(output, expected[0])
    for found, theirs in zip(grads, expected[1], strict=True):
        torch.testing.assert_close(found, theirs)
    assert module.config._experts_implementation == "grouped_mm"  # the module's own config stays as it was


def test_sorted_rows_with_other_experts_are_not_taken():
    module = experts("mixtral")
    module.config._experts_implementation = "eager"
    assert not takes_sorted_rows(module)
    assert not takes_sorted_rows(nn.Linear(2, 2))
