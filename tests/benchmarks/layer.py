"""One MoE layer, forward and backward: ours, ours before, transformers', a textbook's, and the bare products.

Over all ranks: this package with what it chooses by itself and with the parts that it can be told to leave out; the
package of another commit (``--before FOLDER``, a checkout of it), in the same process; transformers' ``grouped_mm`` on
one rank with all experts; transformers' own expert parallelism (5.24 and later); the textbook's all-to-all; the six
grouped products alone, on as many rows. The router is even but for chance. Outputs and gradients of every lane are
compared with those of one rank first. The lanes take turns in one run; every rank waits for all others before each
turn, and a turn takes as long as it does on the slowest rank.

``--one-rank`` is for one process and a whole GPU: ``ep_size=1`` with fused experts. ``--host`` times Python in one
layer of 64 tokens a rank, and leaves out the waits for the device. ``--profile`` shows each lane's kernels.

On a machine with GPUs start it once for each rank, with ``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR``, ``MASTER_PORT`` and
``LOCAL_RANK`` set, as ``torchrun`` does. Without ``RANK`` it starts two processes of one thread each on the CPU.
"""

import argparse
import gc
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch

from tests.benchmarks.earlier_package import EarlierPackage
from tests.benchmarks.lanes import on_all_ranks, slowest_rank
from tests.benchmarks.layer_inside import HOST_BAR, HOST_TOKENS, host_seconds, print_host, print_profile
from tests.benchmarks.layer_lanes import BEFORE, REFERENCE, Batch, Lane, largest_errors, make_lanes, num_ranks, rank
from tests.benchmarks.models import CPU, Size
from tests.benchmarks.report import Bar, finish, make_parser, print_table, write_figures

WARM_UP = 5
MOST_ERROR = {torch.bfloat16: 0.02, torch.float32: 1e-5}
"""Largest relative error of a lane that is right. In bfloat16 the lanes round in other places than the reference."""


@dataclass(frozen=True)
class Case:
    """A layer to measure.

    Attributes:
        name: In the table and in the file of figures.
        size: Of the layer.
        bars: Most time of a lane over that of another, by their names.
    """

    name: str
    size: Size
    bars: dict[tuple[str, str], float] = field(default_factory=dict)


def qwen3(tokens: int) -> Size:
    """A layer of Qwen3-30B-A3B."""
    return Size(1, experts=128, top_k=8, width=2048, expert_width=768, sequences=1, sequence=tokens)


def over_ranks(before: float, reference: float) -> dict[tuple[str, str], float]:
    """Bars of a case over several ranks."""
    return {("ours", BEFORE): before, ("ours", REFERENCE): reference}


def one_rank(fused: float) -> dict[tuple[str, str], float]:
    """Bars of a case on one rank, where what counts tokens and is not fused must cost next to nothing."""
    return {("ours", REFERENCE): fused, ("ours, unfused", REFERENCE): 1.02}


OVER_RANKS = (
    Case("Qwen3-30B-A3B, 16,384 tokens a rank", qwen3(16384), over_ranks(0.42, 0.65)),
    Case("Qwen3-30B-A3B, 8,192 tokens a rank", qwen3(8192)),
    Case("Qwen3-30B-A3B, 4,096 tokens a rank", qwen3(4096), over_ranks(0.42, 0.75)),
    Case("DeepSeek-V3's width, 4,096 tokens a rank", Size(1, 64, 8, 7168, 2048, sequences=1, sequence=4096)),
)
ONE_RANK = (
    Case("Qwen3-30B-A3B, 16,384 tokens", qwen3(16384), one_rank(0.58)),
    Case("Qwen3-30B-A3B, 4,096 tokens", qwen3(4096), one_rank(0.58)),
    Case("Mixtral-8x7B, 8,192 tokens", Size(1, 8, 2, 4096, 14336, sequences=1, sequence=8192), one_rank(0.9)),
)
HOST = (Case(f"Qwen3-30B-A3B, {HOST_TOKENS} tokens a rank", qwen3(HOST_TOKENS)),)


def main() -> int:
    """Measure all lanes of all cases, print their tables and then the bars."""
    parser = make_parser(__doc__)
    parser.add_argument("--before", type=Path, metavar="FOLDER", help="a checkout of the package at another commit")
    parser.add_argument("--parts", action="store_true", help="also all-to-all in one part, and in two")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--one-rank", action="store_true", help="one process, all experts on its device")
    modes.add_argument("--host", action="store_true", help="time the host's part of a small layer")
    parser.add_argument("--profile", action="store_true", help="also print each lane's kernels; on GPUs")
    parser.add_argument("--case", type=int, action="append", metavar="I", help="only this case, counted from 0")
    arguments = parser.parse_args()
    if arguments.one_rank:
        torch.set_num_threads(1)
        found = run(torch.device("cuda" if torch.cuda.is_available() else "cpu"), arguments)
    else:
        found = on_all_ranks(run, arguments)
    return report(found, arguments.json) if found is not None else 0


