"""Machines that leave and join a training in memory: a loop that test workers run, one machine each."""

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from examples.elastic_loop import WIDTH, Experts, share_dense_state
from lightning_eplb import (
    ExpertLoadBalancer,
    Policy,
    clip_grad_norm_,
    leave_experts_out_of_ddp,
    logical_parameters,
    parallelize_experts,
)
from tests.fidelity import named_state
from tests.models import VOCABULARY


class MoELayer(nn.Module):
    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.norm, self.router = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, num_experts)
        self.experts = Experts(num_experts)

    def forward(self, hidden: Tensor) -> Tensor:
        normed = self.norm(hidden)
        weights, index = self.router(normed).softmax(dim=-1).topk(2)
        return hidden + self.experts(normed, index, weights)


class TwoLayers(nn.Sequential):
    """A model in float64 throughout.

    Hugging Face's compute norms and softmax in float32, and round otherwise where the number of ranks is no power of 2.
    """

    def __init__(self, num_experts: int, seed: int = 0, others: int | None = None) -> None:
        torch.manual_seed(seed)
        embedding, head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        super().__init__(embedding, MoELayer(num_experts), MoELayer(others or num_experts), head)
        self.double()


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return the mean loss of predicting each next token, from the one before alone."""
    logits = model(tokens[:, :-1].reshape(-1))
    return nn.functional.cross_entropy(logits, tokens[:, 1:].reshape(-1))


class Groups:
    """Default groups of the machines, one after the other. Every machine makes one, and counts all groups.

    Args:
        machine: Number of the machine.
    """

    def __init__(self, machine: int) -> None:
        self.machine, self._number = machine, 0
        self._store = dist.TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), is_master=False)
        self._run = self._store.add(f"elastic/{machine}", 1)  # the same on all machines: each is in every test

    def make(self, machines: Sequence[int]) -> None:
        """Make the default group of ``machines``, in the order of ranks. Other machines keep the one that they have."""
        self._number += 1
        if self.machine not in machines:
            return
        if dist.is_initialized():
            dist.destroy_process_group()
        store = dist.PrefixStore(f"elastic {self._run}, {self._number}", self._store)
        rank, timeout = machines.index(self.machine), timedelta(seconds=60)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=len(machines), timeout=timeout)


def mapping_between(old: Sequence[int], new: Sequence[int]) -> dict[int, int]:
    """Return the rank mapping between groups that are given by their machines in the order of ranks."""
    return {rank: new.index(machine) if machine in new else -1 for rank, machine in enumerate(old)}


class Machine:
    """One machine with its model, and its loop over the steps of all machines of the present group.

    Args:
        machine: Number of the machine.
        build: Returns a model and its optimizer.
        policy: Policy of rank 0.
        redundant: Redundant experts of a rank.
        ep_size: Ranks that share the experts of a layer, at first.
        **balancer: Arguments of the balancer.
    """

    def __init__(
        self,
        machine: int,
        build: Callable[[int], tuple[nn.Module, torch.optim.Optimizer]],
        policy: Policy | None = None,
        redundant: int = 1,
        ep_size: int | None = None,
        **balancer: Any,
    ) -> None:
        self.machine, self.build, self.groups = machine, build, Groups(machine)
        self.policy, self.redundant, self.ep_size, self.arguments = policy, redundant, ep_size, balancer
        self.losses: list[float] = []
        self.balancer: ExpertLoadBalancer | None = None

    def start(self, machines: Sequence[int]) -> None:
        """Start in a group of these machines."""
        self.groups.make(machines)
        if self.machine not in machines:
            return
        self.model, self.optimizer = self.build(0)
        group, size = None, dist.get_world_size()
        if self.ep_size is not None and self.ep_size < size:
            group, _ = dist.new_subgroups(self.ep_size)
        parallelize_experts(self.model, group, num_redundant_experts=self.redundant * (self.ep_size or size))
        leave_experts_out_of_ddp(self.model)
        self.ddp = DistributedDataParallel(self.model)
        self.balancer = ExpertLoadBalancer(self.ddp, [self.optimizer], policy=self.policy, **self.arguments)

    def go_over(self, old: Sequence[int], new: Sequence[int], ep_size: int | None = None) -> None:
        """Go over from one group to the next, as a machine of either, both or none."""
        if self.machine in old:
            assert self.balancer is not None
            mapping, rank = mapping_between(old, new), old.index(self.machine)
            assert self.balancer.resize(mapping, world_size=len(new), ep_size=ep_size) == mapping[rank]
            del self.ddp
        self.groups.make(new)
        if self.machine not in new:
            self.balancer = None
            return
        if self.machine in old:
            assert self.balancer is not None
            self.balancer.rejoin()
        else:
            self.model, self.optimizer = self.build(1 + self.machine)
            self.balancer = ExpertLoadBalancer.join(self.model, [self.optimizer])
        share_dense_state(self.model, self.optimizer)
        self.ddp = DistributedDataParallel(self.model)

    def train(self, steps: Sequence[Sequence[Tensor]], clip: float) -> None:
        """Train some steps, each of the micro-batches of all machines."""
        assert self.balancer is not None
        rank, size = dist.get_rank(), dist.get_world_size()
        for micro_batches in steps:
            for batch in micro_batches:
                loss = loss_of(self.ddp, batch[rank::size])
                (loss / len(micro_batches)).backward()
                dist.all_reduce(mean := loss.detach().clone())
                self.losses.append(mean.item() / size)
            clip_grad_norm_(self.ddp, clip)
            self.balancer.before_optimizer_step()
            self.optimizer.step()
            self.balancer.step()
            self.optimizer.zero_grad()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
        """Return logical weights, logical optimizer state and the balancer's state."""
        assert self.balancer is not None
        weights = logical_parameters(self.ddp)
        return weights, named_state(self.model, self.optimizer), self.balancer.state_dict()
