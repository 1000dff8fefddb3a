"""Training steps of a Qwen3-MoE: without balancing, with each kind of it, and with an even router, the ideal.

Three routers: one sends three times as many tokens to each expert of rank 0 as to any other; one sends half of all
tokens to four experts, others every 50 steps; one is even. The lanes take turns step by step in one run. A lane's own
peak memory is what it holds between steps and the most that a step adds.

On a machine with GPUs start it once for each rank, with ``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR``, ``MASTER_PORT`` and
``LOCAL_RANK`` set, as ``torchrun`` does. Without ``RANK`` it starts two processes of one thread each on the CPU.
"""

import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_eplb import BalancedPolicy, DeepSeekPolicy, ExpertLoadBalancer, StaticPolicy, parallelize_experts
from lightning_eplb.parallel.convert import expert_layers
from tests.benchmarks.models import CPU, GPU, VOCABULARY, Size, join_from_environment, routers, steered_model
from tests.benchmarks.report import Bar, finish, parse_arguments, print_table
from tests.workers import Workers

INTERVAL = 20
ROTATION_STEPS = 50
COPIES = 2
"""Redundant slots of a rank."""
LANES: dict[str, dict[str, Any]] = {
    "none": {"policy": StaticPolicy},
    "deepseek": {"policy": DeepSeekPolicy, "copies": COPIES},
    "window": {"policy": BalancedPolicy, "copies": COPIES},
    "batch": {"policy": StaticPolicy, "copies": COPIES, "redundancy": "batch"},
    "both": {"policy": BalancedPolicy, "copies": COPIES, "redundancy": "batch"},
    "ideal": {"policy": StaticPolicy},
}
BARS = {"skewed": {"window": 0.97}, "rotating": {"batch": 0.94}, "even": dict.fromkeys(list(LANES)[:-1], 0.99)}
"""Least speed over the ideal's, by router and lane."""


@dataclass
class Lane:
    """One model in training, and what its steps took."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    balancer: ExpertLoadBalancer
    held_bytes: int = 0
    added_bytes: int = 0
    seconds: list[float] = field(default_factory=list)
    peaks: list[float] = field(default_factory=list)


def main() -> int:
    """Run all routers, print their tables and then the bars."""
    arguments = parse_arguments(__doc__)
    if "RANK" in os.environ:
        device = join_from_environment()
        found = run(device, GPU if device.type == "cuda" else CPU, arguments.quick)
        dist.barrier()
        status = report(found, arguments.json) if dist.get_rank() == 0 else 0
        dist.destroy_process_group()
        return status
    workers = Workers(2)
    try:
        found = workers.run(2, run, torch.device("cpu"), CPU, arguments.quick, seconds=3600)[0]
    finally:
        workers.stop()
    return report(found, arguments.json)


def run(device: torch.device, size: Size, quick: bool) -> dict[str, dict[str, dict[str, Any]]]:
    """On every rank. By router and lane: seconds of each step, rank max/mean, bytes."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for router in BARS:
        lanes = {name: make_lane(settings, size, device) for name, settings in LANES.items()}
        warm_up, steps = (30, 10) if quick else (30, 30 if router != "rotating" else 100)
        for step in range(warm_up + steps):
            batch = torch.randint(0, VOCABULARY, (size.sequences, size.sequence), device=device)
            names = list(LANES)
            for place in range(len(names)):
                name = names[(step + place) % len(names)]
                take_step(lanes[name], batch, popularity("even" if name == "ideal" else router, step, size), step)
        found[router] = {
            name: {
                "seconds": slowest_rank(lane.seconds[warm_up:], device),
                "max_over_mean": float(np.mean(lane.peaks[warm_up:])),
                "bytes": lane.held_bytes + lane.added_bytes,
                "rearrangements": lane.balancer.num_rearrangements,
            }
            for name, lane in lanes.items()
        }
        if dist.get_rank() == 0:
            print_router(router, found[router], size)
        del lanes
    return found


