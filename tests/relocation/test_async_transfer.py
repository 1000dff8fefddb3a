"""Primaries that move behind training, in a plain loop, against one process and against moves between two steps."""

from itertools import pairwise
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_eplb import ExpertLoadBalancer, ExpertPlacement, parallelize_experts
from lightning_eplb.balancer.step_stats import RearrangementResult, StepStats
from tests.fidelity import TOLERANCE, ShufflePolicy
from tests.models import hugging_face_model, language_loss, optimizer_of, token_batches
from tests.workers import WorkerError, Workers

LAYERS, STEPS, SEQUENCES = 3, 10, 2

Seen = tuple[dict[str, Tensor], ExpertPlacement, RearrangementResult | None]


def train(
    use_async: bool, step_interval: int, most_bytes: int = 1, calls_before: bool = True, fault_in: int | None = None
) -> list[Seen]:
    """On every worker: after each step, the weights in logical order, the placement, and what was rearranged.

    In the step ``fault_in`` rank 1 first has frozen a parameter whose rows are in flight.
    """
    model = hugging_face_model("mixtral", layers=LAYERS)
    parallelize_experts(
        model, num_redundant_experts=2 if fault_in is None else 0
    )  # or redundant experts would not fit already
    optimizer = optimizer_of("adamw", model)
    seen: list[Seen] = []
    with patch("lightning_eplb.balancer.cost_model.MAX_BYTES_IN_FLIGHT", most_bytes):
        balancer = ExpertLoadBalancer(
            model, [optimizer], policy=ShufflePolicy(), step_interval=step_interval, use_async=use_async
        )
        for step, batch in enumerate(token_batches(STEPS * 2 * SEQUENCES).split(2 * SEQUENCES)):
            if step == fault_in:
                fail_in_step(balancer, optimizer, batch)
                balancer.abandon_rearrangement()
            served = train_step(balancer, optimizer, batch, calls_before)
            weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            seen.append((weights, balancer.placement, served.rearrangement))
        done = balancer.finish_rearrangement()
    assert balancer.num_rearrangements == sum(told is not None for *_, told in [*seen, (done,)])
    seen.append(({name: tensor.clone() for name, tensor in model.state_dict().items()}, balancer.placement, done))
    return seen


def train_step(
    balancer: ExpertLoadBalancer, optimizer: torch.optim.Optimizer, batch: Tensor, calls_before: bool = True
) -> StepStats:
    model = balancer.model
    language_loss(model, batch[dist.get_rank() :: 2]).backward()
    experts = {id(parameter) for module in experts_of(model) for parameter in module.parameters(recurse=False)}
    for parameter in model.parameters():
        if id(parameter) not in experts and parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= 2
    if calls_before:
        balancer.before_optimizer_step()
    optimizer.step()
    optimizer.zero_grad()
    served = balancer.step(with_gradients=False)
    assert served is not None
    return served


def fail_in_step(balancer: ExpertLoadBalancer, optimizer: torch.optim.Optimizer, batch: Tensor) -> None:
    """Rank 1 has frozen a parameter: it has no gradient."""
    parameter = next(experts_of(balancer.model)[0].parameters(recurse=False))
    parameter.requires_grad_(dist.get_rank() == 0)
    language_loss(balancer.model, batch[dist.get_rank() :: 2]).backward()
    with pytest.raises(RuntimeError, match=r"ranks \[1\] would move other rows than rank 0"):
        balancer.before_optimizer_step()
    parameter.requires_grad_(True)
    optimizer.zero_grad()


def experts_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [module for module in model.modules() if hasattr(module, "expert_layer")]


@pytest.fixture(scope="module")
def expected() -> list[dict[str, Tensor]]:
    """The weights of one process with the unmodified model, after each step."""
    model = hugging_face_model("mixtral", layers=LAYERS)
    optimizer = optimizer_of("adamw", model)
    weights = []
    for batch in token_batches(STEPS * 2 * SEQUENCES).split(2 * SEQUENCES):
        language_loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        weights.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
    return [*weights, weights[-1]]


def changed_layers(before: ExpertPlacement, after: ExpertPlacement) -> list[int]:
    return (before.physical_to_logical != after.physical_to_logical).any(axis=1).nonzero()[0].tolist()


def test_async_transfer_by_layer_trains_as_unmodified(workers: Workers, expected: list[dict[str, Tensor]]) -> None:
    """Due after two steps, decided in the third, with room for a layer a step.

    What is saved meanwhile is what is saved without us.
    """
    for seen in workers.run(2, train, True, 9):
        placements = [placement for _, placement, _ in seen]
        moved = [changed_layers(one, other) for one, other in pairwise(placements)]
        assert moved == [[], [], [0], [1], [2], [], [], [], [], []]
        for (weights, _, _), theirs in zip(seen, expected, strict=True):
            for name, tensor in theirs.items():
                assert float((weights[name] - tensor).abs().max()) < TOLERANCE, name
        (done,) = (done for _, _, done in seen if done is not None)
        assert done is seen[5][2]
        assert (done.before, done.after) == (placements[0], placements[-1])


def test_async_transfer_when_due_again_is_finished_first(workers: Workers) -> None:
    for seen in workers.run(2, train, True, 1):
        assert [step for step, (_, _, done) in enumerate(seen[:-1], start=1) if done is not None] == [5, 9]


