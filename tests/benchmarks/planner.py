"""How well BalancedPolicy plans, how little it moves and how fast it is, against DeepSeek's published algorithm.

Both replay the same loads on one core: a decision after 25 steps and then every 100, each judged by the steps that
follow it and that it has not seen. ``rebalance_experts`` is taken as published, from its slots as they come: an expert
may be on a rank twice, any copy may be the primary. It plans for the window's sum. BalancedPolicy plans for the
forecast of the same window, from the placement that it left, and may decide early when the load drifts away, as it does
in ``EPLBCallback``. Every tenth step is judged, by balancedness over all layers, once with the tokens of an expert
divided evenly among its copies and once by quotas that level the ranks in each step (by coordinate descent, the same
for both). Each rank gets 65,536 token-expert pairs a step on the mean: 8,192 tokens, top-8.

Times are the processor's, of the one thread that both run on: others on the machine make them longer by little.

Where neither can know better (an even load, hot experts that nobody can foresee) both are equal but for the sampling of
tokens. So a cell counts as behind only by as much as its difference exceeds two standard errors, over the judged steps.
"""

import os
import sys
import time
from dataclasses import replace
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch

from lightning_eplb.forecast import forecast, plain_mean
from lightning_eplb.functional import balancedness
from lightning_eplb.placement import EMPTY, ExpertPlacement
from lightning_eplb.policies import BalancedPolicy, Outlook, Topology
from lightning_eplb.policies.deepseek import rebalance_experts
from lightning_eplb.policies.split import level_tokens
from lightning_eplb.schedule import Schedule
from lightning_eplb.simulate import DEFAULT_COSTS
from lightning_eplb.synthetic import SYNTHETIC_LOADS, synthetic_load
from lightning_eplb.trace import read_trace
from tests.benchmarks.report import Bar, finish, parse_arguments, print_table

SHAPES = [  # layers, experts, redundant, ranks, nodes, groups
    (26, 64, 0, 8, 1, 1),
    (48, 128, 16, 8, 1, 1),
    (58, 256, 32, 32, 4, 8),
    (61, 384, 64, 64, 8, 8),
    (61, 1024, 1024, 1024, 128, 8),
]
TRACE = Path(__file__).with_name("pretrain_trace.npy")
TRACE_SHAPES = [(0, 16, 0, 4, 1, 1), (0, 16, 4, 4, 1, 1), (0, 16, 8, 8, 1, 1)]
STEPS, WINDOW, INTERVAL, JUDGED_EVERY = 325, 100, 100, 10
TOKENS_PER_RANK = 65_536
SPLITS = ("even", "level")
TIMED = {
    "even split": ("even", DEFAULT_COSTS),
    "levelled": ("level", DEFAULT_COSTS),
    "levelled, a copy costs 2,000 tokens": ("level", replace(DEFAULT_COSTS, copy=2000.0)),
}
"""How tokens are divided, and what is told of costs; in the others copies are free, as they are to the baseline."""
SWEEPS = 60


def main() -> int:
    """Run all parts, print their tables and then the bars."""
    arguments = parse_arguments(__doc__)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    shapes = [(min(shape[0], 6), *shape[1:]) for shape in SHAPES[:4]] if arguments.quick else SHAPES
    for policy in (BalancedPolicy(split="even"), BalancedPolicy(split="level")):
        policy.warm_up(ExpertPlacement.initial(1, 4, 2, 2))
    bars, figures = [], {}
    for part in (planned_and_drifted, timing, growth, forecasts, next_window):
        start = time.perf_counter()
        part_bars, figures[part.__name__] = part(shapes, arguments.quick)
        bars += part_bars
        print(f"[{part.__name__}: {time.perf_counter() - start:.0f} s]\n", flush=True)
    return finish(bars, figures, arguments.json)


