"""One norm of the whole model, on every rank."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lightning_eplb.parallel.clipping import clip_grad_norm_
from lightning_eplb.parallel.groups import ExpertGroups
from tests.workers import Workers


@pytest.mark.parametrize("max_norm", [0.1, 1e9])
def test_every_expert_counts_once(max_norm: float, workers: Workers) -> None:
    workers.run(2, clip, max_norm)


def clip(max_norm: float) -> None:
    groups = ExpertGroups.create()
    generator = torch.Generator().manual_seed(0)
    dense = [nn.Parameter(torch.randn(3, 2, generator=generator, dtype=torch.float64)) for _ in range(2)]
    experts = [nn.Parameter(torch.randn(4, 5, generator=generator, dtype=torch.float64))]
    for parameter in dense + experts:
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    expected = torch.nn.utils.clip_grad_norm_(dense + experts, max_norm)
    whole = [parameter.grad.clone() for parameter in dense + experts if parameter.grad is not None]

    generator.manual_seed(0)
    for parameter in dense + experts:
        torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    for parameter in dense + experts:
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    rows = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    mine = nn.Parameter(experts[0][rows].detach())
    assert experts[0].grad is not None
    mine.grad = experts[0].grad[rows].clone()
    norm = clip_grad_norm_([*dense, mine], max_norm, [mine], groups)
    assert abs(float(norm - expected)) < 1e-12
    for parameter, grad in zip([*dense, mine], [*whole[:2], whole[2][rows]], strict=True):
        assert parameter.grad is not None
        assert float((parameter.grad - grad).abs().max()) < 1e-12


def test_a_rank_whose_experts_have_no_gradient_takes_part(workers: Workers) -> None:
    assert workers.run(2, clip_where_one_has_none) == [5.0, 5.0]


def clip_where_one_has_none() -> float:
    groups = ExpertGroups.create()
    dense, expert = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1, 1))
    dense.grad = torch.tensor([3.0])
    if dist.get_rank() == 1:
        expert.grad = torch.tensor([[4.0]])
    return float(clip_grad_norm_([dense, expert], 10.0, [expert], groups))
