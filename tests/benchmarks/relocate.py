"""Moving primaries with their Adam state: against one bare collective, and behind training.

First a tenth and half of the primaries change ranks, time and again. In turn are timed: one ``all_to_all_single`` of
the same bytes between the same ranks, from a buffer to a buffer; the rows' way from their places to their places; and
the whole rearrangement, with the ranks' agreement on it. Then three lanes of a model take turns in training: no expert
moves; every ``INTERVAL`` steps half of them move at once; the same behind the steps (``use_async=True``).

On a machine with GPUs start it once for each rank, with ``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR``, ``MASTER_PORT`` and
``LOCAL_RANK`` set, as ``torchrun`` does. Without ``RANK`` it starts two processes of one thread each on the CPU.
"""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch
import torch.distributed as dist

from lightning_eplb import ExpertPlacement, Policy
from lightning_eplb.policies import Topology
from lightning_eplb.relocation.plan import plan_relocation
from lightning_eplb.relocation.transfer import relocate
from tests.benchmarks.lanes import (
    Lane,
    make_lane,
    on_all_ranks,
    slowest_rank,
    steer,
    take_turns,
    train_on,
    wait_for_all,
)
from tests.benchmarks.models import CPU, GPU, VOCABULARY, Size
from tests.benchmarks.report import Bar, finish, parse_arguments, print_table

FRACTIONS = (0.1, 0.5)
LAYERS = 8
"""Of the model whose rows move without training."""
INTERVAL = 6
FULL_GPU = 132
"""Multiprocessors of a GPU that is not shared."""
BATCH_FACTOR = 4
"""In training on such GPUs, which would else be waiting for their hosts, and that would hide what moving takes."""
BANDWIDTH_BAR, EXPOSED_BAR = 0.8, 0.15


def some_moved(placement: ExpertPlacement, fraction: float, turn: int) -> ExpertPlacement:
    """In every layer so many of the primaries change places with those of other ranks, other ones each turn."""
    generator = np.random.default_rng(turn)
    slots_YRS = placement.by_rank.copy()
    size, n = placement.num_ranks, placement.primaries_per_rank
    per_rank = max(1, round(fraction * n))
    for slots_RS in slots_YRS:
        chosen_RC = np.stack([generator.permutation(n)[:per_rank] for _ in range(size)])
        moving_RC = np.take_along_axis(slots_RS, chosen_RC, axis=1)
        for column in range(per_rank):  # each rank's go to some other rank, one from each
            moving_RC[:, column] = np.roll(moving_RC[:, column], 1 + column % (size - 1))
        np.put_along_axis(slots_RS, chosen_RC, moving_RC, axis=1)
    return ExpertPlacement(slots_YRS.reshape(len(slots_YRS), -1), placement.num_logical_experts, size)


class MoveSome(Policy):
    """Half of the primaries with every decision."""

    def __init__(self) -> None:
        self.turn = 0

    def rearrange(self, load_YL: np.ndarray, placement: ExpertPlacement, topology: Topology) -> ExpertPlacement:
        """Whatever the load is."""
        self.turn += 1
        return some_moved(placement, FRACTIONS[-1], self.turn)


def main() -> int:
    """Time both parts, print their tables and then the bars."""
    arguments = parse_arguments(__doc__)
    size = GPU if "RANK" in os.environ and torch.cuda.is_available() else CPU
    found = on_all_ranks(run, size, 8 if arguments.quick else 20, 2 if arguments.quick else 24)
    return report(found, size, arguments.json) if found is not None else 0


def run(device: torch.device, size: Size, turns: int, intervals: int) -> dict[str, Any]:
    """On every rank; seconds are the slowest rank's."""
    even_YL = torch.ones(LAYERS, size.experts)
    lane = make_lane(replace(size, layers=LAYERS), device)
    take_turns({"": lane}, size, device, range(2), lambda *_: even_YL)
    found: dict[str, Any] = {str(fraction): move(lane, fraction, turns, device) for fraction in FRACTIONS}
    if dist.get_rank() == 0:
        print_moves(found, replace(size, layers=LAYERS))
    del lane
    even_YL = even_YL[: size.layers]
    size = replace(size, sequences=size.sequences * batch_factor(device))
    lanes = {
        "still": make_lane(size, device, step_interval=10**6),
        "at once": make_lane(size, device, step_interval=INTERVAL, policy=MoveSome()),
        "behind steps": make_lane(size, device, step_interval=INTERVAL, policy=MoveSome(), use_async=True),
    }
    for each in lanes.values():
        steer(each, even_YL)
    taken = {name: [] for name in lanes}
    for interval in range(2 + intervals):
        names = list(lanes)
        for place in range(len(names)):
            name = names[(interval + place) % len(names)]
            taken[name].append(seconds_of_interval(lanes[name], interval, size, device))
    found["intervals"] = {name: slowest_rank(seconds[2:], device) for name, seconds in taken.items()}
    found["rearrangements"] = [each.balancer.num_rearrangements for each in lanes.values() if each.balancer]
    return found


