"""Gradients that travel behind the backward pass: the last backward's count, and changed ones are void."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lightning_eplb.parallel.rows import Route
from lightning_eplb.relocation.gradients import GradientsUnderway
from tests.workers import Workers

ROWS, WIDTH = 2, 3


def swap() -> Route:
    """Row 1 of each of two ranks goes to row 0 of the other."""
    moves = torch.tensor([[0, 1], [1, 1], [1, 0], [0, 0]]).numpy()
    return Route.of_moves(*moves, rank=dist.get_rank(), size=2)


def layer() -> list[nn.Parameter]:
    return [nn.Parameter(torch.full((ROWS, WIDTH), 1.0 + dist.get_rank())), nn.Parameter(torch.ones(ROWS))]


def backward(parameters: list[nn.Parameter]) -> None:
    """Adds the weight itself to each gradient."""
    sum((parameter**2 / 2).sum() for parameter in parameters).backward()  # type: ignore[union-attr]


@pytest.mark.parametrize("times", [1, 3])
def test_the_gradients_of_the_last_backward_pass_arrive(times: int, workers: Workers) -> None:
    workers.run(2, arrive, times)


def arrive(times: int) -> None:
    parameters = layer()
    underway = GradientsUnderway(parameters, swap(), dist.group.WORLD)
    assert not underway.is_current
    for _ in range(times):
        backward(parameters)
        assert underway.is_current
    grads = [parameter.grad for parameter in parameters]
    underway.aim(grads)  # type: ignore[arg-type]
    underway.write()
    mine, theirs = 1.0 + dist.get_rank(), 2.0 - dist.get_rank()
    assert torch.equal(grads[0], times * torch.tensor([[theirs] * WIDTH, [mine] * WIDTH]))
    assert torch.equal(grads[1], torch.full((ROWS,), float(times)))
    backward(parameters)  # nothing is sent any more: one rank alone can go through it
    assert not underway.is_current


def scaled(parameters: list[nn.Parameter]) -> None:
    assert parameters[0].grad is not None
    parameters[0].grad.mul_(0.5)


def replaced(parameters: list[nn.Parameter]) -> None:
    assert parameters[0].grad is not None
    parameters[0].grad = parameters[0].grad.clone()


def zeroed(parameters: list[nn.Parameter]) -> None:
    parameters[1].grad = None


@pytest.mark.parametrize("change", [scaled, replaced, zeroed])
def test_a_change_makes_them_void(change: Callable[[list[nn.Parameter]], None], workers: Workers) -> None:
    workers.run(2, change_after_backward, change)


def change_after_backward(change: Callable[[list[nn.Parameter]], None]) -> None:
    parameters = layer()
    underway = GradientsUnderway(parameters, swap(), dist.group.WORLD)
    backward(parameters)
    change(parameters)
    assert not underway.is_current
    underway.close()


def test_one_that_is_not_trained_is_left_out(workers: Workers) -> None:
    workers.run(2, half_frozen)


def half_frozen() -> None:
    parameters = layer()
    parameters[1].requires_grad_(False)
    underway = GradientsUnderway(parameters, swap(), dist.group.WORLD)
    (parameters[0] ** 2).sum().backward()
    assert underway.is_current
    parameters[1].grad = torch.ones(ROWS)  # was trained before
    assert not underway.is_current
    underway.close()


def test_one_without_a_gradient_makes_them_void(workers: Workers) -> None:
    """The other was accumulated twice, as by two micro-batches."""
    workers.run(2, half_used)


def half_used() -> None:
    parameters = layer()
    underway = GradientsUnderway(parameters, swap(), dist.group.WORLD)
    for _ in range(2):
        (parameters[0] ** 2).sum().backward()
    assert not underway.is_current
    underway.close()