def planned_and_drifted(shapes, quick):
    """Levelled quotas on a lognormal-1.2 load that was planned for, and after each expert's drifted by 10 %."""
    rows, bars, figures = [], [], {}
    draws = 2 if quick else 4
    for redundant_per_rank, bar_planned, bar_drifted in ((1, 0.985, 0.95), (2, 0.997, 0.97)):
        for layers, experts, _, ranks, nodes, _ in shapes:
            if redundant_per_rank == 2 and ranks > 64:
                continue
            random = np.random.default_rng(experts)
            load_YL = np.round(random.lognormal(0.0, 1.2, (layers, experts)) * 1e5).astype(np.int64)
            before = ExpertPlacement.initial(layers, experts, ranks, redundant_per_rank * ranks)
            after = BalancedPolicy(split="level").rearrange(load_YL, before, Topology.even(ranks, nodes))
            planned = balancedness(level_tokens(load_YL, after.by_rank))
            drifted = []
            for _ in range(draws):
                moved_YL = np.round(load_YL * random.lognormal(0.0, 0.1, load_YL.shape)).astype(np.int64)
                drifted.append(balancedness(level_tokens(moved_YL, after.by_rank)))
            name = f"{experts}+{redundant_per_rank * ranks} @ {ranks}"
            rows.append([name, f"{planned:.4f}", f"{np.mean(drifted):.4f}", f"{min(drifted):.4f}"])
            figures[name] = {"planned": planned, "drifted": drifted}
            bars.append(Bar(f"balancedness of {name}, levelled, planned for", planned, bar_planned, at_least=True))
            bars.append(
                Bar(f"balancedness of {name}, levelled, drifted by 10 %", np.mean(drifted), bar_drifted, at_least=True)
            )
    print("Lognormal-1.2, from the initial placement, levelled quotas: balancedness\n")
    print_table(["experts", "planned for", "drifted by 10 %", "worst of the draws"], rows)
    return bars, figures


def timing(shapes, quick):
    """Both planners in turn, on the same loads: a first plan from the initial placement, and later ones."""
    rows, bars, figures = [], [], {}
    for layers, experts, redundant, ranks, nodes, groups in shapes:
        random = np.random.default_rng(ranks)
        placements = {lane: ExpertPlacement.initial(layers, experts, ranks, redundant) for lane in TIMED}
        topology = Topology.even(ranks, nodes)
        weight_YL = random.lognormal(0.0, 1.2, (layers, experts))
        seconds = {"baseline": [], **{lane: [] for lane in TIMED}}
        for _ in range(4 if quick else 9):
            load_YL = np.round(weight_YL / weight_YL.sum(axis=1, keepdims=True) * ranks * TOKENS_PER_RANK * WINDOW)
            load_YL = load_YL.astype(np.int64)
            start = time.process_time()
            rebalance_experts(load_YL, experts + redundant, groups, nodes, ranks)
            seconds["baseline"].append(time.process_time() - start)
            for lane, (split, costs) in TIMED.items():
                policy = BalancedPolicy(split=split)
                ahead = Outlook(load_YL, WINDOW, plain_mean(load_YL), INTERVAL, costs)
                start = time.process_time()
                placements[lane] = policy.look_ahead(ahead, placements[lane], topology)
                seconds[lane].append(time.process_time() - start)
            weight_YL = weight_YL * random.lognormal(0.0, 0.1, weight_YL.shape)
        name = f"{experts}+{redundant} @ {ranks}"
        baseline = float(np.median(seconds["baseline"]))
        row, figures[name] = [name, f"{1e3 * baseline:.2f}"], {"baseline": seconds["baseline"]}
        for lane in TIMED:
            first, later = seconds[lane][0], seconds[lane][1:]
            ratios = np.array(later) / seconds["baseline"][1:]
            row += [f"{1e3 * first:.2f}", f"{1e3 * np.median(later):.2f}"]
            row.append(f"{np.median(ratios):.2f} ({ratios.min():.2f}-{ratios.max():.2f})")
            figures[name][lane] = seconds[lane]
            if ranks == 64 and not quick:  # with all layers
                bars.append(Bar(f"time over the baseline's, {name}, {lane}", float(np.median(ratios)), 0.1))
            if ranks == 1024:
                bars.append(Bar(f"milliseconds, {name}, {lane}", 1e3 * float(np.median(later)), 50.0))
        rows.append(row)
    print("Time of a plan for all layers, drift of 10 % from plan to plan: milliseconds\n")
    header = ["experts", "baseline"]
    for lane in TIMED:
        header += [f"{lane}: first", "later", "over the baseline's"]
    print_table(header, rows)
    return bars, figures