def batch_factor(device: torch.device) -> int:
    """How many times the usual batch keeps the device as busy as a GPU of its own with ``BATCH_FACTOR`` of them."""
    if device.type != "cuda":
        return 1
    return max(1, BATCH_FACTOR * torch.cuda.get_device_properties(device).multi_processor_count // FULL_GPU)


def seconds_of_interval(lane: Lane, interval: int, size: Size, device: torch.device) -> float:
    """Of ``INTERVAL`` steps, in the midst of which experts move: only before and behind them the ranks wait."""
    batch = torch.randint(0, VOCABULARY, (size.sequences, size.sequence), device=device)
    if not interval:  # so that decisions are due in the second step, and what moves behind others arrives in time
        for step in range(INTERVAL // 4 + INTERVAL - 2):
            train_on(lane, batch, step)
    seconds: list[float] = []
    with timed(seconds, device):
        for step in range(INTERVAL):
            train_on(lane, batch, INTERVAL * interval + step)
    return seconds[0]


def move(lane: Lane, fraction: float, turns: int, device: torch.device) -> dict[str, Any]:
    """Move so many of the primaries in turn with a bare collective of as many bytes."""
    balancer = lane.balancer
    assert balancer is not None
    assert balancer.groups.ep_group is not None
    seconds: dict[str, list[float]] = {"bare": [], "rows": [], "whole": []}
    num_bytes = 0
    for turn in range(turns + 2):
        before, after = balancer.placement, some_moved(balancer.placement, fraction, turn)
        sent, received = bytes_between(before, after, row_bytes(lane), balancer.groups.rank)
        source = torch.zeros(sum(sent), dtype=torch.uint8, device=device)
        target = torch.empty(sum(received), dtype=torch.uint8, device=device)
        with timed(seconds["bare"], device):
            dist.all_to_all_single(target, source, received, sent, group=balancer.groups.ep_group)
        del source, target
        tensors = {layer: balancer._mover.tensors(layer, False) for layer in range(before.num_layers)}
        forth, back = plan_relocation(before, after), plan_relocation(after, before)
        with timed(seconds["rows"], device):
            relocate(forth, tensors.__getitem__, balancer.groups)
        relocate(back, tensors.__getitem__, balancer.groups)  # the layers' maps are as before
        with timed(seconds["whole"], device):
            done = balancer.rearrange(after, with_gradients=False)
        assert done is not None
        num_bytes = done.num_bytes
    return {"bytes": num_bytes} | {name: slowest_rank(taken[2:], device) for name, taken in seconds.items()}


@contextmanager
def timed(seconds: list[float], device: torch.device) -> Iterator[None]:
    wait_for_all(device)
    start = time.perf_counter()
    yield
    wait_for_all(device)
    seconds.append(time.perf_counter() - start)


def row_bytes(lane: Lane) -> int:
    """Of one primary's weights and optimizer state."""
    assert lane.balancer is not None
    return sum(tensor[0].numel() * tensor.element_size() for tensor in lane.balancer._mover.tensors(0, False))


def bytes_between(before: ExpertPlacement, after: ExpertPlacement, row: int, rank: int) -> tuple[list[int], list[int]]:
    """Return what this rank sends to each, and gets from each."""
    size = before.num_ranks
    sent_RR = np.zeros((size, size), dtype=np.int64)
    for moves in plan_relocation(before, after):
        np.add.at(sent_RR, (moves.source_rank, moves.target_rank), row)
    np.fill_diagonal(sent_RR, 0)
    return sent_RR[rank].tolist(), sent_RR[:, rank].tolist()


def print_moves(found: dict[str, Any], size: Size) -> None:
    rows = []
    for fraction, each in found.items():
        bare, by_row, whole = (np.array(each[name]) for name in ("bare", "rows", "whole"))
        low, middle, high = np.percentile(bare / by_row, [10, 50, 90])
        row = [f"{100 * float(fraction):.0f} %", f"{each['bytes'] / 2**20:,.0f}"]
        row += [f"{1e3 * np.median(taken):.1f}" for taken in (bare, by_row, whole)]
        rows.append([*row, f"{middle:.3f} ({low:.3f}-{high:.3f})"])
    print(f"primaries of {size} with Adam's state, {dist.get_world_size()} ranks\n")
    print_table(["moved", "MiB", "ms bare", "ms rows", "ms whole", "rows' bandwidth over bare (10th-90th)"], rows)
    sys.stdout.flush()


def report(found: dict[str, Any], size: Size, json_file: Path | None) -> int:
    per_interval = {name: np.array(taken) for name, taken in found["intervals"].items()}
    at_once, behind = (per_interval[name] - per_interval["still"] for name in ("at once", "behind steps"))
    rows = []
    for name, taken in per_interval.items():
        low, middle, high = 1e3 * np.percentile(taken - per_interval["still"], [10, 50, 90])
        rows.append([name, f"{1e3 * np.median(taken):.1f}", f"{middle:.1f} ({low:.1f}-{high:.1f})"])
    print(f"training, {100 * FRACTIONS[-1]:.0f} % of the primaries move every {INTERVAL} steps\n")
    print_table(["lane", f"ms for {INTERVAL} steps", "more than still (10th-90th)"], rows)
    bars = [
        Bar(
            f"bandwidth over that of a bare all_to_all_single, {100 * fraction:.0f} % of the primaries",
            float(np.median(np.array(found[str(fraction)]["bare"]) / np.array(found[str(fraction)]["rows"]))),
            BANDWIDTH_BAR,
            at_least=True,
        )
        for fraction in FRACTIONS
    ]
    exposed = float(np.median(behind) / np.median(at_once))
    bars.append(Bar("exposed behind steps over what moving at once takes", exposed, EXPOSED_BAR))
    return finish(bars, found, json_file)


if __name__ == "__main__":
    sys.exit(main())
