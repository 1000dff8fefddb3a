"""How well BalancedPolicy plans, how little it moves and how fast it is, against DeepSeek's published algorithm.

``cells``: both plan for one load and are judged on it and on the next, from the initial placement, with levelled token
split: workloads of a trace of real loads (``--loads``; DeepSeek-V3's, for instance) and their neighbours, prefill and
then decode, sampled parts of one workload, sorted lognormal loads and loads whose groups of neighbours change together.
The baseline is the better of ``DeepSeekPolicy`` and of what it was before its primaries were exchanged. They share
the processors that there are.

``next_window``: both replay synthetic loads: a decision after 25 steps and then every 100, each judged by the steps
that follow it and that it has not seen. ``rebalance_experts`` is taken as published, from its slots as they come: an
expert may be on a rank twice, any copy may be the primary. It plans for the window's sum. BalancedPolicy plans for the
forecast of the same window, from the placement that it left, and may decide early when the load drifts away, as it does
in ``EPLBCallback``. Every tenth step is judged by balancedness over all layers, with the tokens of an expert divided by
quotas that level the ranks. Each rank gets 65,536 token-expert pairs a step on the mean: 8,192 tokens, top-8.

Times are the processor's, of the one thread that both run on: others on the machine make them longer by little.
"""

import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import cache
from itertools import pairwise, product
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch

from lightning_eplb.balancer.schedule import Schedule
from lightning_eplb.functional import balancedness
from lightning_eplb.placement import EMPTY, ExpertPlacement
from lightning_eplb.policies import BalancedPolicy, DeepSeekPolicy, Outlook, Topology
from lightning_eplb.policies.deepseek import _match_primaries, order_slots, rebalance_experts
from lightning_eplb.policies.forecast import forecast, plain_mean, sub_windows
from lightning_eplb.policies.token_split import level_tokens
from lightning_eplb.simulation.replay import DEFAULT_COSTS
from lightning_eplb.simulation.synthetic import SYNTHETIC_LOADS, synthetic_load
from lightning_eplb.simulation.trace import read_trace
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
TIMED = {
    "replicas free": DEFAULT_COSTS,
    "a replica costs 2,000 tokens": replace(DEFAULT_COSTS, copy=2000.0),
}
"""Costs that the policy is told."""
CELLS = [(ranks, per_rank) for ranks in (4, 8, 16, 32, 64) for per_rank in (0, 1, 2, 4)]
"""Ranks, and redundant slots of each."""
JITTERS = 8
PREFILL, DECODE = range(8), range(8, 12)
"""Workloads of the trace."""
SWEEPS = 60


def main() -> int:
    """Run all parts, print their tables and then the bars."""
    arguments = parse_arguments(
        __doc__, loads="a trace whose steps are workloads of 256 experts: eight of prefill, four of decode"
    )
    torch.set_num_threads(1)
    shapes = [(min(shape[0], 6), *shape[1:]) for shape in SHAPES[:4]] if arguments.quick else SHAPES
    BalancedPolicy().warm_up(ExpertPlacement.initial(1, 4, 2, 2))
    bars, figures = [], {}
    for part in (cells, planned_and_drifted, timing, growth, forecasts, next_window):
        start = time.perf_counter()
        part_bars, figures[part.__name__] = part(arguments.loads if part is cells else shapes, arguments.quick)
        bars += part_bars
        print(f"[{part.__name__}: {time.perf_counter() - start:.0f} s]\n", flush=True)
    return finish(bars, figures, arguments.json)


