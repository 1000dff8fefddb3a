"""Measure what counting tokens and deciding take of a training step, with nothing to balance.

Two lanes of the same model, experts spread over all ranks, under an even router: one without ``ExpertLoadBalancer``,
one with it and ``BalancedPolicy``, which decides as often as it does by default. They take turns step by step.

On a machine with GPUs start it once for each rank, with ``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR``, ``MASTER_PORT`` and
``LOCAL_RANK`` set, as ``torchrun`` does. Without ``RANK`` it starts two processes of one thread each on the CPU.
"""

import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch

from lightning_eplb import BalancedPolicy
from tests.benchmarks.lanes import make_lane, on_all_ranks, slowest_rank, take_turns
from tests.benchmarks.models import CPU, GPU, Size
from tests.benchmarks.report import Bar, finish, parse_arguments, print_table

BAR, STEP_INTERVAL, WARM_UP = 1.005, 100, 26


def main() -> int:
    """Time both lanes, print their table and then the bar."""
    arguments = parse_arguments(__doc__)
    size = GPU if "RANK" in os.environ and torch.cuda.is_available() else CPU
    found = on_all_ranks(run, size, 40 if arguments.quick else 200)
    return report(found, size, arguments.json) if found is not None else 0


def run(device: torch.device, size: Size, steps: int) -> dict[str, Any]:
    """On every rank. Seconds of each lane's steps, the slowest rank's, and those of the decisions of this one."""
    lanes = {
        name: make_lane(
            size, device, 1, is_balanced=name == "balanced", policy=BalancedPolicy(), step_interval=STEP_INTERVAL
        )
        for name in ("alone", "control", "balanced")
    }
    even_YL = torch.ones(size.layers, size.experts)
    balancer = lanes["balanced"].balancer
    assert balancer is not None
    take_turns(lanes, size, device, range(WARM_UP), lambda *_: even_YL)
    before = balancer.rearrange_seconds
    take_turns(lanes, size, device, range(WARM_UP, WARM_UP + steps), lambda *_: even_YL)
    # All decisions that fell into these steps are in their times; a median does not see them.
    decisions = balancer.rearrange_seconds - before
    seconds = {name: slowest_rank(lane.seconds[WARM_UP:], device) for name, lane in lanes.items()}
    return {"seconds": seconds, "decisions": decisions, "num_rearrangements": balancer.num_rearrangements}


def report(found: dict[str, Any], size: Size, json_file: Path | None) -> int:
    alone = np.array(found["seconds"]["alone"])
    of_decisions = found["decisions"] / len(alone) / np.median(alone)
    rows, middles = [], {}
    for name, taken in found["seconds"].items():
        low, middles[name], high = np.percentile(np.array(taken) / alone, [10, 50, 90])
        rows.append([name, f"{1e3 * np.median(taken):.2f}", f"{middles[name]:.4f} ({low:.3f}-{high:.3f})"])
    print(f"training steps of {size}, an even router\n")
    print_table(["lane", "ms a step", "over alone (10th-90th)"], rows)
    print(f"decisions: {found['num_rearrangements']} rearranged; {100 * of_decisions:.3f} % of the steps' time\n")
    bar = Bar("steps with counting and deciding over steps without", middles["balanced"] + of_decisions, BAR)
    return finish([bar], found, json_file)


if __name__ == "__main__":
    sys.exit(main())
