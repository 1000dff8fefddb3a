"""Training steps of three layers of Qwen3-30B-A3B under Lightning: plain DDP and FSDP2, and ours under both.

Real routing: the model's own routers, on random tokens. bfloat16, AdamW. The vocabulary is a sixteenth of the model's
own, as three layers are of its 48, so that the head's share of a step is the model's. Ours is ``EPLBCallback`` with its
defaults, under DDP and under ``ExpertParallelStrategy``. Each lane is a real ``Trainer.fit``. The lanes of a pair take
turns in one process, by blocks of steps; a block begins and ends with an idle device on all ranks, and takes as long as
it does on the slowest rank. The warm-up includes the first rearrangement. A lane's own peak memory is what it holds
between its blocks and the most that a block adds.

``--profile FOLDER`` adds a block with ``torch.profiler`` and one with ``cProfile`` for each lane, and writes rank 0's
traces.

On a machine with GPUs start it once for each rank, with ``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR``, ``MASTER_PORT``,
``LOCAL_RANK``, ``LOCAL_WORLD_SIZE`` and ``GROUP_RANK`` set, as ``torchrun`` does. Without ``RANK`` it starts two
processes of one thread each on the CPU, with a small model.
"""

import argparse
import gc
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch
import torch.distributed as dist

from lightning_eplb import BalancedPolicy, StaticPolicy
from tests.benchmarks.lanes import on_all_ranks, slowest_rank
from tests.benchmarks.report import Bar, finish, make_parser, print_table, write_figures
from tests.benchmarks.train_lanes import KINDS, LayersSize, TrainLane

GPU = LayersSize(3, experts=128, top_k=8, width=2048, expert_width=768, heads=32, key_value_heads=4, vocabulary=9496)
CPU = LayersSize(2, experts=8, top_k=2, width=64, expert_width=64, heads=2, key_value_heads=2, vocabulary=256)
TOKENS = {"cuda": (16384, 4096), "cpu": (256,)}
"""Tokens of a rank's batch, in sequences of ``LayersSize.sequence`` at most."""
PAIRS = (("DDP", "ours, DDP"), ("FSDP2", "ours, FSDP2"))
BARS = {
    16384: {("ours, DDP", "DDP"): 1.35, ("ours, FSDP2", "FSDP2"): 1.35},
    4096: {("ours, DDP", "DDP"): 1.65, ("ours, FSDP2", "FSDP2"): 1.5, ("ours, FSDP2", "ours, DDP"): 1.0},
}
"""Least tokens per second of a lane over those of another, by tokens of a rank."""
STEPS_IN_BLOCK, WARM_UP_BLOCKS, BLOCKS = 5, 6, 10


def main() -> int:
    """Run all pairs, print their tables and then the bars."""
    parser = make_parser(__doc__)
    parser.add_argument("--tokens", type=int, action="append", metavar="N", help="of a rank's batch; all by default")
    parser.add_argument(
        "--lanes", nargs="+", choices=KINDS, help="these take turns, instead of the pairs; the first is the reference"
    )
    parser.add_argument("--static", action="store_true", help="no expert moves, and no planner is compiled")
    parser.add_argument("--profile", type=Path, metavar="FOLDER", help="write traces there, and print the host's time")
    arguments = parser.parse_args()
    found = on_all_ranks(run, arguments)
    return report(found, arguments.json) if found is not None else 0


