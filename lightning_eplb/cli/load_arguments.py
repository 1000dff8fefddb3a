"""Arguments that ``simulate`` and ``report`` share: a load, and the cluster to replay it on."""

import argparse
import math
from collections.abc import Callable, Sequence

import numpy as np

from lightning_eplb._validation import check_divides, check_multiple, check_num_ranks, check_num_redundant
from lightning_eplb.policies import BalancedPolicy, Costs, DeepSeekPolicy, Policy, StaticPolicy
from lightning_eplb.simulation.replay import DEFAULT_COSTS, Replay, Setting, replay
from lightning_eplb.simulation.synthetic import RECORDED_LOADS, SYNTHETIC_LOADS, recorded_load, resample, synthetic_load
from lightning_eplb.simulation.trace_formats import read_load as read_file

MOST_COUNTS = 2**28
"""Upper bound of the counts of a synthetic load: 2 GiB, which take about ten seconds to draw."""
EXPERTS = 64
"""Default number of experts in each layer of a synthetic load."""

POLICIES: dict[str, Callable[[argparse.Namespace], Policy]] = {
    "static": lambda arguments: StaticPolicy(),
    "deepseek": lambda arguments: DeepSeekPolicy(arguments.num_groups),
    "balanced": lambda arguments: BalancedPolicy(num_groups=arguments.num_groups),
}


def add_load_arguments(parser: argparse.ArgumentParser) -> None:
    """Add arguments that choose a load and a cluster."""
    parser.add_argument(
        "trace",
        nargs="?",
        metavar="TRACE",
        help="file that EPLBCallback(trace=...) wrote, or a load of another program; see below",
    )
    parser.add_argument(
        "--allow-damaged", action="store_true", help="read a damaged TRACE up to its last step before the damage"
    )
    parser.add_argument(
        "--resample",
        type=int,
        metavar="STEPS",
        help="draw so many steps by the shares of the load's own, one after the other: where these are few, such as"
        " totals of workloads",
    )
    cluster = parser.add_argument_group("the cluster")
    cluster.add_argument("--ep-size", type=int, default=8, help="ranks that share the experts of a layer (8)")
    cluster.add_argument("--num-redundant-experts", type=int, default=0, help="of each layer, over all ranks (0)")
    cluster.add_argument("--num-nodes", type=int, default=1, help="the ranks' nodes, of equal size (1)")
    cluster.add_argument(
        "--move-tokens",
        type=float,
        nargs=2,
        metavar=("WITHIN", "BETWEEN"),
        default=(DEFAULT_COSTS.row_within_node, DEFAULT_COSTS.row_between_nodes),
        help="tokens that an expert computes in the time that it takes to move one, within a node and between nodes"
        " (2000 10000)",
    )
    cluster.add_argument(
        "--replica-tokens",
        type=float,
        default=0.0,
        metavar="TOKENS",
        help="tokens that an expert computes in the time that a replica's weights and gradient travel in a step:"
        " policies then leave out replicas that save less (0)",
    )
    deciding = parser.add_argument_group("deciding")
    deciding.add_argument("--window-size", type=int, default=100, help="steps that a policy looks back on (100)")
    deciding.add_argument("--step-interval", type=int, default=100, help="steps between decisions (100)")
    deciding.add_argument("--num-groups", type=int, default=1, help="expert groups that stay on a node (1)")
    deciding.add_argument(
        "--split", choices=("even", "level"), default="level", help="how replicas share an expert's tokens (level)"
    )
    known = parser.add_argument_group("a load of a real training, instead of TRACE")
    known.add_argument("--recorded", choices=RECORDED_LOADS, metavar="NAME", help=", ".join(RECORDED_LOADS))
    synthetic = parser.add_argument_group("a made-up load, instead of TRACE")
    synthetic.add_argument("--synthetic", choices=SYNTHETIC_LOADS, metavar="NAME", help=", ".join(SYNTHETIC_LOADS))
    synthetic.add_argument("--steps", type=int, default=500, help="how many (500)")
    synthetic.add_argument("--layers", type=int, default=4, help="MoE layers (4)")
    synthetic.add_argument(
        "--experts",
        type=int,
        help=f"of each layer ({EXPERTS}); with a TRACE that names only experts that got a token, those of the model",
    )
    synthetic.add_argument("--seed", type=int, default=0, help="another one gives another load (0)")


