"""How level the ranks are in the steps that were executed: no copies, copies by window, copies by batch.

Real processes over gloo. One layer of 8 experts a rank gets 64 token-expert pairs a rank and expert in each step,
routed as a synthetic load says; what a rank served is read from the step itself. ``none`` has no redundant slots,
``window`` lets ``BalancedPolicy`` decide every 20 steps, ``batch`` leaves the primaries where they are and chooses two
copies a rank in each forward, ``both`` relocates as ``window`` does and chooses as ``batch`` does. Beside them stands
the best that two copies a rank can reach without relocation, see :func:`least_tokens`.

Then a layer (16 experts, width 256, 512 wide inside) is trained on two ranks of one thread each, 8,192 tokens a rank,
three quarters of them for the experts of rank 0, in four lanes that take turns in every round: without copies, by
window, by batch, and with an even router, which is the ideal.
"""

import os
import sys
import time
from itertools import combinations
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from lightning_eplb import BalancedPolicy, ExpertLoadBalancer, StaticPolicy, parallelize_experts
from lightning_eplb.parallel.row_exchange import all_gather_single
from lightning_eplb.placement import ExpertPlacement
from lightning_eplb.policies import Costs
from lightning_eplb.policies.batch_redundancy import choose_copies
from lightning_eplb.policies.token_split import split_tokens
from lightning_eplb.simulation.synthetic import SYNTHETIC_LOADS, synthetic_load
from tests.benchmarks.report import Bar, finish, parse_arguments, print_table
from tests.workers import Workers

EXPERTS_PER_RANK, PAIRS = 8, 64
HOT_IN_EXPERTS = ("balanced", "lognormal-0.7", "lognormal-1.2", "zipf", "hot-expert", "rotating", "burst", "one-expert")
LOADS = [(name, EXPERTS_PER_RANK) for name in SYNTHETIC_LOADS] + [("hot-rank", 16)]
"""Each with the experts of a rank."""
COPIES = 2
LANES: dict[str, dict[str, Any]] = {
    "none": {"redundant": 0, "relocates": False, "redundancy": "window"},
    "window": {"redundant": COPIES, "relocates": True, "redundancy": "window"},
    "batch": {"redundant": COPIES, "relocates": False, "redundancy": "batch"},
    "both": {"redundant": COPIES, "relocates": True, "redundancy": "batch"},
}
STEPS, INTERVAL = 60, 20
TRAINED = ("none", "window", "batch", "ideal")