def make_lane(settings: dict[str, Any], size: Size, device: torch.device) -> Lane:
    """Dense parameters under DDP, experts spread over all ranks."""
    before = memory(device)
    model = steered_model(size, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    parallelize_experts(model, num_redundant_experts=settings.get("copies", 0) * dist.get_world_size())
    experts = {id(p) for _, module in expert_layers(model) for p in module.parameters(recurse=False)}
    ignored = [name for name, parameter in model.named_parameters() if id(parameter) in experts]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    balancer = ExpertLoadBalancer(
        model,
        [optimizer],
        policy=settings["policy"](),
        window_size=INTERVAL,
        step_interval=INTERVAL,
        redundancy=settings.get("redundancy", "window"),
    )
    lane = Lane(DistributedDataParallel(model), optimizer, balancer)
    lane.held_bytes = memory(device) - before
    return lane


def take_step(lane: Lane, batch: Tensor, popularity_YL: Tensor, step: int) -> None:
    """Train on a batch, and note what it took on this rank."""
    device = batch.device
    for router, popularity_L in zip(routers(lane.model), popularity_YL, strict=True):
        router.popularity_L.copy_(popularity_L)
    torch.manual_seed(1_000_000 * dist.get_rank() + step)
    before = memory(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    wait_for_all(device)
    start = time.perf_counter()
    logits = lane.model(input_ids=batch, use_cache=False).logits
    nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten()).backward()
    lane.optimizer.step()
    lane.optimizer.zero_grad()
    served = lane.balancer.step(with_gradients=False)
    wait_for_all(device)
    lane.seconds.append(time.perf_counter() - start)
    assert served is not None
    lane.peaks.append(1 / served.balancedness)
    if not step:
        lane.held_bytes += memory(device) - before  # the optimizer's state
    elif device.type == "cuda":
        lane.added_bytes = max(lane.added_bytes, torch.cuda.max_memory_allocated() - before)


def popularity(router: str, step: int, size: Size) -> Tensor:
    """Of each layer's experts, ``[Y, L]``."""
    popularity_YL = torch.ones(size.layers, size.experts)
    if router == "skewed":
        popularity_YL[:, : size.experts // dist.get_world_size()] = 3.0
    elif router == "rotating":
        generator = torch.Generator().manual_seed(step // ROTATION_STEPS)
        for popularity_L in popularity_YL:
            hot = torch.randperm(size.experts, generator=generator)[: size.top_k // 2]
            popularity_L[hot] = 100.0  # nearly every token takes them: half of what it takes
    return popularity_YL


def memory(device: torch.device) -> int:
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0


def wait_for_all(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier()
    if device.type == "cuda":
        torch.cuda.synchronize()


def slowest_rank(seconds: list[float], device: torch.device) -> list[float]:
    slowest = torch.tensor(seconds, dtype=torch.float64, device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return slowest.tolist()


def print_router(router: str, lanes: dict[str, dict[str, Any]], size: Size) -> None:
    tokens = size.tokens * dist.get_world_size()
    ideal, none = (np.array(lanes[name]["seconds"]) for name in ("ideal", "none"))
    rows = []
    for name, lane in lanes.items():
        seconds = np.array(lane["seconds"])
        low, middle, high = np.percentile(ideal / seconds, [10, 50, 90])
        gap = np.median(none) - np.median(ideal)
        closed = (np.median(none) - np.median(seconds)) / gap if router != "even" else float("nan")
        row = [name, f"{1e3 * np.median(seconds):.1f}", f"{tokens / np.median(seconds):,.0f}"]
        row += [f"{middle:.3f} ({low:.3f}-{high:.3f})", f"{100 * closed:.0f}", f"{lane['max_over_mean']:.3f}"]
        rows.append([*row, f"{lane['bytes'] / 2**20:,.0f}", str(lane["rearrangements"])])
    print(f"{router} router, {dist.get_world_size()} ranks, {size}\n")
    header = ["lane", "ms a step", "tokens/s", "speed over ideal's (10th-90th)", "gap closed %", "max/mean", "MiB"]
    print_table([*header, "rearranged"], rows)
    sys.stdout.flush()


def report(found: dict[str, dict[str, dict[str, Any]]], json_file: Path | None) -> int:
    bars = []
    for router, least in BARS.items():
        ideal = np.array(found[router]["ideal"]["seconds"])
        for lane, bar in least.items():
            speed = float(np.median(ideal / np.array(found[router][lane]["seconds"])))
            bars.append(Bar(f"speed over the ideal's, {router} router, {lane}", speed, bar, at_least=True))
    return finish(bars, found, json_file)


if __name__ == "__main__":
    sys.exit(main())
