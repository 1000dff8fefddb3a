"""Redundant experts' weights travel while primaries compute, and their gradients while the primaries' are computed."""

from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_eplb import ExpertLoadBalancer, ExpertPlacement, StaticPolicy, parallelize_experts
from lightning_eplb.parallel.row_exchange import RowExchange
from tests.workers import Workers

EXPERTS, WIDTH, HIDDEN = 4, 6, 5
HOT_RANK_ZERO = [0, 1, 2, 0, 3, 1, 0, 1]
"""Experts of a rank's tokens: rank 0 holds 0 and 1."""

log: list[str] = []


class _Noted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, name: str) -> Tensor:
        ctx.name = name
        log.append(f"compute {name}")
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        log.append(f"gradients of {ctx.name}")
        return grads[0], None


class Experts(nn.Module):
    """Notes when it computes, and for how many experts it has weights."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = EXPERTS
        generator = torch.Generator().manual_seed(0)
        self.up = nn.Parameter(torch.randn(EXPERTS, WIDTH, HIDDEN, generator=generator, dtype=torch.float64))
        self.down = nn.Parameter(torch.randn(EXPERTS, HIDDEN, WIDTH, generator=generator, dtype=torch.float64))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        # The noted rows are what both products need, so that their gradients come last.
        rows = _Noted.apply(hidden_states, "primaries" if len(self.up) == 2 else "redundant")
        up, down = self.up[top_k_index[:, 0]], self.down[top_k_index[:, 0]]
        return torch.einsum("td,tdh,thw->tw", rows, up, down) * top_k_weights


def converted(redundancy: Any = "window") -> tuple[nn.Module, ExpertLoadBalancer]:
    holder = nn.ModuleDict({"experts": Experts()})
    parallelize_experts(holder, num_redundant_experts=2)
    balancer = ExpertLoadBalancer(holder, policy=StaticPolicy(), redundancy=redundancy, min_tokens_per_copy=1)
    if redundancy == "window":
        balancer.rearrange(ExpertPlacement(np.array([[0, 1, 2, 2, 3, 0]]), EXPERTS, 2))
    return holder["experts"], balancer


def run(experts: nn.Module, with_gradient: bool = True) -> Tensor:
    index = torch.tensor(HOT_RANK_ZERO)[:, None]
    hidden = torch.ones(len(index), WIDTH, dtype=torch.float64, requires_grad=with_gradient)
    return experts(hidden, index, torch.ones(len(index), 1, dtype=torch.float64))


def order_of_events() -> tuple[list[str], list[str]]:
    """On every worker: what happened in the forward, and what in the backward pass."""
    experts, _ = converted()
    start, take = RowExchange.__init__, RowExchange.take

    def noted_start(self: RowExchange, *args: Any, **kwargs: Any) -> None:
        log.append("send")
        start(self, *args, **kwargs)

    def noted_take(self: RowExchange) -> list[Tensor]:
        log.append("wait")
        return take(self)

    log.clear()
    with patch.object(RowExchange, "__init__", noted_start), patch.object(RowExchange, "take", noted_take):
        output = run(experts)
        forward = log.copy()
        log.clear()
        output.sum().backward()
    return forward, log.copy()


def test_redundant_experts_in_each_pass_overlap_with_primaries(workers: Workers) -> None:
    for forward, backward in workers.run(2, order_of_events):
        assert forward == ["send", "compute primaries", "wait", "compute redundant"]
        assert backward == ["gradients of redundant", "send", "gradients of primaries", "wait"]


def bytes_of_step(redundancy: str) -> list[tuple[int, int, int]]:
    """On every worker: redundant experts, their bytes, most tokens of a rank, with and without gradients."""
    experts, balancer = converted(redundancy)
    found = []
    for with_gradients in (True, False):
        with torch.set_grad_enabled(with_gradients):
            output = run(experts, with_gradients)
        if with_gradients:
            output.sum().backward()
        served = balancer.step()
        assert served is not None
        found.append((served.num_copies, served.copy_bytes, int(served.max_tokens)))
    return found


def test_redundant_bytes_of_a_step_are_weights_and_returned_gradients(workers: Workers) -> None:
    row = 2 * WIDTH * HIDDEN * 8
    for found in workers.run(2, bytes_of_step, "window"):
        assert found == [(2, 2 * 2 * row, 8), (2, 2 * row, 8)]
    for found in workers.run(2, bytes_of_step, "batch"):  # one of rank 0's two hot experts is enough to level 12 and 4
        assert found == [(1, 2 * row, 8), (1, row, 8)]


def gradients_of_frozen() -> tuple[int, float]:
    """On every worker: bytes of a step whose ``up`` is frozen, and the gradient of this rank's ``down``, summed."""
    experts, balancer = converted()
    experts.up.requires_grad_(False)
    run(experts).sum().backward()
    served = balancer.step()
    assert served is not None
    assert experts.up.grad is None
    grad = experts.down.grad.sum()
    dist.all_reduce(grad)
    return served.copy_bytes, float(grad)


def test_redundant_experts_with_frozen_weights_return_no_gradients(workers: Workers) -> None:
    original = Experts()
    run(original).sum().backward()
    for num_bytes, grad in workers.run(2, gradients_of_frozen):
        assert num_bytes == 2 * 3 * WIDTH * HIDDEN * 8
        assert abs(grad - float(original.down.grad.sum())) < 1e-12