def test_async_transfer_at_end_of_training_is_committed(workers: Workers, expected: list[dict[str, Tensor]]) -> None:
    for seen in workers.run(2, train, True, 24):  # decided in the seventh step
        assert changed_layers(seen[0][1], seen[-1][1]) == [0, 1, 2]
        assert changed_layers(seen[-2][1], seen[-1][1]) == []
        assert seen[-1][2] is None
    for seen in workers.run(2, train, True, 32):  # in the ninth
        done = seen[-1][2]
        assert done is not None
        assert (done.num_layers, done.after) == (2, seen[-1][1])
        assert changed_layers(seen[-2][1], seen[-1][1]) == [1]
        for name, tensor in expected[-1].items():
            assert float((seen[-1][0][name] - tensor).abs().max()) < TOLERANCE, name


def train_both() -> tuple[RearrangementResult, RearrangementResult]:
    sync, behind = (train(use_async, 9, 2**30) for use_async in (False, True))
    return sync[1][2], behind[3][2]  # type: ignore[return-value]


def test_async_transfer_of_same_plan_reports_as_sync(workers: Workers) -> None:
    """All layers fit in one step. Gradients were zeroed where rows move between steps, and move where they do not."""
    for sync, behind in workers.run(2, train_both):
        assert sync.after == behind.after
        assert (sync.num_rows, sync.num_layers, sync.num_copies) == (
            behind.num_rows,
            behind.num_layers,
            behind.num_copies,
        )
        assert behind.num_bytes == sync.num_bytes * 4 // 3  # weights and two moments; and gradients


def test_async_transfer_after_ranks_disagree_is_cancelled(workers: Workers, expected: list[dict[str, Tensor]]) -> None:
    """Rank 0 has gradients that rank 1 has not: what moves later must not meet what was sent for them."""
    for seen in workers.run(2, train, True, 3, 1, True, 2):
        assert all(len(changed_layers(one, other)) == 0 for (_, one, _), (_, other, _) in pairwise(seen[:4]))
        assert any(done is not None for _, _, done in seen[4:])
        for (weights, _, _), theirs in zip(seen, expected, strict=True):
            for name, tensor in theirs.items():
                assert float((weights[name] - tensor).abs().max()) < TOLERANCE, name


Trained = tuple[dict[str, Tensor], int]
"""The weights in logical order, and how many rearrangements there were."""


def training(seed: int = 0) -> tuple[ExpertLoadBalancer, torch.optim.Optimizer]:
    """Its first rearrangement is in flight after two steps."""
    model = hugging_face_model("mixtral", layers=LAYERS)
    parallelize_experts(model)
    optimizer = optimizer_of("adamw", model)
    return balancer_of(model, optimizer, seed), optimizer


def balancer_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer, seed: int = 0) -> ExpertLoadBalancer:
    return ExpertLoadBalancer(model, [optimizer], policy=ShufflePolicy(seed), step_interval=3, use_async=True)


def trained(balancer: ExpertLoadBalancer) -> Trained:
    return {name: tensor.clone() for name, tensor in balancer.model.state_dict().items()}, balancer.num_rearrangements


def train_two(other_is_moving: bool) -> list[Trained]:
    """Two models on the same ranks; what moves in the first fails."""
    batches = token_batches(STEPS * 2 * SEQUENCES).split(2 * SEQUENCES)
    before = 2 if other_is_moving else 0
    with patch("lightning_eplb.balancer.cost_model.MAX_BYTES_IN_FLIGHT", 1):
        (balancer, optimizer), (other, its_optimizer) = training(), training(seed=1)
        for batch in batches[:2]:
            train_step(balancer, optimizer, batch)
        for batch in batches[:before]:
            train_step(other, its_optimizer, batch)
        fail_in_step(balancer, optimizer, batches[2])
        balancer.abandon_rearrangement()
        for batch in batches[before:]:
            train_step(other, its_optimizer, batch)
        for batch in batches[2:]:
            train_step(balancer, optimizer, batch)
    return [trained(balancer), trained(other)]


def train_after_a_failure(is_same_model: bool) -> Trained:
    """The balancer under which training failed is told nothing; another one goes on, or starts with another model."""
    batches = token_batches(STEPS * 2 * SEQUENCES).split(2 * SEQUENCES)
    with patch("lightning_eplb.balancer.cost_model.MAX_BYTES_IN_FLIGHT", 1):
        balancer, optimizer = training()
        for batch in batches[:2]:
            train_step(balancer, optimizer, batch)
        fail_in_step(balancer, optimizer, batches[2])
        if is_same_model:
            balancer = balancer_of(balancer.model, optimizer)
        else:
            balancer, optimizer = training()
        for batch in batches[2 if is_same_model else 0 :]:
            train_step(balancer, optimizer, batch)
    return trained(balancer)


def check_trained(seen: Trained, expected: dict[str, Tensor]) -> None:
    weights, num_rearrangements = seen
    assert num_rearrangements > 0
    for name, tensor in expected.items():
        assert float((weights[name] - tensor).abs().max()) < TOLERANCE, name


@pytest.mark.parametrize("other_is_moving", [False, True])
def test_async_transfer_that_fails_harms_no_other_model(
    other_is_moving: bool, workers: Workers, expected: list[dict[str, Tensor]]
) -> None:
    for of_models in workers.run(2, train_two, other_is_moving):
        for seen in of_models:
            check_trained(seen, expected[-1])


@pytest.mark.parametrize("is_same_model", [True, False])
def test_async_transfer_after_failure_works_in_new_balancer(
    is_same_model: bool, workers: Workers, expected: list[dict[str, Tensor]]
) -> None:
    for seen in workers.run(2, train_after_a_failure, is_same_model):
        check_trained(seen, expected[-1])


def test_async_step_without_before_optimizer_step_raises(workers: Workers) -> None:
    with pytest.raises(WorkerError, match=r"before_optimizer_step\(\) was not called"):
        workers.run(2, train, True, 9, 1, False)
