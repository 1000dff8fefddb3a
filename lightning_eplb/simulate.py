"""Replay a load at any size of cluster: what would a policy have made of it?

Shape suffixes: ``W`` steps, ``Y`` MoE layers, ``L`` logical experts, ``R`` ranks.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lightning_eplb.functional import balancedness, rank_tokens
from lightning_eplb.placement import ExpertPlacement
from lightning_eplb.policies import Policy, Topology
from lightning_eplb.relocation.plan import plan_relocation


@dataclass(frozen=True)
class Replay:
    """What one policy made of a load.

    Attributes:
        name: Of the policy.
        balancedness: Of every step, ``[W]``, on the placement that was in force. NaN for a step without a token.
        first_decided: The first step that ran on a decided placement.
        max_tokens: Tokens of the fullest rank in every step, ``[W]``, summed over layers.
        rows_moved: Primaries that changed ranks, in all layers and all decisions.
        planning_seconds: Of every decision.
    """

    name: str
    balancedness: np.ndarray
    first_decided: int
    max_tokens: np.ndarray
    rows_moved: int
    planning_seconds: tuple[float, ...]

    @property
    def judged(self) -> np.ndarray:
        """Balancedness of the steps after the first decision: each was decided for without having been seen."""
        values = self.balancedness[self.first_decided :]
        return values[~np.isnan(values)]


def replay(
    load_WYL: np.ndarray,
    policy: Policy,
    *,
    num_ranks: int,
    num_redundant_experts: int = 0,
    num_nodes: int = 1,
    window_size: int = 100,
    step_interval: int = 100,
    name: str = "",
) -> Replay:
    """Let ``policy`` rearrange a load's experts as ``EPLBCallback`` would, tokens split evenly among copies.

    Args:
        load_WYL: Tokens of each expert in each step, int64: a trace, or a synthetic load.
        policy: Asked after a quarter of ``step_interval`` and then every ``step_interval`` steps.
        num_ranks: Ranks that share the experts of a layer, ``R``.
        num_redundant_experts: Redundant experts of each layer, a multiple of ``num_ranks``.
        num_nodes: The ranks' nodes, of equal size.
        window_size: Steps that the policy looks back on.
        step_interval: Steps between decisions.
        name: Of the policy, for the result.

    Raises:
        ValueError: A number does not fit the load or another number.
    """
    for argument, value in {"window_size": window_size, "step_interval": step_interval}.items():
        if value < 1:
            raise ValueError(f"{argument}={value} must be at least 1 step")
    steps, layers, experts = load_WYL.shape
    topology = Topology.even(num_ranks, num_nodes)
    placement = ExpertPlacement.initial(layers, experts, num_ranks, num_redundant_experts)
    seconds: list[float] = []
    rows_moved, steps_to_go, first_decided = 0, max(1, step_interval // 4), steps
    levels_W, max_tokens_W = np.full(steps, np.nan), np.zeros(steps)
    seen: list[np.ndarray] = []
    for step, load_YL in enumerate(load_WYL):
        if not load_YL.any():
            continue
        tokens_YR = rank_tokens(load_YL, placement)
        levels_W[step] = balancedness(tokens_YR)
        max_tokens_W[step] = tokens_YR.max(axis=1).sum()
        seen = [*seen[-window_size + 1 :], load_YL] if window_size > 1 else [load_YL]
        steps_to_go -= 1
        if steps_to_go == 0:
            steps_to_go = step_interval
            start = time.perf_counter()
            decided = policy.rearrange(np.sum(seen, axis=0), placement, topology)
            seconds.append(time.perf_counter() - start)
            rows_moved += sum(moves.num_rows_between_ranks for moves in plan_relocation(placement, decided))
            placement, first_decided = decided, min(first_decided, step + 1)
    return Replay(name, levels_W, first_decided, max_tokens_W, rows_moved, tuple(seconds))


def speed_up(of: Replay, over: Replay) -> float:
    """How much faster the experts' part of the steps after the first decision gets, waiting for the fullest rank."""
    ours, theirs = (r.max_tokens[of.first_decided :].sum() for r in (of, over))
    return float(theirs / ours) if ours else 1.0


def draw_over_time(values_W: np.ndarray, columns: int = 60) -> str:
    """Values from 0 to 1 as a line of blocks, each the mean of its part of the steps; a dot where there is none."""
    blocks = "▁▂▃▄▅▆▇█"
    line = ""
    for part in np.array_split(values_W, min(columns, len(values_W))):
        known = part[~np.isnan(part)]
        line += blocks[min(int(known.mean() * len(blocks)), len(blocks) - 1)] if len(known) else "·"
    return line


def describe(replays: Sequence[Replay], static: Replay, bytes_per_expert: int | None = None) -> list[list[str]]:
    """A table of replays side by side, its first row the heads of the columns.

    Args:
        replays: Of the same load at the same size.
        static: The replay that rearranged nothing, which the others' speed is compared with.
        bytes_per_expert: Weights and optimizer state of an expert in one layer, to tell traffic in bytes.
    """
    rows = [["policy", "balancedness", "5th percentile", "worst", "experts moved", "planning", "speed-up"]]
    if bytes_per_expert is not None:
        rows[0].insert(5, "traffic")
    for each in replays:
        judged = each.judged if len(each.judged) else np.array([np.nan])
        planning = max(each.planning_seconds, default=0.0)
        row = [
            each.name,
            f"{judged.mean():.3f}",
            f"{np.percentile(judged, 5):.3f}",
            f"{judged.min():.3f}",
            str(each.rows_moved),
            f"{1e3 * planning:.1f} ms",
            f"{speed_up(each, static):.2f}",
        ]
        if bytes_per_expert is not None:
            row.insert(5, f"{each.rows_moved * bytes_per_expert / 2**20:,.1f} MiB")
        rows.append(row)
    return rows
