"""Replay a load at any size of cluster: what would a policy have made of it?

Shape suffixes: ``W`` steps, ``Y`` MoE layers, ``L`` logical experts, ``R`` ranks.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lightning_eplb.forecast import Forecast, forecast, sub_windows
from lightning_eplb.functional import balancedness, rank_tokens
from lightning_eplb.placement import ExpertPlacement
from lightning_eplb.policies import Costs, Outlook, Policy, Topology
from lightning_eplb.policies.split import level_tokens
from lightning_eplb.relocation.plan import plan_relocation
from lightning_eplb.schedule import Schedule

DEFAULT_COSTS = Costs(token=1.0, row_within_node=2_000.0, row_between_nodes=10_000.0)
"""In the time that one expert takes for a token.

An expert of ``p`` parameters does ``6 p`` operations for a token, forward and backward, and moves with 16 bytes for
each parameter (weights, a master copy and two moments). At 200 TFLOP/s, 250 GB/s within a node and 50 GB/s between
nodes, a move takes as long as 2,100 tokens, or 10,700, whatever ``p`` is.
"""


@dataclass(frozen=True)
class Decision:
    """One decision of a policy, and what it moved.

    Attributes:
        first_step: The first step that ran on what was decided.
        num_layers: Layers in which a primary changed its place.
        rows_within_nodes: Primaries that changed ranks within a node, in all layers.
        rows_between_nodes: Primaries that changed nodes.
        planning_seconds: What the policy took to decide.
    """

    first_step: int
    num_layers: int
    rows_within_nodes: int
    rows_between_nodes: int
    planning_seconds: float

    @property
    def rows_moved(self) -> int:
        """Primaries that changed ranks."""
        return self.rows_within_nodes + self.rows_between_nodes


@dataclass(frozen=True)
class Replay:
    """What one policy made of a load.

    Attributes:
        name: Of the policy.
        balancedness: Of every step, ``[W]``, on the placement that was in force. NaN for a step without a token.
        max_tokens_by_layer: Tokens of the fullest rank of every step and layer, ``[W, Y]`` float64.
        decisions: In their order.
        forecast_errors: Of every decision but the last, see :meth:`lightning_eplb.forecast.Forecast.error`.
    """

    name: str
    balancedness: np.ndarray
    max_tokens_by_layer: np.ndarray
    decisions: tuple[Decision, ...]
    forecast_errors: tuple[float, ...]

    @property
    def first_decided(self) -> int:
        """The first step that ran on a decided placement; the number of steps where nothing was decided."""
        return self.decisions[0].first_step if self.decisions else len(self.balancedness)

    @property
    def max_tokens(self) -> np.ndarray:
        """Tokens of the fullest rank in every step, ``[W]``, summed over layers."""
        return self.max_tokens_by_layer.sum(axis=1)

    @property
    def rows_within_nodes(self) -> int:
        """Primaries that changed ranks within a node, in all layers and all decisions."""
        return sum(decision.rows_within_nodes for decision in self.decisions)

    @property
    def rows_between_nodes(self) -> int:
        """Primaries that changed nodes."""
        return sum(decision.rows_between_nodes for decision in self.decisions)

    @property
    def planning_seconds(self) -> tuple[float, ...]:
        """Of every decision."""
        return tuple(decision.planning_seconds for decision in self.decisions)

    @property
    def rows_moved(self) -> int:
        """Primaries that changed ranks."""
        return self.rows_within_nodes + self.rows_between_nodes

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
    split: str = "level",
    costs: Costs = DEFAULT_COSTS,
    name: str = "",
    after_step: Callable[[], object] | None = None,
) -> Replay:
    """Let ``policy`` rearrange a load's experts as ``EPLBCallback`` would.

    Args:
        load_WYL: Tokens of each expert in each step, int64: a trace, or a synthetic load.
        policy: Asked when :class:`~lightning_eplb.schedule.Schedule` says so.
        num_ranks: Ranks that share the experts of a layer, ``R``.
        num_redundant_experts: Redundant experts of each layer, a multiple of ``num_ranks``.
        num_nodes: The ranks' nodes, of equal size.
        window_size: Steps that the policy looks back on.
        step_interval: Steps between decisions.
        split: How the tokens of an expert are divided among its copies: ``"even"`` or ``"level"``, in each step anew.
        costs: What the policy is told that moves cost.
        name: Of the policy, for the result.
        after_step: Called after each step, to show progress.

    Raises:
        ValueError: A number does not fit the load or another number.
    """
    for argument, value in {"window_size": window_size, "step_interval": step_interval}.items():
        if value < 1:
            raise ValueError(f"{argument}={value} must be at least 1 step")
    if split not in ("even", "level"):
        raise ValueError(f"split={split!r} must be 'even' or 'level'")
    steps, layers, experts = load_WYL.shape
    topology = Topology.even(num_ranks, num_nodes)
    usable = (experts - experts // num_ranks) * num_ranks
    if num_redundant_experts > usable:
        raise ValueError(
            f"num_redundant_experts={num_redundant_experts} is more than num_ranks={num_ranks} can use: with {usable}"
            " each could hold a copy of every expert that is not its own"
        )
    node_R = np.array(topology.node_of_rank)
    placement = ExpertPlacement.initial(layers, experts, num_ranks, num_redundant_experts)
    policy.warm_up(placement)
    schedule = Schedule(step_interval)
    decisions: list[Decision] = []
    errors: list[float] = []
    decided_after = 0
    expected: Forecast | None = None
    levels_W, max_tokens_WY = np.full(steps, np.nan), np.zeros((steps, layers))
    seen: list[np.ndarray] = []
    for step, load_YL in enumerate(load_WYL):
        if after_step is not None:
            after_step()
        if not load_YL.any():
            continue
        tokens_YR = level_tokens(load_YL, placement.by_rank) if split == "level" else rank_tokens(load_YL, placement)
        levels_W[step] = balancedness(tokens_YR)
        max_tokens_WY[step] = tokens_YR.max(axis=1)
        seen.append(load_YL)
        if not schedule.step(levels_W[step]):
            continue
        if expected is not None:
            errors.append(expected.error(np.sum(seen[decided_after:], axis=0)))
        window_WYL = np.array(seen[-schedule.look_back(min(window_size, len(seen))) :])
        decided_after, expected = len(seen), forecast(window_WYL)
        outlook = Outlook(
            window_WYL.sum(axis=0), len(window_WYL), expected, step_interval, costs, sub_windows(window_WYL)
        )
        start = time.perf_counter()
        decided = policy.look_ahead(outlook, placement, topology)
        seconds = time.perf_counter() - start
        plan = plan_relocation(placement, decided)
        between = sum(int((node_R[moves.source_rank] != node_R[moves.target_rank]).sum()) for moves in plan)
        within = sum(moves.num_rows_between_ranks for moves in plan) - between
        decisions.append(Decision(step + 1, len(plan), within, between, seconds))
        placement = decided
    return Replay(name, levels_W, max_tokens_WY, tuple(decisions), tuple(errors))


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
    rows = [["policy", "balancedness", "5th percentile", "worst", "moved", "between nodes", "planning", "speed-up"]]
    if bytes_per_expert is not None:
        rows[0].insert(6, "traffic")
    for each in replays:
        judged = each.judged if len(each.judged) else np.array([np.nan])
        planning = max(each.planning_seconds, default=0.0)
        row = [
            each.name,
            f"{judged.mean():.3f}",
            f"{np.percentile(judged, 5):.3f}",
            f"{judged.min():.3f}",
            str(each.rows_moved),
            str(each.rows_between_nodes),
            f"{1e3 * planning:.1f} ms",
            f"{speed_up(each, static):.2f}",
        ]
        if bytes_per_expert is not None:
            within, between = (n * bytes_per_expert / 2**20 for n in (each.rows_within_nodes, each.rows_between_nodes))
            row.insert(6, f"{within:,.1f} + {between:,.1f} MiB")
        rows.append(row)
    return rows