def cells(loads, quick):
    """Max/mean load of the fullest rank, planned and on the next load: mean over layers, pairs and jitters."""
    rows, figures, excess = [], {}, []
    worst = {"redundant": [-1.0, -1.0], "none": [-1.0, -1.0]}
    over_none = [-1.0, -1.0]
    shapes = CELLS[4:6] if quick else CELLS
    tasks = [
        (*shape, kind, at) for shape in shapes for kind, pairs in _pairs(loads).items() for at in range(len(pairs))
    ]
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        judged = dict(zip(tasks, pool.map(_cell, tasks, [loads] * len(tasks), [quick] * len(tasks)), strict=True))
    without = {}
    for (ranks, per_rank), kind in product(shapes, _pairs(loads)):
        parts = [lanes for task, lanes in judged.items() if task[:3] == (ranks, per_rank, kind)]
        planned, following, last = {}, {}, {}
        for lane in parts[0]:
            planned_X, next_X = np.concatenate([lanes[lane] for lanes in parts], axis=1)
            planned[lane], following[lane], last[lane] = planned_X.mean(), next_X.mean(), np.percentile(next_X, 95)
        theirs = min("DeepSeek", "before", key=following.__getitem__)
        rows.append([f"256+{ranks * per_rank} @ {ranks}", kind])
        for lane in (theirs, "balanced"):
            rows[-1] += [f"{planned[lane]:.4f}", f"{following[lane]:.4f} ({last[lane]:.2f})"]
        figures[" ".join(rows[-1][:2])] = [planned, following, last]
        key, behind = "redundant" if per_rank else "none", following["balanced"] - following[theirs]
        second = last["balanced"] - last[theirs] if per_rank else planned["balanced"] - planned[theirs]
        worst[key] = [max(worst[key][0], behind), max(worst[key][1], second)]
        if per_rank:
            excess.append((following["balanced"] - 1, following[theirs] - 1))
            over = [
                now["balanced"] - before for now, before in zip((planned, following), without[ranks, kind], strict=True)
            ]
            over_none = np.maximum(over_none, over)
        else:
            without[ranks, kind] = planned["balanced"], following["balanced"]
    print("Max/mean load of the fullest rank: planned, and on the next load (95th percentile)\n")
    print_table(["experts", "load", "baseline planned", "next", "ours planned", "next"], rows)
    ours, theirs = np.sum(excess, axis=0)
    return [
        Bar("behind the baseline on the next load, worst cell with redundant slots", worst["redundant"][0], 0.005),
        Bar("the same, 95th percentile", worst["redundant"][1], 0.03),
        Bar("excess on the next load over the baseline's, all cells with redundant slots", ours / theirs, 2 / 3),
        Bar("behind the baseline on the next load, worst cell without", worst["none"][0], 0.01),
        Bar("the same, on the planned load", worst["none"][1], 0.02),
        Bar("with redundant slots over without, planned load, worst cell", over_none[0], 0.002),
        Bar("the same, on the next load", over_none[1], 0.002),
    ], figures


def _cell(task, loads, quick):
    """Judge the plans for one load and its jitters: planned and next, for each lane, ``[2, layers]``."""
    torch.set_num_threads(1)
    ranks, per_rank, kind, at = task
    now_YL, then_YL = (load_YL[:: 9 if quick else 1] for load_YL in _pairs(loads)[kind][at])
    before = ExpertPlacement.initial(len(now_YL), now_YL.shape[1], ranks, ranks * per_rank)
    topology, random = Topology.even(ranks), np.random.default_rng([ranks, at])
    found = {"DeepSeek": [], "before": [], "balanced": []}
    for _ in range(1 if quick else JITTERS):
        load_YL = np.int64(now_YL * random.uniform(0.998, 1.002, now_YL.shape))
        plans = {
            "balanced": BalancedPolicy().rearrange(load_YL, before, topology),
            "DeepSeek": DeepSeekPolicy().rearrange(load_YL, before, topology),
            "before": _as_before(load_YL, before),
        }
        for lane, placement in plans.items():
            found[lane].append(_judged(placement, load_YL, then_YL))
    return {lane: np.concatenate(parts, axis=1) for lane, parts in found.items()}


def _judged(placement, load_YL, then_YL):
    """Max/mean of the fullest rank of each layer, on both loads."""
    tokens = (level_tokens(each, placement.by_rank, sweeps=SWEEPS) for each in (load_YL, then_YL))
    return [tokens_YR.max(axis=1) / tokens_YR.mean(axis=1) for tokens_YR in tokens]


