"""Training steps of a Qwen3-MoE: without balancing, with each kind of it, and with an even router, the ideal.

Three routers: one sends three times as many tokens to each expert of rank 0 as to any other; one sends half of all
tokens to four experts, others every 50 steps; one is even. The lanes take turns step by step in one run. A lane's own
peak memory is what it holds between steps and the most that a step adds.

On a machine with GPUs start it once for each rank, with ``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR``, ``MASTER_PORT`` and
``LOCAL_RANK`` set, as ``torchrun`` does. Without ``RANK`` it starts two processes of one thread each on the CPU.
"""

import gc
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_eplb import BalancedPolicy, DeepSeekPolicy, StaticPolicy
from tests.benchmarks.lanes import make_lane, on_all_ranks, slowest_rank, take_turns
from tests.benchmarks.models import CPU, GPU, Size
from tests.benchmarks.report import Bar, finish, parse_arguments, print_table

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


def main() -> int:
    """Run all routers, print their tables and then the bars."""
    arguments = parse_arguments(__doc__)
    size = GPU if "RANK" in os.environ and torch.cuda.is_available() else CPU
    found = on_all_ranks(run, size, arguments.quick)
    return report(found, arguments.json) if found is not None else 0


def run(device: torch.device, size: Size, quick: bool) -> dict[str, dict[str, dict[str, Any]]]:
    """On every rank. By router and lane: seconds of each step, rank max/mean, bytes."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for router in BARS:
        lanes = {
            name: make_lane(
                size,
                device,
                window_size=INTERVAL,
                step_interval=INTERVAL,
                **{**settings, "policy": settings["policy"]()},
            )
            for name, settings in LANES.items()
        }
        warm_up, steps = (30, 10) if quick else (30, 30 if router != "rotating" else 100)
        take_turns(
            lanes,
            size,
            device,
            range(warm_up + steps),
            lambda name, step, router=router: popularity("even" if name == "ideal" else router, step, size),
        )
        found[router] = {
            name: {
                "seconds": slowest_rank(lane.seconds[warm_up:], device),
                "max_over_mean": float(np.mean(lane.peaks[warm_up:])),
                "bytes": lane.held_bytes + lane.added_bytes,
                "rearrangements": lane.balancer.num_rearrangements if lane.balancer is not None else 0,
            }
            for name, lane in lanes.items()
        }
        if dist.get_rank() == 0:
            print_router(router, found[router], size)
        del lanes
        gc.collect()  # models hold themselves in cycles; the next router's would not fit beside them
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return found


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
