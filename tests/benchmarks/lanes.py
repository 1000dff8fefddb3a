"""Models in training that take turns step by step in one run, on all ranks: what benchmarks of steps compare."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_eplb import ExpertLoadBalancer, StaticPolicy, parallelize_experts
from lightning_eplb.parallel.parallelize import expert_layers
from tests.benchmarks.models import VOCABULARY, Size, join_from_environment, routers, steered_model
from tests.workers import Workers


def on_all_ranks(run: Callable[..., Any], *arguments: Any) -> Any:
    """``run(device, *arguments)`` on every rank; what rank 0 returned, and ``None`` on the others.

    With ``RANK`` in the environment this process is a rank. Without it two processes of one thread each start here.
    """
    if "RANK" in os.environ:
        device = join_from_environment()
        found = run(device, *arguments)
        dist.barrier()
        rank = dist.get_rank()
        dist.destroy_process_group()
        return found if rank == 0 else None
    workers = Workers(2)
    try:
        return workers.run(2, run, torch.device("cpu"), *arguments, seconds=3600)[0]
    finally:
        workers.stop()


@dataclass
class Lane:
    """One model in training, and what its steps took on this rank."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    balancer: ExpertLoadBalancer | None
    held_bytes: int = 0
    added_bytes: int = 0
    seconds: list[float] = field(default_factory=list)
    peaks: list[float] = field(default_factory=list)


def make_lane(size: Size, device: torch.device, copies: int = 0, is_balanced: bool = True, **settings: Any) -> Lane:
    """Dense parameters under DDP, experts spread over all ranks.

    Args:
        size: Of the model.
        device: Of this rank.
        copies: Redundant slots of a rank.
        is_balanced: Whether it has an ``ExpertLoadBalancer``.
        **settings: Of that one; ``StaticPolicy`` by default.
    """
    before = memory(device)
    model = steered_model(size, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    parallelize_experts(model, num_redundant_experts=copies * dist.get_world_size())
    experts = {id(p) for _, module in expert_layers(model) for p in module.parameters(recurse=False)}
    ignored = [name for name, parameter in model.named_parameters() if id(parameter) in experts]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    balancer = ExpertLoadBalancer(model, [optimizer], **{"policy": StaticPolicy(), **settings}) if is_balanced else None
    lane = Lane(DistributedDataParallel(model), optimizer, balancer)
    lane.held_bytes = memory(device) - before
    return lane


def take_step(lane: Lane, batch: Tensor, popularity_YL: Tensor, step: int) -> None:
    """Train on a batch, and note what it took on this rank, from all ranks' begin to all ranks' end."""
    device = batch.device
    steer(lane, popularity_YL)
    before = memory(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    wait_for_all(device)
    start = time.perf_counter()
    train_on(lane, batch, step)
    wait_for_all(device)
    lane.seconds.append(time.perf_counter() - start)
    if lane.balancer is not None and lane.balancer.last_step is not None:
        lane.peaks.append(1 / lane.balancer.last_step.balancedness)
    if not step:
        lane.held_bytes += memory(device) - before  # the optimizer's state
    elif device.type == "cuda":
        lane.added_bytes = max(lane.added_bytes, torch.cuda.max_memory_allocated() - before)


def steer(lane: Lane, popularity_YL: Tensor) -> None:
    """Send the tokens where ``popularity_YL`` says from now on."""
    for router, popularity_L in zip(routers(lane.model), popularity_YL, strict=True):
        router.popularity_L.copy_(popularity_L)


def train_on(lane: Lane, batch: Tensor, step: int) -> None:
    """One optimizer step, without waiting for the device behind it."""
    torch.manual_seed(1_000_000 * dist.get_rank() + step)
    logits = lane.model(input_ids=batch, use_cache=False).logits
    nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten()).backward()
    if lane.balancer is not None:
        lane.balancer.before_optimizer_step()
    lane.optimizer.step()
    lane.optimizer.zero_grad()
    if lane.balancer is not None:
        lane.balancer.step(with_gradients=False)


def take_turns(lanes: dict[str, Lane], size: Size, device: torch.device, steps: range, popularity: Any) -> None:
    """Every lane takes all steps on the same batches, in an order that changes from step to step.

    Args:
        popularity: ``popularity(name of the lane, step)`` of the experts, ``[Y, L]``.
    """
    names = list(lanes)
    for step in steps:
        batch = torch.randint(0, VOCABULARY, (size.sequences, size.sequence), device=device)
        for place in range(len(names)):
            name = names[(step + place) % len(names)]
            take_step(lanes[name], batch, popularity(name, step), step)


def memory(device: torch.device) -> int:
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0


def wait_for_all(device: torch.device) -> None:
    """All ranks are here and have computed all that they began."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    if dist.is_initialized():
        dist.barrier()
    if device.type == "cuda":
        torch.cuda.synchronize()


def slowest_rank(seconds: list[float], device: torch.device) -> list[float]:
    """Of each of the times that this rank and the others measured, the longest."""
    slowest = torch.tensor(seconds, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return slowest.tolist()