def run(device: torch.device, arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Train on every rank. Returns by tokens of a rank, and by lane, seconds of a step and bytes."""
    warnings.filterwarnings("ignore", module="lightning")
    for package in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(package).setLevel(logging.WARNING)
    size = GPU if device.type == "cuda" else CPU
    found: dict[str, dict[str, Any]] = {}
    for tokens in arguments.tokens or TOKENS[device.type]:
        found[str(tokens)] = {}
        for names in [arguments.lanes] if arguments.lanes else PAIRS:
            figures = take_turns(names, size, tokens, device, arguments)
            found[str(tokens)] |= {name: {**figures[name], "reference": names[0]} for name in names}
            gc.collect()  # models hold themselves in cycles; the next pair's would not fit beside them
            if device.type == "cuda":
                torch.cuda.empty_cache()
        if dist.get_rank() == 0:
            print_lanes(found[str(tokens)], size, tokens)
            write_figures(bars_of(found), {"steps": found}, arguments.json)  # a later size may fail
    return found


def take_turns(
    names: list[str], size: LayersSize, tokens: int, device: torch.device, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Run the lanes by blocks of steps, in an order that changes."""
    warm_up, blocks = (1, 3) if arguments.quick else (WARM_UP_BLOCKS, BLOCKS)
    profiled = 2 if arguments.profile else 0
    steps = (warm_up + blocks + profiled) * STEPS_IN_BLOCK
    policy = StaticPolicy if arguments.static else BalancedPolicy
    lanes = {name: TrainLane(name, size, tokens, device, (steps, STEPS_IN_BLOCK), policy) for name in names}
    for lane in lanes.values():
        lane.advance()  # to its first step
    for block in range(warm_up + blocks):
        for place in range(len(names)):
            lanes[names[(block + place) % len(names)]].advance()
    seconds = {name: slowest_rank(lane.seconds[warm_up:], device) for name, lane in lanes.items()}
    found = {name: {"seconds": seconds[name], "bytes": lane.peak_bytes} for name, lane in lanes.items()}
    for lane in lanes.values():
        if arguments.profile:
            lane.profile_next(arguments.profile / f"{lane.kind.replace(', ', '_').replace(' ', '_')}_{tokens}.json.gz")
            lane.advance()
            lane.profile_next(None)
            lane.advance()
        lane.advance()  # to its end
    return found


def print_lanes(lanes: dict[str, Any], size: LayersSize, tokens: int) -> None:
    """Print a table of all lanes at one batch size."""
    rows = []
    for name, lane in lanes.items():
        low, middle, high = np.percentile(lane["seconds"], [10, 50, 90])
        row = [name, f"{1e3 * middle:.1f} ({1e3 * low:.1f}-{1e3 * high:.1f})"]
        row += [f"{tokens * dist.get_world_size() / middle:,.0f}", describe_speed(lanes, name)]
        row += [f"{size.flop(tokens) / middle / 1e12:.1f}", f"{lane['bytes'] / 2**30:.2f}"]
        rows.append(row)
    print(f"{tokens} tokens a rank, {dist.get_world_size()} ranks, {size}\n")
    spread = "(10th-90th)"
    header = ["lane", f"ms a step {spread}", "tokens/s", f"speed {spread} over", "TFLOP/s a rank", "GiB"]
    print_table(header, rows)
    sys.stdout.flush()


def speeds(lanes: dict[str, Any], name: str) -> np.ndarray:
    """Return tokens per second over those of the lane's reference, in each block."""
    return np.array(lanes[lanes[name]["reference"]]["seconds"]) / np.array(lanes[name]["seconds"])


def describe_speed(lanes: dict[str, Any], name: str) -> str:
    reference = lanes[name]["reference"]
    low, middle, high = np.percentile(speeds(lanes, name), [10, 50, 90])
    return f"{middle:.3f} ({low:.3f}-{high:.3f}) {reference}" if name != reference else ""


def bars_of(found: dict[str, dict[str, Any]]) -> list[Bar]:
    bars = []
    for tokens, lanes in found.items():
        for (name, reference), bar in BARS.get(int(tokens), {}).items():
            if name in lanes and lanes[name]["reference"] == reference:
                title = f"{tokens} tokens a rank: speed of {name} over {reference}"
                bars.append(Bar(title, float(np.median(speeds(lanes, name))), bar, at_least=True))
    return bars


def report(found: dict[str, dict[str, Any]], json_file: Path | None) -> int:
    """Print the bars and write the file."""
    return finish(bars_of(found), {"steps": found}, json_file)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
