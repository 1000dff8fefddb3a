"""Replay a load with a policy, on a cluster of any size.

Shape suffixes: ``W`` steps, ``Y`` MoE layers, ``L`` logical experts, ``R`` ranks, ``S`` slots on a rank.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from lightning_eplb._validation import check_num_redundant, check_steps
from lightning_eplb.balancer.schedule import Schedule
from lightning_eplb.functional import balancedness, rank_tokens
from lightning_eplb.placement import EMPTY, ExpertPlacement
from lightning_eplb.policies import Costs, Outlook, Policy, Topology
from lightning_eplb.policies.forecast import Forecast, forecast, sub_windows
from lightning_eplb.policies.token_split import level_tokens
from lightning_eplb.relocation.plan import plan_relocation

DEFAULT_COSTS = Costs(token=1.0, row_within_node=2_000.0, row_between_nodes=10_000.0)
"""Default costs, in units of an expert's time for one token. Estimated, not measured.

An expert of ``p`` parameters takes ``6 p`` operations a token, forward and backward, and 16 bytes a parameter move
with it (weights, a master copy and two moments). At 200 TFLOP/s, 250 GB/s within a node and 50 GB/s between nodes, a
move takes as long as 2,100 tokens or 10,700, whatever ``p`` is.
"""


@dataclass(frozen=True)
class Setting:
    """Cluster and schedule of a replay.

    Args:
        num_ranks: Ranks that share the experts of a layer, ``R``.
        num_redundant_experts: Redundant experts of each layer, a multiple of ``num_ranks``. Defaults to 0.
        num_nodes: Nodes of the ranks, of equal size. Defaults to 1.
        window_size: Steps in the window of a policy. Defaults to 100.
        step_interval: Steps between decisions. Defaults to 100.
        split: Token split of an expert among its replicas in each step: ``"even"`` or ``"level"``. Defaults to
            ``"level"``.
        costs: Costs that a policy gets. Defaults to :data:`DEFAULT_COSTS`.

    Raises:
        ValueError: A number of steps is below 1, or ``split`` is unknown.
    """

    num_ranks: int
    num_redundant_experts: int = 0
    num_nodes: int = 1
    window_size: int = 100
    step_interval: int = 100
    split: str = "level"
    costs: Costs = DEFAULT_COSTS

    def __post_init__(self) -> None:
        check_steps(window_size=self.window_size, step_interval=self.step_interval)
        if self.split not in ("even", "level"):
            raise ValueError(f"split={self.split!r} must be 'even' or 'level'")

    @property
    def topology(self) -> Topology:
        return Topology.even(self.num_ranks, self.num_nodes)

    def first_placement(self, load_WYL: np.ndarray) -> ExpertPlacement:
        """Return the initial placement of training.

        Raises:
            ValueError: There are more redundant slots than experts to put in.
        """
        _, layers, experts = load_WYL.shape
        redundant, ranks = self.num_redundant_experts, self.num_ranks
        named = f"num_redundant_experts={redundant}"
        check_num_redundant(redundant, experts, ranks, named, f"num_ranks={ranks}")
        return ExpertPlacement.initial(layers, experts, self.num_ranks, self.num_redundant_experts)


@dataclass(frozen=True)
class Decision:
    """Decision of a policy, and its moves.

    Attributes:
        first_step: First step on the decided placement.
        num_layers: Layers in which a primary changed its slot.
        rows_within_nodes: Primaries that changed ranks within a node, over all layers.
        rows_between_nodes: Primaries that changed nodes, over all layers.
        planning_seconds: Time of the policy in seconds.
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


