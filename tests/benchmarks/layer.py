"""One MoE layer, forward and backward, against Hugging Face's on the same weights and tokens.

``one rank``: each rank by itself, transformers' ``grouped_mm`` experts and the same module converted for a group of one
rank. ``all ranks``: transformers' own expert parallelism (its all-to-all implementation, from 5.24 on) and ours, under
an even router. ``in one part``, ``in two parts``: ours, with tokens that travel so, however many they are. The lanes
take turns in one run; every rank waits for all others before and behind each turn.

On a machine with GPUs start it once for each rank, with ``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR``, ``MASTER_PORT`` and
``LOCAL_RANK`` set, as ``torchrun`` does. Without ``RANK`` it starts two processes of one thread each on the CPU.
"""

import copy
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from lightning_eplb import ExpertLoadBalancer, parallelize_experts
from lightning_eplb.parallel.discovery import find_experts
from lightning_eplb.parallel.dispatch import TokenDispatcher
from tests.benchmarks.lanes import on_all_ranks, slowest_rank, wait_for_all
from tests.benchmarks.models import CPU, GPU, Size, steered_model
from tests.benchmarks.report import Bar, finish, parse_arguments, print_table

REFERENCE = {
    "ours, one rank": "theirs, one rank",
    "ours, all ranks": "theirs, all ranks",
    "in two parts": "in one part",
}
BARS = {"ours, one rank": 1.02, "ours, all ranks": 1.0}
"""Most time over that of the reference."""


class OnePart(TokenDispatcher):
    bytes_in_parts = math.inf


class TwoParts(TokenDispatcher):
    bytes_in_parts = 0


def main() -> int:
    """Time all lanes, print their table and then the bars."""
    arguments = parse_arguments(__doc__)
    size = GPU if "RANK" in os.environ and torch.cuda.is_available() else CPU
    found = on_all_ranks(run, size, 10 if arguments.quick else 60)
    return report(found, size, arguments.json) if found is not None else 0


def run(device: torch.device, size: Size, turns: int) -> dict[str, list[float]]:
    """On every rank. Seconds of each lane's turns, the slowest rank's."""
    lanes = make_lanes(device, size)
    generator = torch.Generator(device).manual_seed(dist.get_rank())
    weight = next(iter(lanes.values()))[1]
    hidden = torch.randn(size.tokens, size.width, device=device, dtype=weight.dtype, generator=generator)
    noise = torch.rand(size.tokens, size.experts, device=device, generator=generator)
    weights, index = noise.topk(size.top_k, dim=-1)  # even but for chance
    weights = (weights / weights.sum(dim=-1, keepdim=True)).to(weight.dtype)
    seconds: dict[str, list[float]] = {name: [] for name in lanes}
    names = list(lanes)
    for turn in range(turns + 5):
        for place in range(len(names)):
            name = names[(turn + place) % len(names)]
            seconds[name].append(take_turn(lanes[name][0], hidden, index, weights))
    return {name: slowest_rank(taken[5:], device) for name, taken in seconds.items()}


def make_lanes(device: torch.device, size: Size) -> dict[str, tuple[Callable[..., Tensor], Tensor]]:
    """Each lane's function, and one of its parameters."""
    model = steered_model(size, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    _, experts = next(find_experts(model))
    lanes: dict[str, Any] = {"theirs, one rank": copy.deepcopy(experts)}
    alone, _ = dist.new_subgroups(1)
    for name, group, dispatcher in (
        ("ours, one rank", alone, TokenDispatcher),
        ("ours, all ranks", None, TokenDispatcher),
        ("in one part", None, OnePart),
        ("in two parts", None, TwoParts),
    ):
        holder = nn.ModuleDict({"experts": copy.deepcopy(experts)})
        parallelize_experts(holder, group, dispatcher=dispatcher)
        ExpertLoadBalancer(holder)
        lanes[name] = holder["experts"]
    found: dict[str, tuple[Callable[..., Tensor], Tensor]] = {
        name: (module, next(module.parameters())) for name, module in lanes.items()
    }
    if (theirs := their_expert_parallelism(experts, device)) is not None:
        found["theirs, all ranks"] = theirs, next(experts.parameters())
    return found


def their_expert_parallelism(experts: Any, device: torch.device) -> Callable[..., Tensor] | None:
    """transformers' all-to-all over all ranks, with this rank's part of ``experts``; ``None`` where it has none."""
    try:
        from transformers.distributed.expert_parallel import AllToAllEP
    except ImportError:
        return None
    size, rank = dist.get_world_size(), dist.get_rank()
    experts.num_experts //= size
    experts._is_expert_parallel = True
    for parameter in experts.parameters():
        parameter.data = parameter.data.chunk(size)[rank].clone()
    mesh = init_device_mesh(device.type, (size, 1), mesh_dim_names=("ep", "tp"))
    return AllToAllEP(experts, mesh["ep"], mesh["tp"])


def take_turn(layer: Callable[..., Tensor], hidden: Tensor, index: Tensor, weights: Tensor) -> float:
    hidden, weights = hidden.detach().requires_grad_(), weights.detach().requires_grad_()
    grad = torch.ones_like(hidden)
    wait_for_all(hidden.device)
    start = time.perf_counter()
    layer(hidden, index, weights).backward(grad)
    wait_for_all(hidden.device)
    return time.perf_counter() - start


def report(found: dict[str, list[float]], size: Size, json_file: Path | None) -> int:
    rows, bars = [], []
    for name, taken in found.items():
        reference = found.get(REFERENCE.get(name, name))
        low, middle, high = (
            np.percentile(np.array(taken) / np.array(reference), [10, 50, 90]) if reference else [float("nan")] * 3
        )
        rows.append([name, f"{1e3 * np.median(taken):.2f}", f"{middle:.3f} ({low:.3f}-{high:.3f})"])
        if name in BARS and reference:
            bars.append(Bar(f"time over that of Hugging Face's, {name}", float(middle), BARS[name]))
    print(f"a layer of {size}, forward and backward\n")
    print_table(["lane", "ms", "over its reference (10th-90th)"], rows)
    return finish(bars, found, json_file)


if __name__ == "__main__":
    sys.exit(main())