def cases(device: torch.device, arguments: argparse.Namespace) -> Sequence[Case]:
    """Choose the cases; on a CPU one that is small, and whose bars are those of machines without a GPU."""
    if device.type == "cpu":
        size = replace(CPU, layers=1, sequences=1 if arguments.host else CPU.sequences)
        bar = one_rank(1.02) if arguments.one_rank else {("ours", "transformers' EP"): 1.0}
        return [Case(f"{size.tokens} tokens a rank on a CPU", size, {} if arguments.host else bar)]
    chosen = HOST if arguments.host else ONE_RANK if arguments.one_rank else OVER_RANKS
    return [chosen[i] for i in arguments.case] if arguments.case else chosen


def run(device: torch.device, arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Measure on every rank. Returns figures by name of the case."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("lightning_eplb").setLevel(logging.INFO)  # it tells how layers are computed
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    earlier = EarlierPackage(arguments.before) if arguments.before is not None else None
    found = {}
    for case in cases(device, arguments):
        batch = Batch.draw(case.size, device, dtype)
        lanes = make_lanes(case.size, batch, earlier, arguments.parts)
        errors = largest_errors(lanes, batch)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        turns = 10 if arguments.quick else 30
        if arguments.host:
            lanes.pop("products alone")
            figures = host_seconds(lanes, batch, turns)
        else:
            figures = take_turns(lanes, batch, turns)
        found[case.name] = {"lanes": figures, "errors": errors, "bars": bars_of(case, figures, errors, dtype)}
        if rank() == 0:
            (print_host if arguments.host else print_case)(case.name, case.size, figures, errors)
            write_figures(*bars_and_figures(found), arguments.json)  # a later case may fail
        if arguments.profile and device.type == "cuda":
            print_profile(lanes, batch)
        sys.stdout.flush()
        del lanes
        gc.collect()  # converted modules hold themselves in cycles; the next case's would not fit beside them
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return found


def take_turns(lanes: dict[str, Lane], batch: Batch, turns: int) -> dict[str, Any]:
    """Run the lanes in turn, in an order that changes. Returns seconds of the slowest rank, and bytes."""
    names = list(lanes)
    for turn in range(turns + WARM_UP):
        for place in range(len(names)):
            lanes[names[(turn + place) % len(names)]].take_turn(batch)
    device = batch.hidden.device
    return {
        name: {"seconds": slowest_rank(lane.seconds[WARM_UP:], device), "bytes": lane.bytes}
        for name, lane in lanes.items()
    }


def print_case(name: str, size: Size, figures: dict[str, Any], errors: dict[str, float]) -> None:
    rows = []
    for lane, of_lane in figures.items():
        seconds = np.array(of_lane["seconds"])
        low, middle, high = 1e3 * np.percentile(seconds, [10, 50, 90])
        row = [lane, f"{middle:.2f} ({low:.2f}-{high:.2f})"]
        row += [describe_ratio(figures, lane, other) for other in (BEFORE, REFERENCE)]
        row += [f"{flop(size) / np.median(seconds) / 1e12:,.1f}", f"{of_lane['bytes'] / 2**20:,.0f}"]
        rows.append([*row, f"{errors[lane]:.0e}" if lane in errors else ""])
    print(f"{name}, {num_ranks()} ranks, {size}\n")
    spread = "(10th-90th)"
    header = ["lane", f"ms {spread}", f"over before {spread}", f"over one rank {spread}", "TFLOP/s a rank", "MiB"]
    print_table([*header, "error"], rows)


def flop(size: Size) -> float:
    """Floating-point operations of a rank in the layer's products, forward and backward."""
    return 18.0 * size.tokens * size.top_k * size.width * size.expert_width


def describe_ratio(figures: dict[str, Any], lane: str, other: str) -> str:
    if other not in figures or lane == other:
        return ""
    ratios = np.array(figures[lane]["seconds"]) / np.array(figures[other]["seconds"])
    low, middle, high = np.percentile(ratios, [10, 50, 90])
    return f"{middle:.3f} ({low:.3f}-{high:.3f})"


def bars_of(case: Case, figures: dict[str, Any], errors: dict[str, float], dtype: torch.dtype) -> list[Bar]:
    found = [Bar(f"{case.name}: largest relative error", max(errors.values()), MOST_ERROR[dtype])]
    ours = figures["ours"]
    if "seconds" not in ours and dtype == torch.float32:  # a CPU computes in Python's time
        return found
    if "seconds" not in ours:
        host = float(np.median(np.sum([ours["forward"], ours["backward"]], axis=0)))
        return [*found, Bar(f"{case.name}: milliseconds of Python, ours", 1e3 * host, 1e3 * HOST_BAR)]
    for (lane, other), bar in case.bars.items():
        if lane in figures and other in figures:
            ratios = np.array(figures[lane]["seconds"]) / np.array(figures[other]["seconds"])
            found.append(Bar(f"{case.name}: time of {lane} over that of {other}", float(np.median(ratios)), bar))
    return found


def bars_and_figures(found: dict[str, dict[str, Any]]) -> tuple[list[Bar], dict[str, Any]]:
    figures = {name: {key: of[key] for key in ("lanes", "errors")} for name, of in found.items()}
    return [bar for of in found.values() for bar in of["bars"]], {"cases": figures}


def report(found: dict[str, dict[str, Any]], json_file: Path | None) -> int:
    """Print the bars and write the file."""
    return finish(*bars_and_figures(found), json_file)


if __name__ == "__main__":
    sys.exit(main())