class Experts(nn.Module):
    """A plain module of the protocol that ``parallelize_experts`` takes."""

    def __init__(self, num_experts: int, width: int, hidden: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        generator = torch.Generator().manual_seed(0)
        self.up = nn.Parameter(torch.randn(num_experts, width, hidden, generator=generator) / width**0.5)
        self.down = nn.Parameter(torch.randn(num_experts, hidden, width, generator=generator) / hidden**0.5)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        output = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique():
            token, k = torch.where(top_k_index == expert)
            served = F.relu(hidden_states[token] @ self.up[expert]) @ self.down[expert]
            output.index_add_(0, token, served * top_k_weights[token, k, None])
        return output


def main() -> int:
    """Run all parts, print their tables and then the bars."""
    arguments = parse_arguments(__doc__)
    bars, figures = [], {}
    workers = Workers(8)
    try:
        for part in (executed, planning, trained):
            start = time.perf_counter()
            part_bars, figures[part.__name__] = part(workers, arguments.quick)
            bars += part_bars
            print(f"[{part.__name__}: {time.perf_counter() - start:.0f} s]\n", flush=True)
    finally:
        workers.stop()
    return finish(bars, figures, arguments.json)


def executed(workers: Workers, quick: bool) -> tuple[list[Bar], dict[str, Any]]:
    """Rank max/mean of every step, by load and lane."""
    rows, bars, figures = [], [], {}
    for ranks in (4,) if quick else (4, 8):
        for name, per_rank in LOADS:
            lanes = workers.run(ranks, run_lanes, name, per_rank, STEPS, seconds=300)[0]
            title = f"{name}, {per_rank * ranks} experts on {ranks} ranks"
            figures[title] = {lane: float(np.mean(values)) for lane, values in lanes.items()}
            rows.append([title, *(f"{np.mean(values):.4f} ({np.max(values):.3f})" for values in lanes.values())])
            none, batch, both, best = (np.array(lanes[lane]) for lane in ("none", "batch", "both", "best"))
            if name in HOT_IN_EXPERTS:
                bars.append(Bar(f"max/mean of {title}, batch, worst step", float(batch.max()), 1.02))
            if name.startswith(("lognormal", "zipf")):
                after = float(both[INTERVAL:].max())
                bars.append(Bar(f"max/mean of {title}, batch, relocated before, worst step", after, 1.01))
            if name == "hot-rank":
                after = float(both[INTERVAL:].max())
                bars.append(Bar(f"max/mean of {title}, window and batch, worst step after the first", after, 1.02))
            if name != "empty":
                bars.append(Bar(f"batch over the best of {title}, worst step", float((batch / best).max()), 1.02))
            bars.append(Bar(f"batch less none, {title}, worst step", float((batch - none).max()), 0.0))
    print("Rank max/mean of the executed steps: mean (worst)\n")
    print_table(["load", *LANES, "best"], rows)
    return bars, figures


def least_tokens(load_L: np.ndarray, per_rank: int, copies: int) -> int:
    """Return what the fullest rank has at least, however ``copies`` redundant slots a rank are filled.

    For any set of ranks: the experts that they hold are served elsewhere only by copies that stand elsewhere, and the
    best of those are copies of their heaviest experts, as many as the other ranks have slots, which then keep nothing
    of them. What is left, spread evenly over the set, is on at least one of its ranks.

    Args:
        load_L: Tokens of each expert; rank ``r`` holds experts ``r * per_rank`` to ``(r + 1) * per_rank - 1``.
    """
    load_RN = load_L.reshape(-1, per_rank)
    ranks, least = len(load_RN), 0
    for size in range(1, ranks + 1):
        for chosen in combinations(range(ranks), size):
            heaviest_first = np.sort(load_RN[list(chosen)].ravel())[::-1]
            stays = int(heaviest_first[copies * (ranks - size) :].sum())
            least = max(least, -(-stays // size))
    return least


def run_lanes(name: str, per_rank: int, steps: int) -> dict[str, list[float]]:
    """On every worker: the same load through all lanes; and the least that a step could have had."""
    torch.set_num_threads(1)
    ranks, rank = dist.get_world_size(), dist.get_rank()
    experts = per_rank * ranks
    load_WL = synthetic_load(
        name, steps, 1, experts, tokens_per_step=PAIRS * ranks * experts, num_ranks=ranks, interval=INTERVAL
    )[:, 0]
    random = np.random.default_rng(0)
    found: dict[str, list[float]] = {}
    for lane, settings in LANES.items():
        holder = nn.ModuleDict({"experts": Experts(experts, 8, 8)})
        parallelize_experts(holder, num_redundant_experts=settings["redundant"] * ranks)
        policy = BalancedPolicy() if settings["relocates"] else StaticPolicy()
        balancer = ExpertLoadBalancer(
            holder,
            policy=policy,
            window_size=INTERVAL,
            step_interval=INTERVAL,
            redundancy=settings["redundancy"],
            min_tokens_per_copy=1,
        )
        balancer.costs = Costs(1.0)
        found[lane] = []
        for load_L in load_WL:
            ids = random.permutation(np.repeat(np.arange(experts), load_L))[rank::ranks]
            index = torch.from_numpy(np.ascontiguousarray(ids))[:, None]
            holder["experts"](torch.zeros(len(index), 8), index, torch.ones(len(index), 1))
            served = balancer.step()
            found[lane].append(1.0 / served.balancedness if served is not None else 1.0)
    found["best"] = [least_tokens(load_L, per_rank, COPIES) * ranks / max(load_L.sum(), 1) for load_L in load_WL]
    return found


def planning(workers: Workers, quick: bool) -> tuple[list[Bar], dict[str, Any]]:
    """Time of a layer's copies and split on one core, and of the all-gather that brings the counts."""
    rows, bars, figures = [], [], {}
    for experts, ranks, most in ((256, 64, 0.3), (64, 8, 0.05)):
        for redundant in (1, 2):
            random = np.random.default_rng(0)
            weight_L = random.lognormal(0.0, 1.2, experts)
            slots_RS = ExpertPlacement.initial(1, experts, ranks, redundant * ranks).by_rank[0]
            node_R, even_R = np.arange(ranks) // 8, np.ones(ranks)
            seconds = []
            for _ in range(100 if quick else 500):
                counts_RL = random.multinomial(PAIRS * experts, weight_L / weight_L.sum(), size=ranks)
                start = time.perf_counter()
                chosen_RS = choose_copies(counts_RL.sum(axis=0), slots_RS, experts // ranks, even_R, 1)
                split_tokens(counts_RL, chosen_RS, node_R, even_R, 0)
                seconds.append(time.perf_counter() - start)
            median = 1e3 * float(np.median(seconds))
            name = f"{experts} experts, {ranks} ranks, e={redundant}"
            rows.append([name, f"{median:.3f}", f"{1e3 * np.percentile(seconds, 95):.3f}"])
            figures[name] = seconds
            bars.append(Bar(f"milliseconds to plan {name}", median, most))
    gather = [1e3 * value for value in workers.run(2, gather_seconds)]
    print(f"Milliseconds to plan a layer; gloo's all-gather of 256 counts takes {max(gather):.3f} on two ranks\n")
    print_table(["layer", "median", "95th percentile"], rows)
    return bars, figures


def gather_seconds() -> float:
    """On every worker: the median time of an all-gather of 256 counts."""
    mine, all_counts = torch.ones(256, dtype=torch.int64), torch.empty(512, dtype=torch.int64)
    seconds = []
    for _ in range(200):
        start = time.perf_counter()
        all_gather_single(all_counts, mine)
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds))


def trained(workers: Workers, quick: bool) -> tuple[list[Bar], dict[str, Any]]:
    """Step time of a layer under a router that sends three quarters of the tokens to one rank."""
    rows, bars, figures = [], [], {}
    for title, hot in (("three quarters to rank 0", 0.75), ("even router", 0.5)):
        outcomes = workers.run(2, train_lanes, hot, 20 if quick else 80, seconds=300)
        seconds = {lane: np.max([outcome[0][lane] for outcome in outcomes], axis=0) for lane in TRAINED}
        peaks = {lane: max(outcome[1][lane] for outcome in outcomes) for lane in TRAINED}
        ideal = seconds["ideal"]
        for lane in TRAINED:
            ratio = ideal / seconds[lane]
            low, middle, high = np.percentile(ratio, [10, 50, 90])
            speed = f"{middle:.3f} ({low:.3f}-{high:.3f})"
            rows.append([title, lane, f"{1e3 * np.median(seconds[lane]):.1f}", speed, str(peaks[lane])])
            figures[f"{title}, {lane}"] = {"seconds": seconds[lane].tolist(), "peak": peaks[lane]}
        if hot > 0.5:
            bars.append(
                Bar("speed over the ideal's, batch", float(np.median(ideal / seconds["batch"])), 0.95, at_least=True)
            )
            level = peaks["ideal"]
            bars.append(Bar("peak tokens over the mean and one an expert, batch", peaks["batch"] / (level + 16), 1.02))
        else:
            over = float(np.median(seconds["batch"] / seconds["none"]))
            bars.append(Bar("time over none where there is nothing to balance, batch", over, 1.03))
    print("Training steps of a layer on two ranks, one thread each\n")
    print_table(["router", "lane", "ms a step", "speed over the ideal's (10th-90th)", "peak tokens"], rows)
    return bars, figures


def train_lanes(hot: float, rounds: int) -> tuple[dict[str, list[float]], dict[str, int]]:
    """On every worker: rounds in which each lane takes one step, in an order that changes."""
    torch.set_num_threads(1)
    experts, width, hidden, tokens = 16, 256, 512, 8192
    rank = dist.get_rank()
    lanes: dict[str, tuple[nn.Module, torch.optim.Optimizer, ExpertLoadBalancer]] = {}
    for lane in TRAINED:
        holder = nn.ModuleDict({"experts": Experts(experts, width, hidden)})
        parallelize_experts(holder, num_redundant_experts=8 if lane in ("window", "batch") else 0)
        optimizer = torch.optim.SGD(holder.parameters(), lr=1e-3)
        balancer = ExpertLoadBalancer(
            holder,
            [optimizer],
            policy=BalancedPolicy() if lane == "window" else StaticPolicy(),
            window_size=INTERVAL,
            step_interval=INTERVAL,
            redundancy="batch" if lane == "batch" else "window",
        )
        lanes[lane] = holder["experts"], optimizer, balancer
    seconds: dict[str, list[float]] = {lane: [] for lane in TRAINED}
    peaks = dict.fromkeys(TRAINED, 0)
    random = torch.Generator().manual_seed(rank)
    warm_up = 10
    for turn in range(warm_up + rounds):
        hidden_TD = torch.randn(tokens, width, generator=random)
        for place in range(len(TRAINED)):
            lane = TRAINED[(turn + place) % len(TRAINED)]
            module, optimizer, balancer = lanes[lane]
            index = router(tokens, experts, 0.5 if lane == "ideal" else hot)
            dist.barrier()
            start = time.perf_counter()
            module(hidden_TD, index, torch.ones(tokens, 1)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            served = balancer.step()
            dist.barrier()
            if turn >= warm_up:
                assert served is not None
                seconds[lane].append(time.perf_counter() - start)
                peaks[lane] = max(peaks[lane], int(served.max_tokens))
    return seconds, peaks


def router(tokens: int, experts: int, hot: float) -> Tensor:
    """Ids ``[tokens, 1]``: the part ``hot`` of them evenly to the first half of the experts."""
    first = round(tokens * hot)
    half = experts // 2
    return torch.cat([torch.arange(first) % half, half + torch.arange(tokens - first) % half])[:, None]


if __name__ == "__main__":
    sys.exit(main())
