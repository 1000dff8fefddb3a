"""The command line: ``python -m lightning_eplb simulate ...``."""

import argparse
import sys
from collections.abc import Callable, Sequence

import numpy as np

from lightning_eplb.policies import BalancedPolicy, Costs, DeepSeekPolicy, Policy, StaticPolicy
from lightning_eplb.simulate import DEFAULT_COSTS, describe, draw_over_time, replay
from lightning_eplb.synthetic import SYNTHETIC_LOADS, synthetic_load
from lightning_eplb.trace import read_trace

POLICIES: dict[str, Callable[[argparse.Namespace], Policy]] = {
    "static": lambda arguments: StaticPolicy(),
    "deepseek": lambda arguments: DeepSeekPolicy(arguments.num_groups),
    "balanced": lambda arguments: BalancedPolicy(num_groups=arguments.num_groups, split=arguments.split),
}


def main(words: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit status: 0, or 2 where an argument does not fit."""
    parser = argparse.ArgumentParser(prog="python -m lightning_eplb", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_simulate(commands.add_parser("simulate", help="replay a load at any size of cluster, policies side by side"))
    arguments = parser.parse_args(words)
    try:
        return arguments.run(arguments)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _add_simulate(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Replay the load that EPLBCallback(trace=...) recorded, or a synthetic one, on a cluster of any size, and"
        " compare what policies make of it. Choose num_redundant_experts and step_interval by it."
    )
    parser.set_defaults(run=_simulate)
    parser.add_argument("trace", nargs="?", help="file that EPLBCallback(trace=...) wrote")
    parser.add_argument("--synthetic", choices=SYNTHETIC_LOADS, help="instead of a trace")
    parser.add_argument("--ep-size", type=int, default=8, help="ranks that share the experts of a layer (8)")
    parser.add_argument("--num-redundant-experts", type=int, default=0, help="of each layer, over all ranks (0)")
    parser.add_argument("--num-nodes", type=int, default=1, help="the ranks' nodes, of equal size (1)")
    parser.add_argument("--num-groups", type=int, default=1, help="expert groups that stay on a node (1)")
    parser.add_argument(
        "--split", choices=("even", "level"), default="level", help="how copies share an expert's tokens (level)"
    )
    parser.add_argument(
        "--move-tokens",
        type=float,
        nargs=2,
        metavar=("WITHIN", "BETWEEN"),
        default=(DEFAULT_COSTS.row_within_node, DEFAULT_COSTS.row_between_nodes),
        help="tokens that an expert computes in the time that it takes to move one, within a node and between nodes"
        " (2000 10000)",
    )
    parser.add_argument("--window-size", type=int, default=100, help="steps that a policy looks back on (100)")
    parser.add_argument("--step-interval", type=int, default=100, help="steps between decisions (100)")
    parser.add_argument("--policy", nargs="+", choices=POLICIES, default=list(POLICIES), help="all, if not given")
    parser.add_argument("--bytes-per-expert", type=int, help="weights and optimizer state in a layer, to tell traffic")
    parser.add_argument("--steps", type=int, default=500, help="of a synthetic load (500)")
    parser.add_argument("--layers", type=int, default=4, help="of a synthetic load (4)")
    parser.add_argument("--experts", type=int, default=64, help="of a synthetic load (64)")
    parser.add_argument("--seed", type=int, default=0, help="of a synthetic load (0)")


def _simulate(arguments: argparse.Namespace) -> int:
    for name in ("ep_size", "steps", "layers", "experts"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(arguments, name)} must be at least 1")
    load_WYL, source = _load(arguments)
    steps, layers, experts = load_WYL.shape
    sizes = {
        "num_ranks": arguments.ep_size,
        "num_redundant_experts": arguments.num_redundant_experts,
        "num_nodes": arguments.num_nodes,
        "window_size": arguments.window_size,
        "step_interval": arguments.step_interval,
        "split": arguments.split,
        "costs": Costs(1.0, *arguments.move_tokens),
    }
    print(
        f"{source}: {steps} steps, {layers} layers of {experts} experts; on {arguments.ep_size} ranks with"
        f" {arguments.num_redundant_experts} redundant experts, a decision every {arguments.step_interval} steps\n"
    )
    if max(1, arguments.step_interval // 4) >= steps:
        raise ValueError(
            f"--step-interval {arguments.step_interval} is too long: the first decision comes after a quarter of it,"
            f" and there are {steps} steps"
        )
    replays = [replay(load_WYL, POLICIES[name](arguments), name=name, **sizes) for name in arguments.policy]
    static = replay(load_WYL, StaticPolicy(), name="static", **sizes)
    rows = describe(replays, static, arguments.bytes_per_expert)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        first, *others = (cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths)))  # noqa: B905
        print("  ".join([first, *others]))
    print("\nbalancedness over time, 0 to 1")
    for each in replays:
        print(f"{each.name.ljust(widths[0])}  {draw_over_time(each.balancedness)}")
    print(
        "\nBalancedness is that of single steps after the first decision: mean over ranks / fullest rank, 1 is perfect."
        "\nMoved are primaries, with their optimizer state; traffic is theirs, within nodes + between nodes."
        "\nPlanning is the time of the slowest decision."
        "\nSpeed-up is that of the experts' part of a step, over the placement that training starts from."
    )
    return 0


def _load(arguments: argparse.Namespace) -> tuple[np.ndarray, str]:
    if (arguments.trace is None) == (arguments.synthetic is None):
        raise ValueError("give either a TRACE or --synthetic NAME")
    if arguments.trace is not None:
        return read_trace(arguments.trace), arguments.trace
    load_WYL = synthetic_load(
        arguments.synthetic,
        arguments.steps,
        arguments.layers,
        arguments.experts,
        num_ranks=arguments.ep_size,
        interval=arguments.step_interval,
        seed=arguments.seed,
    )
    return load_WYL, arguments.synthetic


if __name__ == "__main__":
    sys.exit(main())