def growth(shapes, quick):
    """Time of a levelled plan over the ranks, 4 experts and a redundant one on each."""
    rows, figures = [], {}
    for ranks in (8, 16, 32, 64, 128, 256, 512, 1024)[: 5 if quick else None]:
        layers, experts = 8, 4 * ranks
        load_YL = np.round(np.random.default_rng(ranks).lognormal(0.0, 1.2, (layers, experts)) * 1e5).astype(np.int64)
        before = ExpertPlacement.initial(layers, experts, ranks, ranks)
        row = [str(ranks)]
        for split in SPLITS:
            policy, seconds = BalancedPolicy(split=split), []
            for _ in range(3):
                start = time.process_time()
                policy.rearrange(load_YL, before, Topology.even(ranks))
                seconds.append(time.process_time() - start)
            row.append(f"{1e6 * min(seconds) / layers:.0f}")
            figures[f"{split} @ {ranks}"] = min(seconds) / layers
        rows.append(row)
    print("A first plan from the initial placement: microseconds a layer\n")
    print_table(["ranks", *SPLITS], rows)
    return [], figures


def forecasts(shapes, quick):
    """The forecast's error against that of the plain mean of the window."""
    rows, worst, figures = [], 0.0, {}
    for name in [*SYNTHETIC_LOADS, "trace"]:
        load_WYL = read_trace(TRACE) if name == "trace" else _synthetic(name, (8, 64, 0, 8, 1, 1))
        errors = []
        interval = INTERVAL if name != "trace" else INTERVAL // 2
        for end in range(interval // 4, len(load_WYL) - interval + 1, interval):
            window_WYL = load_WYL[max(0, end - WINDOW) : end]
            came_YL = load_WYL[end : end + interval].sum(axis=0)
            errors.append([forecast(window_WYL).error(came_YL), plain_mean(window_WYL.sum(axis=0)).error(came_YL)])
        ours, mean = np.mean(errors, axis=0)
        rows.append([name, f"{ours:.4f}", f"{mean:.4f}"])
        figures[name] = {"forecast": ours, "mean": mean}
        worst = max(worst, ours / mean if mean else 1.0)
    print("Error of the forecast of the next window (see Forecast.error), 64 experts\n")
    print_table(["load", "forecast", "plain mean"], rows)
    return [Bar("error of the forecast over the plain mean's, worst load", worst, 1.0)], figures


def next_window(shapes, quick):
    """Balancedness of the steps after each decision, and rows moved."""
    rows, bars, figures = [], [], {}
    behind = dict.fromkeys(SPLITS, -1.0)
    cells, lost = 0, 0
    loads = [(name, shape) for shape in shapes for name in SYNTHETIC_LOADS]
    loads += [("trace", shape) for shape in TRACE_SHAPES]
    moves = []
    for name, shape in loads:
        load_WYL = read_trace(TRACE) if name == "trace" else _synthetic(name, shape)
        row = [f"{shape[1]}+{shape[2]} @ {shape[3]}", name]
        theirs, their_rows = _replay_baseline(load_WYL, shape)
        for split in SPLITS:
            ours, our_rows = _replay_ours(load_WYL, shape, split)
            difference = ours - theirs[split]
            error = difference.std(ddof=1) / np.sqrt(len(difference)) if len(difference) > 1 else 0.0
            row += [f"{theirs[split].mean():.4f}", f"{ours.mean():.4f}", f"{difference.mean():+.4f}", f"{error:.4f}"]
            row.append(f"{our_rows}/{their_rows}")
            figures[f"{row[0]} {name} {split}"] = [theirs[split].mean(), ours.mean(), error, our_rows, their_rows]
            behind[split] = max(behind[split], -difference.mean() - 2 * error)
            cells += 1
            lost += difference.mean() < -2 * error
            if name == "drift-10" and their_rows:
                moves.append((our_rows / their_rows, row[0], split))
        rows.append(row)
        print(".", end="", flush=True)
    print("\n\nBalancedness of the steps after a decision (the published algorithm, BalancedPolicy, difference and its")
    print("standard error), and rows that changed ranks (ours are primaries, its are all slots)\n")
    header = ["experts", "load"]
    for split in SPLITS:
        header += [f"{split}: baseline", "ours", "difference", "error", "rows moved"]
    print_table(header, rows)
    print(f"{lost} of {cells} cells are behind by more than two standard errors\n")
    for split in SPLITS:
        bars.append(Bar(f"behind the baseline beyond sampling, worst cell, {split} split", behind[split], 0.0))
    most, where, split = max(moves)
    bars.append(Bar(f"rows moved over the baseline's at 10 % drift, worst ({where}, {split} split)", most, 0.2))
    return bars, figures


def _synthetic(name, shape):
    layers, experts, _, ranks, _, _ = shape
    return synthetic_load(
        name,
        STEPS,
        layers,
        experts,
        tokens_per_step=TOKENS_PER_RANK * ranks,
        num_ranks=ranks,
        interval=INTERVAL,
        seed=1,
    )


def _is_judged(step, first):
    return step >= first and step % JUDGED_EVERY == JUDGED_EVERY // 2


def _interval(load_WYL):
    return INTERVAL if len(load_WYL) >= STEPS else len(load_WYL) // 6


def _judge(load_YL, slots_YRS, split):
    if split == "level":
        return balancedness(level_tokens(load_YL, slots_YRS, sweeps=SWEEPS))
    held = slots_YRS.reshape(len(slots_YRS), -1)
    layer = np.arange(len(held))[:, None]
    copies_YL = np.zeros(load_YL.shape, dtype=np.int64)
    np.add.at(copies_YL, (np.broadcast_to(layer, held.shape)[held != EMPTY], held[held != EMPTY]), 1)
    share_YP = np.where(held == EMPTY, 0.0, np.take_along_axis(load_YL / copies_YL, np.maximum(held, 0), axis=1))
    return balancedness(share_YP.reshape(slots_YRS.shape).sum(axis=2))


def _replay_ours(load_WYL, shape, split):
    layers, experts, redundant, ranks, nodes, _ = (load_WYL.shape[1], *shape[1:])
    policy, topology = BalancedPolicy(split=split), Topology.even(ranks, nodes)
    placement = ExpertPlacement.initial(layers, experts, ranks, redundant)
    interval = _interval(load_WYL)
    schedule, first, rows, values = Schedule(interval), interval // 4, 0, []
    # Balancedness is asked of every step only where a drop of it could bring a decision forward.
    watched = 4
    for step, load_YL in enumerate(load_WYL):
        if _is_judged(step, first):
            values.append(_judge(load_YL, placement.by_rank, split))
        seen = _judge(load_YL[:watched], placement.by_rank[:watched], split)
        if schedule.step(seen):
            end = step + 1
            window_WYL = load_WYL[end - schedule.look_back(min(end, WINDOW)) : end]
            outlook = Outlook(window_WYL.sum(axis=0), len(window_WYL), forecast(window_WYL), interval, DEFAULT_COSTS)
            after = policy.look_ahead(outlook, placement, topology)
            rows += int((after.primary_rank != placement.primary_rank).sum())
            placement = after
    return np.array(values), rows


def _replay_baseline(load_WYL, shape):
    layers, experts, redundant, ranks, nodes, groups = (load_WYL.shape[1], *shape[1:])
    slots_YRS = ExpertPlacement.initial(layers, experts, ranks, redundant).by_rank
    interval = _interval(load_WYL)
    rows, values = 0, {split: [] for split in SPLITS}
    once_YRS = slots_YRS
    for step, load_YL in enumerate(load_WYL):
        if _is_judged(step, interval // 4):
            values["even"].append(_judge(load_YL, slots_YRS, "even"))
            values["level"].append(_judge(load_YL, once_YRS, "level"))
        if (step + 1 - interval // 4) % interval == 0:
            window_YL = load_WYL[max(0, step + 1 - WINDOW) : step + 1].sum(axis=0)
            planned = rebalance_experts(window_YL, experts + redundant, groups, nodes, ranks)[0].numpy()
            planned = planned.reshape(layers, ranks, -1)
            for layer in range(layers):
                for rank in range(ranks):
                    rows += len(set(planned[layer, rank].tolist()) - set(slots_YRS[layer, rank].tolist()))
            slots_YRS = planned
            ordered = np.sort(planned, axis=2)
            once_YRS = ordered.copy()  # quotas know an expert once on a rank
            once_YRS[:, :, 1:][ordered[:, :, 1:] == ordered[:, :, :-1]] = EMPTY
    return {split: np.array(parts) for split, parts in values.items()}, rows


if __name__ == "__main__":
    sys.exit(main())