def read_load(arguments: argparse.Namespace) -> tuple[np.ndarray, str]:
    """Return the chosen load, ``[W, Y, L]`` int64, and its name.

    Raises:
        ValueError: A number does not fit; not exactly one of a trace and the names is given; there are too few steps
            for a decision; or the file is not a trace, or damaged. Numbers are checked before anything is read.
        OSError: The file can't be read.
    """
    _check_numbers(arguments)
    if sum(given is not None for given in (arguments.trace, arguments.synthetic, arguments.recorded)) != 1:
        raise ValueError("give one of TRACE, --synthetic NAME and --recorded NAME")
    if arguments.synthetic is not None:
        return _synthetic(arguments), arguments.synthetic
    if arguments.trace is not None:
        source = arguments.trace
        load_WYL = read_file(source, num_experts=arguments.experts, allow_damaged=arguments.allow_damaged)
    else:
        source = arguments.recorded
        load_WYL = recorded_load(source)
    steps, layers, experts = load_WYL.shape
    if arguments.resample is not None and arguments.resample < steps:
        raise ValueError(f"--resample {arguments.resample} is less than the {steps} steps of {source}")
    _check_sizes(arguments, arguments.resample or steps, experts)
    if arguments.resample is not None:
        _check_counts({"resample": arguments.resample}, arguments.resample * layers * experts)
        load_WYL = resample(load_WYL, arguments.resample, seed=arguments.seed)
    return load_WYL, source


def _synthetic(arguments: argparse.Namespace) -> np.ndarray:
    experts = arguments.experts or EXPERTS
    sizes = {"steps": arguments.steps, "layers": arguments.layers, "experts": experts}
    _check_counts(sizes, math.prod(sizes.values()))
    _check_sizes(arguments, arguments.steps, experts)
    if arguments.resample is not None:
        raise ValueError("--resample is for recorded loads; of a synthetic one --steps says how many steps are drawn")
    return synthetic_load(
        arguments.synthetic,
        arguments.steps,
        arguments.layers,
        experts,
        num_ranks=arguments.ep_size,
        interval=arguments.step_interval,
        seed=arguments.seed,
    )


def _check_numbers(arguments: argparse.Namespace) -> None:
    """Raise ``ValueError`` for the first number that fits no load."""
    for name in (
        "ep_size", "num_nodes", "window_size", "step_interval", "num_groups", "steps", "layers", "experts", "resample",
        "bytes_per_expert", "bytes_per_replica",
    ):  # fmt: skip
        value = getattr(arguments, name, None)
        if value is not None and value < 1:
            raise ValueError(f"{_flag(name)} {value} must be at least 1")
    if arguments.seed < 0:
        raise ValueError(f"--seed {arguments.seed} must not be negative")
    if not all(tokens >= 0 for tokens in arguments.move_tokens):
        raise ValueError(
            f"--move-tokens {' '.join(map(str, arguments.move_tokens))} must be zero or more; inf for never"
        )
    if not arguments.replica_tokens >= 0:
        raise ValueError(f"--replica-tokens {arguments.replica_tokens} must be zero or more; inf for no replicas")
    check_divides(
        arguments.num_nodes, arguments.ep_size, f"--num-nodes {arguments.num_nodes}", f"--ep-size {arguments.ep_size}"
    )


def _check_counts(sizes: dict[str, int], counts: int) -> None:
    """Raise ``ValueError`` for a load that is too large to be drawn."""
    if counts > MOST_COUNTS:
        flags = " of ".join(f"{_flag(name)} {number}" for name, number in sizes.items())
        raise ValueError(f"{flags} are {counts:,} counts, and {MOST_COUNTS:,} are the most that are drawn")


def _check_sizes(arguments: argparse.Namespace, steps: int, experts: int) -> None:
    """Raise ``ValueError`` for the first number that does not fit a load of so many steps and experts."""
    groups = arguments.num_groups
    check_num_ranks(arguments.ep_size, experts, f"--ep-size {arguments.ep_size}", f"the {experts} experts")
    check_divides(groups, experts, f"--num-groups {groups}", f"the {experts} experts")
    redundant, ranks = arguments.num_redundant_experts, arguments.ep_size
    words = f"--num-redundant-experts {redundant}", f"--ep-size {ranks}"
    check_multiple(redundant, ranks, *words)
    check_num_redundant(redundant, experts, ranks, *words)
    if max(1, arguments.step_interval // 4) >= steps:
        raise ValueError(
            f"--step-interval {arguments.step_interval} is too long: the first decision comes after a quarter of it,"
            f" and there are {steps} steps"
        )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def setting_of(arguments: argparse.Namespace) -> Setting:
    """Return cluster and schedule of the arguments."""
    return Setting(
        arguments.ep_size,
        arguments.num_redundant_experts,
        arguments.num_nodes,
        arguments.window_size,
        arguments.step_interval,
        arguments.split,
        Costs(1.0, *arguments.move_tokens, copy=arguments.replica_tokens),
    )


def replay_policies(
    load_WYL: np.ndarray, arguments: argparse.Namespace, names: Sequence[str], after_step: Callable[[], object]
) -> dict[str, Replay]:
    """Replay the load without moves and with each of the policies ``names``. Return the replays by name.

    Raises:
        ValueError: A number does not fit the load or another number.
    """
    setting = setting_of(arguments)
    return {
        name: replay(load_WYL, POLICIES[name](arguments), setting, name=name, after_step=after_step)
        for name in dict.fromkeys(("static", *names))
    }
