"""The cost of moves is measured, and all ranks come to the same numbers."""

import math
from dataclasses import astuple, replace
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lightning_eplb import ExpertLoadBalancer, StaticPolicy, parallelize_experts
from lightning_eplb.balancer import cost_model
from lightning_eplb.balancer.cost_model import HardwareProfile, profile_hardware
from lightning_eplb.parallel.groups import ExpertGroups
from lightning_eplb.parallel.parallelize import expert_layers
from lightning_eplb.policies import Costs
from tests.workers import Workers


class Experts(nn.Module):
    """Twelve of them, so that two ranks and three share them equally."""

    num_experts = 12

    def __init__(self, hidden: int = 16) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.ones(12, 8, hidden))
        self.down = nn.Parameter(torch.ones(12, hidden, 8))

    def forward(self, hidden_states: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return hidden_states * (self.up[index[:, 0], 0, 0] * weights[:, 0])[:, None]


def converted(hidden: int = 16) -> tuple[nn.Module, ExpertGroups]:
    holder = nn.ModuleDict({"experts": Experts(hidden)})
    parallelize_experts(holder)
    ((layer, module),) = expert_layers(holder)
    return module, layer.groups


def measured() -> tuple[float, ...]:
    return astuple(profile_hardware(*converted()))


@pytest.mark.parametrize("ranks", [2, 3])
def test_profile_hardware_on_all_ranks_returns_same_powers_of_two(ranks: int, workers: Workers) -> None:
    first, *others = workers.run(ranks, measured)
    assert others == [first] * (ranks - 1)
    for number in first:
        assert 0 < number < math.inf
        assert math.frexp(number)[0] == 0.5
    token, *bytes_per_second = first
    assert token < 1e-2  # six operations for each of 256 numbers
    assert min(bytes_per_second) > 2**20


def with_a_slow_rank() -> HardwareProfile:
    """Rank 1 needs 1.5 s for a product and its exchanges take 3 s for 4 MiB, the others a quarter of that."""
    slow = 4 if dist.get_rank() == 1 else 1
    seconds = iter([0.375 * slow, 0.75 * slow, 0.75 * slow])
    with patch.object(cost_model, "_seconds", lambda action, device: next(seconds)):
        return profile_hardware(*converted())


def test_profile_hardware_with_slow_rank_takes_its_speed(workers: Workers) -> None:
    found = workers.run(3, with_a_slow_rank)
    assert found == [found[0]] * 3
    # 6 x 256 parameters of 1.5 s / (2 x 512 tokens x 128 numbers) is 0.0176 s; 4 MiB in 3 s are 1.33 MiB/s.
    assert found[0] == HardwareProfile(2.0**-6, 2.0**20, 2.0**20)


def seconds_of_small_and_large_experts() -> list[float]:
    """If the product takes a second for a million of operations."""
    found = []
    for hidden in (16, 64):
        operations = 2 * 512 * 8 * hidden
        with patch.object(cost_model, "_seconds", lambda action, device: operations / 2**20):  # noqa: B023
            found.append(profile_hardware(*converted(hidden)).seconds_per_token)
    return found


def test_seconds_per_token_scale_with_expert_parameters(workers: Workers) -> None:
    """Six operations for each of two matrices: 1,536 of a small expert, 6,144 of a large one, to a power of two."""
    for found in workers.run(2, seconds_of_small_and_large_experts):
        assert found == [2.0**-9, 2.0**-7]


@pytest.mark.parametrize(
    ("nodes", "shifts"),
    [
        ((0, 0), (1, 1)),
        ((0, 1), (1, 1)),
        ((0, 0, 0), (1, 1)),
        ((0, 0, 1), (1, 1)),
        ((0, 0, 0, 0), (1, 1)),
        ((0, 0, 1, 1), (1, 2)),
        ((0, 1, 0, 1), (2, 1)),
        ((0, 0, 0, 1), (1, 1)),
        ((0, 0, 0, 1, 1), (1, 2)),
        ((0, 0, 0, 0, 1, 1, 1, 1), (1, 4)),
    ],
)
def test_profile_hardware_on_any_nodes_gives_each_rank_one_partner(
    nodes: tuple[int, ...], shifts: tuple[int, int]
) -> None:
    """Through the shift that crosses nodes for the fewest ranks, and then for the most, whatever the nodes' sizes."""
    size, partners = len(nodes), []
    for rank in range(size):
        sent_to: list[int] = []
        groups = ExpertGroups(rank, size, node_of_rank=nodes)
        with (
            patch.object(cost_model, "_seconds", lambda action, device: 1.0),
            patch.object(
                cost_model,
                "_exchange_seconds",
                lambda partner, device, groups: sent_to.append(partner) or 1.0,  # noqa: B023
            ),
        ):
            profile_hardware(Experts(), groups)
        partners.append(sent_to)
    for within_or_between in zip(*partners, strict=True):
        assert sorted(within_or_between) == list(range(size))
    found = {tuple((partner - rank) % size for partner in both) for rank, both in enumerate(partners)}
    assert found == {shifts}


def across_unequal_nodes() -> tuple[HardwareProfile, list[int]]:
    """Two ranks on one node and one on another: all bytes arrive, none wait for each other."""
    experts, groups = converted()
    groups = replace(groups, node_of_rank=(0, 0, 1))
    received: list[int] = []
    original = cost_model._exchange

    def exchange(into, sent, receive, send, groups):
        sent.fill_(1 + groups.rank)
        original(into, sent, receive, send, groups)
        assert into.unique().numel() == 1
        received.append(int(into[0]) - 1)

    with patch.object(cost_model, "_exchange", exchange):
        return profile_hardware(experts, groups), received


def test_profile_hardware_on_unequal_nodes_exchanges_in_a_ring(workers: Workers) -> None:
    answers = workers.run(3, across_unequal_nodes)
    assert [found for found, _ in answers] == [answers[0][0]] * 3
    for rank, (_, received) in enumerate(answers):
        assert set(received) == {(rank - 1) % 3}
        assert len(received) >= 4  # twice one to warm up and one to time


class Listening(StaticPolicy):
    def __init__(self) -> None:
        super().__init__()
        self.told: list[Costs | None] = []

    def look_ahead(self, outlook, placement, topology):
        self.told.append(outlook.costs)
        return placement


def told_after_a_step() -> list[Costs | None]:
    model = nn.ModuleDict({"experts": Experts()})
    parallelize_experts(model, num_redundant_experts=2)
    optimizer, policy = torch.optim.AdamW(model.parameters()), Listening()
    balancer = ExpertLoadBalancer(model, [optimizer], policy=policy, step_interval=4)
    with patch(
        "lightning_eplb.balancer.cost_model.profile_hardware",
        lambda experts, groups: HardwareProfile(2.0**-10, 2.0**20, 2.0**10),
    ):
        model["experts"](torch.ones(6, 8), torch.arange(6)[:, None] + 2, torch.ones(6, 1)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        balancer.step()
    return policy.told


def test_costs_after_a_step_are_bytes_over_bandwidth(workers: Workers) -> None:
    """A row moves with two moments; a redundant expert receives weights and returns a gradient as large."""
    weights = 2 * 8 * 16 * 4
    costs = Costs(2.0**-10, 3 * weights / 2**20, 3 * weights / 2**10, 2 * weights / 2**20)
    assert workers.run(2, told_after_a_step) == [[costs], []]
