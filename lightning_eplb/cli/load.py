"""What ``simulate`` and ``report`` ask for alike: a load, and the cluster to replay it on."""

import argparse
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from tqdm import tqdm

from lightning_eplb.policies import BalancedPolicy, Costs, DeepSeekPolicy, Policy, StaticPolicy
from lightning_eplb.simulate import DEFAULT_COSTS, Replay, replay
from lightning_eplb.synthetic import SYNTHETIC_LOADS, synthetic_load
from lightning_eplb.trace import read_trace

MOST_COUNTS = 2**28
"""Counts of a synthetic load, 2 GiB, which take about ten seconds to draw."""

POLICIES: dict[str, Callable[[argparse.Namespace], Policy]] = {
    "static": lambda arguments: StaticPolicy(),
    "deepseek": lambda arguments: DeepSeekPolicy(arguments.num_groups),
    "balanced": lambda arguments: BalancedPolicy(num_groups=arguments.num_groups),
}


def add_load_arguments(parser: argparse.ArgumentParser) -> None:
    """Which load, on which cluster, by which policies."""
    parser.add_argument("trace", nargs="?", metavar="TRACE", help="file that EPLBCallback(trace=...) wrote")
    parser.add_argument(
        "--allow-damaged", action="store_true", help="read a damaged TRACE up to its last step before the damage"
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
    deciding = parser.add_argument_group("deciding")
    deciding.add_argument("--policy", nargs="+", choices=POLICIES, default=list(POLICIES), help="all, if not given")
    deciding.add_argument("--window-size", type=int, default=100, help="steps that a policy looks back on (100)")
    deciding.add_argument("--step-interval", type=int, default=100, help="steps between decisions (100)")
    deciding.add_argument("--num-groups", type=int, default=1, help="expert groups that stay on a node (1)")
    deciding.add_argument(
        "--split", choices=("even", "level"), default="level", help="how copies share an expert's tokens (level)"
    )
    synthetic = parser.add_argument_group("a made-up load, instead of TRACE")
    synthetic.add_argument("--synthetic", choices=SYNTHETIC_LOADS, metavar="NAME", help=", ".join(SYNTHETIC_LOADS))
    synthetic.add_argument("--steps", type=int, default=500, help="how many (500)")
    synthetic.add_argument("--layers", type=int, default=4, help="MoE layers (4)")
    synthetic.add_argument("--experts", type=int, default=64, help="of each layer (64)")
    synthetic.add_argument("--seed", type=int, default=0, help="another one gives another load (0)")


def read_load(arguments: argparse.Namespace) -> tuple[np.ndarray, str]:
    """The load, ``[W, Y, L]`` int64, and what to call it.

    Raises:
        ValueError: A number does not fit, both a trace and a name are given or neither, there are too few steps for a
            decision, or the file is no trace or damaged. Numbers are checked before anything is read or drawn.
        OSError: The file can't be read.
    """
    _check_numbers(arguments)
    if (arguments.trace is None) == (arguments.synthetic is None):
        raise ValueError("give either a TRACE or --synthetic NAME")
    if arguments.trace is not None:
        load_WYL, source = read_trace(arguments.trace, allow_damaged=arguments.allow_damaged), arguments.trace
        _check_sizes(arguments, len(load_WYL), load_WYL.shape[-1])
    else:
        source = arguments.synthetic
        counts = arguments.steps * arguments.layers * arguments.experts
        if counts > MOST_COUNTS:
            raise ValueError(
                f"--steps {arguments.steps} of --layers {arguments.layers} with --experts {arguments.experts} are"
                f" {counts:,} counts, and {MOST_COUNTS:,} are the most that a synthetic load has"
            )
        _check_sizes(arguments, arguments.steps, arguments.experts)
        load_WYL = synthetic_load(
            source,
            arguments.steps,
            arguments.layers,
            arguments.experts,
            num_ranks=arguments.ep_size,
            interval=arguments.step_interval,
            seed=arguments.seed,
        )
    return load_WYL, source


def _check_numbers(arguments: argparse.Namespace) -> None:
    """Raise ``ValueError`` for the first number that fits no load."""
    for name in (
        "ep_size", "num_nodes", "window_size", "step_interval", "num_groups", "steps", "layers", "experts",
        "bytes_per_expert",
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
    if arguments.ep_size % arguments.num_nodes:
        raise ValueError(
            f"--num-nodes {arguments.num_nodes} must divide --ep-size {arguments.ep_size};"
            f" one of {_divisors(arguments.ep_size)} would do"
        )


def _check_sizes(arguments: argparse.Namespace, steps: int, experts: int) -> None:
    """Raise ``ValueError`` for the first number that does not fit a load of so many steps and experts."""
    for name in ("ep_size", "num_groups"):
        if experts % getattr(arguments, name):
            raise ValueError(
                f"{_flag(name)} {getattr(arguments, name)} must divide the {experts} experts; one of"
                f" {_divisors(experts)} would do"
            )
    if arguments.num_redundant_experts < 0 or arguments.num_redundant_experts % arguments.ep_size:
        below = max(0, arguments.num_redundant_experts // arguments.ep_size * arguments.ep_size)
        raise ValueError(
            f"--num-redundant-experts {arguments.num_redundant_experts} must be a multiple of --ep-size"
            f" {arguments.ep_size}; {below} or {below + arguments.ep_size} would do"
        )
    usable = (experts - experts // arguments.ep_size) * arguments.ep_size
    if arguments.num_redundant_experts > usable:
        raise ValueError(
            f"--num-redundant-experts {arguments.num_redundant_experts} is more than {arguments.ep_size} ranks can use:"
            f" with {usable} each could hold a copy of every expert that is not its own"
        )
    if max(1, arguments.step_interval // 4) >= steps:
        raise ValueError(
            f"--step-interval {arguments.step_interval} is too long: the first decision comes after a quarter of it,"
            f" and there are {steps} steps"
        )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _divisors(number: int) -> list[int]:
    low = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return sorted({*low, *(number // divisor for divisor in low)})


def replay_policies(
    load_WYL: np.ndarray, arguments: argparse.Namespace, after_step: Callable[[], object]
) -> tuple[Replay, list[Replay]]:
    """The replay that moves nothing, and one of each policy that was asked for.

    Raises:
        ValueError: A number does not fit the load or another number.
    """
    sizes: dict[str, Any] = {
        "num_ranks": arguments.ep_size,
        "num_redundant_experts": arguments.num_redundant_experts,
        "num_nodes": arguments.num_nodes,
        "window_size": arguments.window_size,
        "step_interval": arguments.step_interval,
        "split": arguments.split,
        "costs": Costs(1.0, *arguments.move_tokens),
        "after_step": after_step,
    }
    static = replay(load_WYL, StaticPolicy(), name="static", **sizes)
    moving = [name for name in dict.fromkeys(arguments.policy) if name != "static"]
    replays = {name: replay(load_WYL, POLICIES[name](arguments), name=name, **sizes) for name in moving}
    return static, [({"static": static} | replays)[name] for name in dict.fromkeys(arguments.policy)]


def num_replays(arguments: argparse.Namespace) -> int:
    """How many replays :func:`replay_policies` makes."""
    return len({"static", *arguments.policy})


def progress(steps: int, words: str) -> "tqdm[Any]":
    """A bar on standard error that counts steps; none where that is no terminal."""
    return tqdm(total=steps, desc=words, unit=" steps", leave=False, disable=None)
