"""``simulate``: a load on a cluster of any size, policies side by side."""

import argparse

from lightning_eplb.cli.load import add_load_arguments, num_replays, progress, read_load, replay_policies
from lightning_eplb.cli.table import aligned
from lightning_eplb.simulate import describe, draw_over_time

HELP = "replay a load at any size of cluster, policies side by side"
DESCRIPTION = """\
Replay the load that EPLBCallback(trace=...) recorded, or a synthetic one, on a
cluster of any size, and compare what policies make of it. Choose
num_redundant_experts and step_interval by it."""
EPILOG = """\
for example:
  %(prog)s trace.npy --ep-size 32 --num-redundant-experts 32
  %(prog)s --synthetic drift-30 --experts 128 --ep-size 16 --num-nodes 2
"""
MEANINGS = """
Balancedness is that of single steps after the first decision: mean over ranks / fullest rank, 1 is perfect.
Moved are primaries, with their optimizer state.{traffic}
Planning is the time of the slowest decision.
Speed-up is that of the experts' part of a step, over the placement that training starts from."""

TRAFFIC = " Traffic is theirs, within nodes + between nodes."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_load_arguments(parser)
    parser.add_argument("--bytes-per-expert", type=int, help="weights and optimizer state in a layer, to tell traffic")


def run(arguments: argparse.Namespace) -> int:
    load_WYL, source = read_load(arguments)
    steps, layers, experts = load_WYL.shape
    with progress(steps * num_replays(arguments), "replaying") as bar:
        static, replays = replay_policies(load_WYL, arguments, bar.update)
    print(
        f"{source}: {steps} steps, {layers} layers of {experts} experts; on {arguments.ep_size} ranks with"
        f" {arguments.num_redundant_experts} redundant experts, a decision every {arguments.step_interval} steps\n"
    )
    rows = describe(replays, static, arguments.bytes_per_expert)
    for line in aligned(rows):
        print(line)
    print("\nbalancedness over time, 0 to 1")
    for each in replays:
        print(f"{each.name.ljust(max(len(row[0]) for row in rows))}  {draw_over_time(each.balancedness)}")
    print(MEANINGS.format(traffic="" if arguments.bytes_per_expert is None else TRAFFIC))
    return 0