@dataclass(frozen=True, eq=False)
class Replay:
    """Result of replaying a load with a policy.

    Attributes:
        name: Name of the policy.
        balancedness: Balancedness of each step on its placement, ``[W]``. NaN for a step without a token.
        max_tokens_by_layer: Tokens of the fullest rank in each step and layer, ``[W, Y]`` float64.
        replicas: Redundant slots over all layers that hold an expert in each step, ``[W]`` int64. 0 for a step without
            a token.
        decisions: Decisions in order.
        forecast_errors: Errors of the forecasts of all decisions but the last, see
            :meth:`lightning_eplb.policies.forecast.Forecast.error`.
        slots: Expert of each slot before the first decision and after each one, int64 ``[Y, R, S]``, -1 for an empty
            slot. Empty for a bound without slots.
        is_bound: ``True`` for a bound to compare policies with: the load of each step was known before the step.
    """

    name: str
    balancedness: np.ndarray
    max_tokens_by_layer: np.ndarray
    replicas: np.ndarray
    decisions: tuple[Decision, ...] = ()
    forecast_errors: tuple[float, ...] = ()
    slots: tuple[np.ndarray, ...] = ()
    is_bound: bool = False

    @property
    def first_decided(self) -> int:
        """First step on a decided placement; the number of steps if nothing was decided."""
        return self.decisions[0].first_step if self.decisions else len(self.balancedness)

    @property
    def max_tokens(self) -> np.ndarray:
        """Tokens of the fullest rank in every step, ``[W]``, summed over layers."""
        return self.max_tokens_by_layer.sum(axis=1)

    @property
    def rows_within_nodes(self) -> int:
        """Primaries that changed ranks within a node, over all layers and decisions."""
        return sum(decision.rows_within_nodes for decision in self.decisions)

    @property
    def rows_between_nodes(self) -> int:
        """Primaries that changed nodes."""
        return sum(decision.rows_between_nodes for decision in self.decisions)

    @property
    def planning_seconds(self) -> tuple[float, ...]:
        """Planning time of each decision."""
        return tuple(decision.planning_seconds for decision in self.decisions)

    @property
    def rows_moved(self) -> int:
        """Primaries that changed ranks."""
        return self.rows_within_nodes + self.rows_between_nodes

    @property
    def judged(self) -> np.ndarray:
        """Balancedness of the steps after the first decision, none of which the policy knew when it decided."""
        values = self.balancedness[self.first_decided :]
        return values[~np.isnan(values)]

    @property
    def mean_replicas(self) -> float:
        """Redundant slots of a layer that hold an expert, on the mean of the steps after the first decision."""
        has_tokens = ~np.isnan(self.balancedness[self.first_decided :])
        found = self.replicas[self.first_decided :][has_tokens]
        return float(found.mean()) / self.max_tokens_by_layer.shape[1] if len(found) else float("nan")

    def slots_at(self, step: int) -> np.ndarray:
        """Return the slots of a step, ``[Y, R, S]``."""
        return self.slots[sum(decision.first_step <= step for decision in self.decisions)]


class Planner(Protocol):
    """Planner that divides the tokens of each step, and plans when asked.

    Attributes:
        num_primaries: Number of primaries of each rank, in its first slots.
    """

    num_primaries: int

    @property
    def slots(self) -> np.ndarray:
        """Expert of each slot, int64 ``[Y, R, S]``, -1 for an empty slot."""
        ...

    def serve(self, load_YL: np.ndarray) -> np.ndarray:
        """Divide a step's tokens over the ranks, ``[Y, R]``."""
        ...

    def plan(self, outlook: Outlook) -> np.ndarray:
        """Choose new slots, ``[Y, R, S]``. Only this is timed."""
        ...

    def adopt(self, slots_YRS: np.ndarray) -> tuple[int, int, int]:
        """Commit planned slots. Return the number of changed layers and of rows moved within and between nodes."""
        ...