def _as_before(load_YL, before, groups=1, nodes=1):
    """The published plan; a rank that lacks primaries takes those that found no room, for its least loaded replicas."""
    ranks, n = before.num_ranks, before.primaries_per_rank
    planned = rebalance_experts(load_YL, before.num_physical_experts, groups, nodes, ranks)[0].numpy()
    slots_YRS = before.by_rank.copy()
    for layer, planned_RS in enumerate(planned.reshape(len(planned), ranks, -1)):
        held = [set(row) for row in planned_RS.tolist()]
        matched = _match_primaries(held, before.primary_rank[layer].tolist(), n)
        own = [{expert for expert, at in enumerate(matched) if at == rank} for rank in range(ranks)]
        more = [of_rank - mine for of_rank, mine in zip(held, own, strict=True)]
        share = load_YL[layer] / np.bincount([expert for of_rank in held for expert in of_rank], minlength=len(matched))
        for expert in sorted((x for x, at in enumerate(matched) if at is None), key=lambda x: (-share[x], x)):
            lacking = [rank for rank in range(ranks) if len(own[rank]) < n]
            rank = min(lacking, key=lambda rank: (sum(share[x] for x in held[rank]), rank))
            own[rank].add(expert)
            held[rank].add(expert)
        more = [sorted(sorted(rest), key=lambda x: -share[x])[: before.slots_per_rank - n] for rest in more]
        slots_YRS[layer] = order_slots([sorted(mine) for mine in own], more, before.by_rank[layer])
    return before.with_slots(slots_YRS)


@cache
def _pairs(loads):
    """Loads to plan for, each with the next one, by kind, int64 ``[Y, L]``."""
    real = read_trace(loads) if loads is not None else None
    random, layers, experts = np.random.default_rng(5), 58, 256
    kinds = {}
    if real is not None:
        kinds["neighbours"] = list(pairwise(real))
        kinds["prefill, decode"] = [(real[now], real[then]) for now in PREFILL for then in DECODE][::5]
        share_WYL = real / real.sum(axis=2, keepdims=True)
        kinds["sampled"] = [
            tuple(np.array([random.multinomial(65_536, share_L) for share_L in share_WYL[step]]) for _ in range(2))
            for step in (1, 5, 9)
        ]
    kinds["sorted"] = []
    for sigma in (0.5, 0.8, 1.2):
        load_YL = -np.sort(-random.lognormal(0, sigma, (layers, experts)), axis=1) * 1e5
        kinds["sorted"].append((np.int64(load_YL), np.int64(load_YL * random.lognormal(0, 0.1, load_YL.shape))))
    kinds["grouped"] = []
    for sigma in (0.3, 0.6):
        own_YL, groups = random.lognormal(0, 0.6, (layers, experts)), random.lognormal(0, sigma, (2, layers, 16))
        first, second = groups.repeat(16, axis=2)
        later_YL = own_YL * first**0.7 * second**0.5 * random.lognormal(0, 0.1, own_YL.shape)
        kinds["grouped"].append((np.int64(own_YL * first * 1e5), np.int64(later_YL * 1e5)))
    return kinds


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
            after = BalancedPolicy().rearrange(load_YL, before, Topology.even(ranks, nodes))
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
    """Both planners in turn, on the same loads: a first plan from the initial placement, and later ones.

    The baseline is ``DeepSeekPolicy`` before its primaries were exchanged.
    """
    rows, bars, figures = [], [], {}
    for layers, experts, redundant, ranks, nodes, groups in shapes:
        random = np.random.default_rng(ranks)
        placements = {lane: ExpertPlacement.initial(layers, experts, ranks, redundant) for lane in TIMED}
        topology = Topology.even(ranks, nodes)
        weight_YL = random.lognormal(0.0, 1.2, (layers, experts))
        seconds = {"baseline": [], **{lane: [] for lane in TIMED}}
        start_from = ExpertPlacement.initial(layers, experts, ranks, redundant)
        for _ in range(4 if quick else 9):
            load_YL = np.round(weight_YL / weight_YL.sum(axis=1, keepdims=True) * ranks * TOKENS_PER_RANK * WINDOW)
            load_YL = load_YL.astype(np.int64)
            start = time.process_time()
            _as_before(load_YL, start_from, groups, nodes)
            seconds["baseline"].append(time.process_time() - start)
            for lane, costs in TIMED.items():
                policy = BalancedPolicy()
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
            if ranks in (32, 1024) and not quick:  # with all layers
                bars.append(Bar(f"time over DeepSeekPolicy's, {name}, {lane}", float(np.median(ratios)), 1.0))
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
        seconds = []
        for _ in range(3):
            start = time.process_time()
            BalancedPolicy().rearrange(load_YL, before, Topology.even(ranks))
            seconds.append(time.process_time() - start)
        rows.append([str(ranks), f"{1e6 * min(seconds) / layers:.0f}"])
        figures[str(ranks)] = min(seconds) / layers
    print("A first plan from the initial placement: microseconds a layer\n")
    print_table(["ranks", "us a layer"], rows)
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
    rows, bars, figures, moves, behind = [], [], {}, [], -1.0
    loads = [(name, shape) for shape in shapes for name in SYNTHETIC_LOADS]
    loads += [("trace", shape) for shape in TRACE_SHAPES]
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        replays = list(pool.map(_replay, *zip(*loads, strict=True)))
    for (name, shape), (theirs, their_rows, ours, our_rows) in zip(loads, replays, strict=True):
        difference = ours - theirs
        error = difference.std(ddof=1) / np.sqrt(len(difference)) if len(difference) > 1 else 0.0
        rows.append([f"{shape[1]}+{shape[2]} @ {shape[3]}", name, f"{theirs.mean():.4f}", f"{ours.mean():.4f}"])
        rows[-1] += [f"{difference.mean():+.4f}", f"{error:.4f}", f"{our_rows}/{their_rows}"]
        figures[" ".join(rows[-1][:2])] = [theirs.mean(), ours.mean(), error, our_rows, their_rows]
        behind = max(behind, -difference.mean() - 2 * error)
        if name == "drift-10" and their_rows:
            moves.append((our_rows / their_rows, rows[-1][0]))
    print("Balancedness of the steps after a decision (the published algorithm, BalancedPolicy, difference and its")
    print("standard error), and rows that changed ranks (ours are primaries, its are all slots)\n")
    print_table(["experts", "load", "baseline", "ours", "difference", "error", "rows moved"], rows)
    bars.append(Bar("behind the baseline beyond sampling, worst cell", behind, 0.0))
    most, where = max(moves)
    bars.append(Bar(f"rows moved over the baseline's at 10 % drift, worst ({where})", most, 0.2))
    return bars, figures


