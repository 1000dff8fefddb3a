"""``simulate``: replay a load on a cluster of any size, with policies and bounds side by side."""

import argparse
from collections.abc import Callable

import numpy as np

from lightning_eplb.cli.load_arguments import POLICIES, add_load_arguments, read_load, replay_policies, setting_of
from lightning_eplb.cli.terminal import aligned, progress
from lightning_eplb.simulation.baselines import best_of_each_batch, perfect_level, replay_published
from lightning_eplb.simulation.replay import Replay, describe, draw_over_time
from lightning_eplb.simulation.trace_formats import FORMATS

HELP = "replay a load at any size of cluster, policies side by side"
DESCRIPTION = """\
Replay a load on a cluster of any size, and compare what policies make of it:
one that EPLBCallback(trace=...) or another program recorded, one of a real
training that comes with the package, or a made-up one. Choose
num_redundant_experts and step_interval by it."""
EPILOG = f"""\
TRACE is one of these:
{FORMATS}
policies:
  static     nothing moves: the placement that training starts from
  deepseek   DeepSeekPolicy: the published algorithm, made fit for training
  balanced   BalancedPolicy, the default of EPLBCallback
  published  the published algorithm as it is, for serving: any replica may be the
             primary, and each serves an equal part of its expert's tokens
  per-batch  bound of balanced: its primaries, and for each step the best replicas
             that a search finds, knowing the step's load
  perfect    bound: all ranks serve equally many tokens

for example:
  %(prog)s trace.npy --ep-size 32 --num-redundant-experts 32
  %(prog)s --synthetic drift-30 --experts 128 --ep-size 16 --num-nodes 2
  %(prog)s --recorded mixtral-8x7b-e16k4 --ep-size 4 --num-redundant-experts 4 --step-interval 8
"""
ROWS = (*POLICIES, "published", "per-batch", "perfect")
"""Names of the table's rows, in order."""
MEANINGS = """
Balancedness is that of single steps after the first decision: mean over ranks / fullest rank, 1 is perfect.
Speed-up is that of the experts' part of a step, over the placement that training starts from; moves and replicas'
traffic take time that it leaves out.
Replicas are redundant slots of a layer that hold an expert, on the mean of these steps.
Moved are primaries, with their optimizer state; of published, slots whose expert was not on the rank.
Planning is the time of the slowest decision."""
BYTES_MOVED = """
Bytes moved are theirs, within nodes + between nodes, of all decisions: weights and optimizer state."""
TRAFFIC = """
Replicas' traffic is that of a step, over all layers and ranks: weights before the forward pass, gradients after the
backward pass."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_load_arguments(parser)
    parser.add_argument(
        "--policy",
        nargs="+",
        choices=ROWS,
        default=list(ROWS),
        metavar="NAME",
        help=f"rows of the table, of {', '.join(ROWS)} (all)",
    )
    parser.add_argument(
        "--bytes-per-expert", type=int, metavar="BYTES", help="weights and optimizer state in a layer, to tell traffic"
    )
    parser.add_argument(
        "--bytes-per-replica",
        type=int,
        metavar="BYTES",
        help="weights and gradient in a layer, which travel in each step (a quarter of --bytes-per-expert)",
    )


def run(arguments: argparse.Namespace) -> int:
    load_WYL, source = read_load(arguments)
    steps, layers, experts = load_WYL.shape
    wanted = list(dict.fromkeys(arguments.policy))
    computed = {"static", *wanted} - {"perfect"} | ({"balanced"} if "per-batch" in wanted else set())
    with progress(steps * len(computed), "replaying") as bar:
        replays = _replay(load_WYL, arguments, wanted, bar.update)
    print(
        f"{source}: {steps} steps, {layers} layers of {experts} experts; on {arguments.ep_size} ranks with"
        f" {arguments.num_redundant_experts} redundant experts, a decision every {arguments.step_interval} steps\n"
    )
    shown = [replays[name] for name in wanted]
    rows = describe(shown, replays["static"], arguments.bytes_per_expert, arguments.bytes_per_replica)
    for line in aligned(rows):
        print(line)
    print("\nbalancedness over time, 0 to 1")
    for each in shown:
        print(f"{each.name.ljust(max(len(row[0]) for row in rows))}  {draw_over_time(each.balancedness)}")
    meanings = MEANINGS + (BYTES_MOVED if "bytes moved" in rows[0] else "")
    print(meanings + (TRAFFIC if "replicas' traffic" in rows[0] else ""))
    return 0


def _replay(
    load_WYL: np.ndarray, arguments: argparse.Namespace, wanted: list[str], after_step: Callable[[], object]
) -> dict[str, Replay]:
    """Return the replays that the wanted rows need, by name."""
    names = [name for name in POLICIES if name in wanted or (name == "balanced" and "per-batch" in wanted)]
    replays = replay_policies(load_WYL, arguments, names, after_step)
    if "published" in wanted:
        replays["published"] = replay_published(
            load_WYL, setting_of(arguments), arguments.num_groups, name="published", after_step=after_step
        )
    if "per-batch" in wanted:
        replays["per-batch"] = best_of_each_batch(
            load_WYL, replays["balanced"], name="per-batch", after_step=after_step
        )
    if "perfect" in wanted:
        replays["perfect"] = perfect_level(load_WYL, replays["static"], arguments.ep_size, name="perfect")
    return replays