class _PolicyPlanner:
    """Planner that asks a policy, as ``EPLBCallback`` does."""

    def __init__(self, policy: Policy, placement: ExpertPlacement, setting: Setting) -> None:
        policy.warm_up(placement)
        self.policy, self.placement, self.setting = policy, placement, setting
        self.topology = setting.topology
        self.num_primaries = placement.primaries_per_rank

    @property
    def slots(self) -> np.ndarray:
        return self.placement.by_rank

    def serve(self, load_YL: np.ndarray) -> np.ndarray:
        if self.setting.split == "even":
            return rank_tokens(load_YL, self.placement)
        return level_tokens(load_YL, self.placement.by_rank)

    def plan(self, outlook: Outlook) -> np.ndarray:
        self._planned = self.policy.look_ahead(outlook, self.placement, self.topology)
        return self._planned.by_rank

    def adopt(self, slots_YRS: np.ndarray) -> tuple[int, int, int]:
        moved = plan_relocation(self.placement, self._planned)
        node_R = np.array(self.topology.node_of_rank)
        between = sum(int((node_R[moves.source_rank] != node_R[moves.target_rank]).sum()) for moves in moved)
        within = sum(moves.num_rows_between_ranks for moves in moved) - between
        self.placement = self._planned
        return len(moved), within, between


def replay(
    load_WYL: np.ndarray,
    policy: Policy,
    setting: Setting,
    *,
    name: str = "",
    after_step: Callable[[], object] | None = None,
) -> Replay:
    """Let ``policy`` rearrange a load's experts as ``EPLBCallback`` would.

    Args:
        load_WYL: Tokens of each expert in each step, int64, of a trace or a synthetic load.
        policy: Policy, asked in the steps of :class:`~lightning_eplb.balancer.schedule.Schedule`.
        setting: Cluster and schedule.
        name: Name of the policy, for the result.
        after_step: Called after each step, to show progress.

    Raises:
        ValueError: A number does not fit the load or another number.
    """
    planner = _PolicyPlanner(policy, setting.first_placement(load_WYL), setting)
    return run(load_WYL, planner, setting, name=name, after_step=after_step)


def run(
    load_WYL: np.ndarray,
    planner: Planner,
    setting: Setting,
    *,
    name: str = "",
    after_step: Callable[[], object] | None = None,
) -> Replay:
    """Replay a load step by step. Arguments are those of :func:`replay`."""
    steps, layers, _ = load_WYL.shape
    schedule = Schedule(setting.step_interval)
    decisions: list[Decision] = []
    errors: list[float] = []
    decided_after = 0
    expected: Forecast | None = None
    levels_W, max_tokens_WY = np.full(steps, np.nan), np.zeros((steps, layers))
    replicas_W, slots = np.zeros(steps, dtype=np.int64), [planner.slots]
    seen: list[np.ndarray] = []
    for step, load_YL in enumerate(load_WYL):
        if after_step is not None:
            after_step()
        if not load_YL.any():
            continue
        tokens_YR = planner.serve(load_YL)
        levels_W[step] = balancedness(tokens_YR)
        max_tokens_WY[step] = tokens_YR.max(axis=1)
        replicas_W[step] = count_replicas(planner.slots, planner.num_primaries)
        seen.append(load_YL)
        if not schedule.step(levels_W[step]):
            continue
        if expected is not None:
            errors.append(expected.error(np.sum(seen[decided_after:], axis=0)))
        window_WYL = np.array(seen[-schedule.look_back(min(setting.window_size, len(seen))) :])
        decided_after, expected = len(seen), forecast(window_WYL)
        outlook = Outlook(
            window_WYL.sum(axis=0),
            len(window_WYL),
            expected,
            setting.step_interval,
            setting.costs,
            sub_windows(window_WYL),
        )
        start = time.perf_counter()
        planned_YRS = planner.plan(outlook)
        seconds = time.perf_counter() - start
        decisions.append(Decision(step + 1, *planner.adopt(planned_YRS), seconds))
        slots.append(planner.slots)
    return Replay(name, levels_W, max_tokens_WY, replicas_W, tuple(decisions), tuple(errors), tuple(slots))