def _replay(name, shape):
    torch.set_num_threads(1)
    load_WYL = read_trace(TRACE) if name == "trace" else _synthetic(name, shape)
    return *_replay_baseline(load_WYL, shape), *_replay_ours(load_WYL, shape)


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


def _judge(load_YL, slots_YRS):
    return balancedness(level_tokens(load_YL, slots_YRS, sweeps=SWEEPS))


def _replay_ours(load_WYL, shape):
    layers, experts, redundant, ranks, nodes, _ = (load_WYL.shape[1], *shape[1:])
    policy, topology = BalancedPolicy(), Topology.even(ranks, nodes)
    placement = ExpertPlacement.initial(layers, experts, ranks, redundant)
    interval = _interval(load_WYL)
    schedule, first, rows, values = Schedule(interval), interval // 4, 0, []
    # Balancedness is asked of every step only where a drop of it could bring a decision forward.
    watched = 4
    for step, load_YL in enumerate(load_WYL):
        if _is_judged(step, first):
            values.append(_judge(load_YL, placement.by_rank))
        seen = _judge(load_YL[:watched], placement.by_rank[:watched])
        if schedule.step(seen):
            end = step + 1
            window_WYL = load_WYL[end - schedule.look_back(min(end, WINDOW)) : end]
            outlook = Outlook(
                window_WYL.sum(axis=0),
                len(window_WYL),
                forecast(window_WYL),
                interval,
                DEFAULT_COSTS,
                sub_windows(window_WYL),
            )
            after = policy.look_ahead(outlook, placement, topology)
            rows += int((after.primary_rank != placement.primary_rank).sum())
            placement = after
    return np.array(values), rows


def _replay_baseline(load_WYL, shape):
    layers, experts, redundant, ranks, nodes, groups = (load_WYL.shape[1], *shape[1:])
    slots_YRS = ExpertPlacement.initial(layers, experts, ranks, redundant).by_rank
    interval = _interval(load_WYL)
    rows, values = 0, []
    once_YRS = slots_YRS
    for step, load_YL in enumerate(load_WYL):
        if _is_judged(step, interval // 4):
            values.append(_judge(load_YL, once_YRS))
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
    return np.array(values), rows


if __name__ == "__main__":
    sys.exit(main())
