"""Resize: ranks leave and join in memory, and training equals one process with the unmodified model."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.elastic_machines import Machine, TwoLayers, loss_of, make_group
from tests.fidelity import TOLERANCE, ShufflePolicy, named_state
from tests.models import optimizer_of, token_batches
from tests.workers import Workers

EXPERTS, STEPS, ACCUMULATION, SEQUENCES, CLIP, WINDOW = 12, 3, 2, 12, 0.5, 8
ALL = [0, 1, 2, 3]


def build(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The same weights for seed 0; others on machines that join."""
    model = TwoLayers(EXPERTS, seed)
    return model, optimizer_of("adamw", model)


def batches(phases: int) -> list[list[list[Tensor]]]:
    """Micro-batches of each step of each phase."""
    tokens = token_batches(phases * STEPS * ACCUMULATION * SEQUENCES)
    micro = tokens.view(phases, STEPS, ACCUMULATION, SEQUENCES, -1)
    return [[list(step) for step in phase] for phase in micro]


def reference(phases: int) -> tuple[list[float], dict[str, Tensor], dict[str, Tensor]]:
    model, optimizer = build(0)
    losses = []
    for step in (step for phase in batches(phases) for step in phase):
        for batch in step:
            loss = loss_of(model, batch)
            (loss / len(step)).backward()
            losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
    return losses, {k: v.detach() for k, v in model.named_parameters()}, named_state(model, optimizer)


def train_elastically(
    groups: Sequence[Sequence[int]], ep_sizes: Sequence[int | None], arguments: dict[str, Any]
) -> tuple[list[float], Any]:
    """On every worker: train in each group of machines, and go over to the next in memory."""
    first = Machine(dist.get_rank(), build, ShufflePolicy(), ep_size=ep_sizes[0], window_size=WINDOW, **arguments)
    phases = batches(len(groups))
    if first.machine in groups[0]:
        make_group(groups[0].index(first.machine), len(groups[0]))
        first.start()
    for number, group in enumerate(groups):
        if number:
            first.go_over(groups[number - 1], group, ep_sizes[number])
        if first.machine in group:
            first.train(phases[number], CLIP)
            assert first.balancer is not None
            assert first.balancer.groups.size == (ep_sizes[number] or len(group))
            assert first.balancer.placement.redundant_per_rank == 1
            assert first.balancer.num_rearrangements >= number
    state = first.state()
    make_group(first.machine, len(ALL))  # as the other tests expect it
    return first.losses, state


def check_fidelity(
    workers: Workers, groups: Sequence[Sequence[int]], ep_sizes: Sequence[int | None] | None = None, **arguments: Any
) -> None:
    settings = {"step_interval": 1, **arguments}
    outcomes = workers.run(len(ALL), train_elastically, groups, ep_sizes or [None] * len(groups), settings, seconds=120)
    losses, weights, state = reference(len(groups))
    steps = len(groups) * STEPS
    for machine, (their_losses, (their_weights, their_state, balancer)) in enumerate(outcomes):
        taken = [number for number, group in enumerate(groups) if machine in group]
        of_phase = STEPS * ACCUMULATION
        expected = [loss for n in taken for loss in losses[n * of_phase : (n + 1) * of_phase]]
        assert their_losses == pytest.approx(expected, rel=0, abs=TOLERANCE)
        for ours, theirs in ((weights, their_weights), (state, their_state)):
            assert sorted(ours) == sorted(theirs)
            worst = max(float((ours[name] - theirs[name]).abs().max()) for name in ours)
            assert worst < TOLERANCE
        assert balancer["num_steps"] == steps
        assert balancer["window"].sum(dim=(1, 2)).tolist() == [
            2 * 2 * ACCUMULATION * SEQUENCES * (token_batches(1).shape[1] - 1)  # layers, top-k
        ] * min(steps, WINDOW)
        assert torch.equal(balancer["window"], outcomes[0][1][2]["window"])


def test_resize_four_two_three_four_ranks_equals_one_process(workers: Workers) -> None:
    check_fidelity(workers, [ALL, [0, 1], [1, 0, 2], ALL])