def count_replicas(slots_YRS: np.ndarray, num_primaries: int) -> int:
    """Count the redundant slots that hold an expert, over all layers."""
    return int((slots_YRS[:, :, num_primaries:] != EMPTY).sum())


def speed_up(of: Replay, over: Replay) -> float:
    """Return the speed-up of the experts' part of a step, after the first decision, bound by the fullest rank."""
    ours, theirs = (r.max_tokens[of.first_decided :].sum() for r in (of, over))
    return float(theirs / ours) if ours else 1.0


def draw_over_time(values_W: np.ndarray, columns: int = 60) -> str:
    """Draw values from 0 to 1 as a line of blocks, each the mean of some steps. A dot stands for no value."""
    blocks = "▁▂▃▄▅▆▇█"
    line = ""
    for part in np.array_split(values_W, min(columns, len(values_W))):
        known = part[~np.isnan(part)]
        line += blocks[min(int(known.mean() * len(blocks)), len(blocks) - 1)] if len(known) else "·"
    return line


def describe(
    replays: Sequence[Replay],
    static: Replay,
    bytes_per_expert: int | None = None,
    bytes_per_replica: int | None = None,
) -> list[list[str]]:
    """Return a table of replays, the headings first.

    Args:
        replays: Replays of the same load at the same size.
        static: Replay without moves, the base of the speed-up.
        bytes_per_expert: Bytes of weights and optimizer state of an expert in a layer, for a column of bytes moved.
            Defaults to no such column.
        bytes_per_replica: Bytes of weights and gradient of an expert in a layer, for a column of the replicas' traffic
            in a step. Defaults to a quarter of ``bytes_per_expert``: 4 bytes a parameter in bfloat16, of 16 with
            optimizer state.
    """
    if bytes_per_replica is None and bytes_per_expert is not None:
        bytes_per_replica = bytes_per_expert // 4
    head = ["policy", "balancedness", "5th percentile", "worst", "speed-up", "replicas", "moved", "between nodes"]
    rows = [[*head, "planning"]]
    for each in replays:
        judged = each.judged if len(each.judged) else np.array([np.nan])
        level = f"{judged.mean():.3f}", f"{np.percentile(judged, 5):.3f}", f"{judged.min():.3f}"
        traffic = f"{each.mean_replicas:.1f}", str(each.rows_moved), str(each.rows_between_nodes)
        seconds = "-" if each.is_bound else f"{1e3 * max(each.planning_seconds, default=0.0):.1f} ms"
        known = traffic if each.slots else "---"
        rows.append([each.name, *level, f"{speed_up(each, static):.2f}", *known, seconds])
    columns = []
    if bytes_per_expert is not None:
        moved = [(each.rows_within_nodes, each.rows_between_nodes) for each in replays]
        columns.append(("bytes moved", [[rows_moved * bytes_per_expert for rows_moved in pair] for pair in moved]))
    if bytes_per_replica is not None:
        layers = static.max_tokens_by_layer.shape[1]
        sent = [[each.mean_replicas * layers * bytes_per_replica] for each in replays]
        columns.append(("replicas' traffic", sent))
    for name, amounts in columns:
        cells = [name, *_sizes(amounts)]
        for row, cell, each in zip(rows, cells, (None, *replays), strict=True):
            row.insert(-1, cell if each is None or each.slots else "-")
    return rows


def _sizes(amounts: Sequence[Sequence[float]]) -> list[str]:
    """Format amounts of bytes, all in the unit that fits the largest."""
    largest = max((sum(parts) for parts in amounts if not np.isnan(sum(parts))), default=0.0)
    power = int(largest >= 2**40) + int(largest >= 2**30)
    return [
        " + ".join(f"{part / 2 ** (20 + 10 * power):,.1f}" for part in parts) + f" {('MiB', 'GiB', 'TiB')[power]}"
        for parts in amounts
    ]
