"""How level the ranks are in the steps that were executed: no copies, copies by window, copies by batch.

Real processes over gloo. One layer of 8 experts a rank gets 64 token-expert pairs a rank and expert in each step,
routed as a synthetic load says; what a rank served is read from the step itself. ``none`` has no redundant slots,
``window`` lets ``BalancedPolicy`` decide every 20 steps, ``batch`` leaves the primaries where they are and chooses two
copies a rank in each forward, ``both`` relocates as ``window`` does and chooses as ``batch`` does.

Then a layer is trained on two ranks of one thread each, three quarters of the tokens on the experts of rank 0, in four
lanes that take turns in every round: without copies, by window, by batch, and with an even router, which is the ideal.
"""

import os
import sys
import time
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
from lightning_eplb.parallel.rows import all_gather_single
from lightning_eplb.placement import ExpertPlacement
from lightning_eplb.policies import Costs
from lightning_eplb.policies.batch import choose_copies
from lightning_eplb.policies.split import split_tokens
from lightning_eplb.synthetic import synthetic_load
from tests.benchmarks.report import Bar, finish, parse_arguments, print_table
from tests.workers import Workers

EXPERTS_PER_RANK, PAIRS = 8, 64
LOADS = ("balanced", "lognormal-0.7", "lognormal-1.2", "zipf", "hot-expert", "rotating", "burst", "one-expert")
LANES: dict[str, dict[str, Any]] = {
    "none": {"redundant": 0, "relocates": False, "redundancy": "window"},
    "window": {"redundant": 2, "relocates": True, "redundancy": "window"},
    "batch": {"redundant": 2, "relocates": False, "redundancy": "batch"},
    "both": {"redundant": 2, "relocates": True, "redundancy": "batch"},
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
            output = output.index_add(0, token, served * top_k_weights[token, k, None])
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
        for name in (*LOADS, "hot-rank"):
            lanes = workers.run(ranks, run_lanes, name, STEPS, seconds=300)[0]
            figures[f"{name} @ {ranks}"] = {lane: float(np.mean(values)) for lane, values in lanes.items()}
            row = [str(ranks), name]
            for values in lanes.values():
                row.append(f"{np.mean(values):.4f} ({np.max(values):.3f})")
            rows.append(row)
            best = "batch" if name != "hot-rank" else "both"
            values = lanes[best] if best == "batch" else lanes[best][INTERVAL:]
            bars.append(Bar(f"max/mean of {name} on {ranks} ranks, {best}, worst step", float(np.max(values)), 1.02))
            worse = float(np.max(np.array(lanes["batch"]) - np.array(lanes["none"])))
            bars.append(Bar(f"batch over none, {name} on {ranks} ranks, worst step", worse, 0.0))
            if name != "hot-rank":
                after = float(np.max(lanes["both"][INTERVAL:])) if name.startswith(("lognormal", "zipf")) else None
                if after is not None:
                    bars.append(Bar(f"max/mean of {name} on {ranks} ranks, relocated, worst step", after, 1.01))
    print("Rank max/mean of the executed steps: mean (worst)\n")
    print_table(["ranks", "load", *LANES], rows)
    return bars, figures


def run_lanes(name: str, steps: int) -> dict[str, list[float]]:
    """On every worker: the same load through all lanes."""
    torch.set_num_threads(1)
    ranks, rank = dist.get_world_size(), dist.get_rank()
    experts = EXPERTS_PER_RANK * ranks
    load_WL = synthetic_load(name, steps, 1, experts, tokens_per_step=PAIRS * ranks * experts, num_ranks=ranks)[:, 0]
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
            assert served is not None
            found[lane].append(1.0 / served.balancedness)
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
    experts, width, hidden, tokens = 16, 256, 512, 2048
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
