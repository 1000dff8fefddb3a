"""Numbers of a report: a load and its replays, with time in bins so that the page stays small.

Shape suffixes: ``W`` steps, ``B`` bins of steps, ``Y`` MoE layers, ``L`` logical experts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lightning_eplb.policies import BalancedPolicy, StaticPolicy
from lightning_eplb.simulation.replay import Replay, Setting, replay, speed_up

MOST_BINS = 160
"""Largest number of bins: a screen has no room for more columns."""
MOST_CELLS = 1_500_000
"""Largest number of cells in the maps of all layers' experts. Large models get fewer bins: a page is below 2 MB."""
GRID_STEPS = 1_000
"""Number of last steps that other sizes are replayed with: a report must not take minutes."""


@dataclass(frozen=True)
class OtherSize:
    """Result of a replay with another number of ranks and of redundant experts.

    Attributes:
        num_ranks: Ranks that share the experts of a layer.
        redundant_per_rank: Redundant experts of a layer on each rank.
        balancedness: Mean balancedness of the steps after the first decision.
        speed_up: Speed-up of the experts' part of a step, over the initial placement on the same ranks without
            redundant experts.
    """

    num_ranks: int
    redundant_per_rank: int
    balancedness: float
    speed_up: float


@dataclass(frozen=True)
class ReportContent:
    """All numbers of a page.

    Attributes:
        source: Source of the load.
        settings: Numbers of :class:`lightning_eplb.simulation.replay.Setting` of the replays, by name.
        edges: First step of each bin, and the number of steps, ``[B + 1]`` int64.
        static: Replay without moves.
        replays: Replays of the policies, in the order to show them.
        balancedness: Mean over the steps of each bin, ``[B]``, by replay. NaN in a bin without a token.
        balancedness_by_layer: Mean rank over fullest rank in each layer and bin, ``[Y, B]``, by replay.
        share: Tokens of each expert over the mean of its layer, ``[Y, L, B]`` float32. NaN where the layer has none.
        total: Tokens of each expert over all steps, ``[Y, L]`` int64.
        other_sizes: Results of other numbers of ranks and of redundant experts.
    """

    source: str
    settings: dict[str, int | str]
    edges: np.ndarray
    static: Replay
    replays: tuple[Replay, ...]
    balancedness: dict[str, np.ndarray]
    balancedness_by_layer: dict[str, np.ndarray]
    share: np.ndarray
    total: np.ndarray
    other_sizes: tuple[OtherSize, ...]

    @property
    def best(self) -> Replay:
        """Replay that "after" shows: the last one that moves anything, if any does."""
        return next((each for each in reversed(self.replays) if each.name != self.static.name), self.static)

    @property
    def num_steps(self) -> int:
        return int(self.edges[-1])


def prepare(
    load_WYL: np.ndarray,
    replays: Sequence[Replay],
    static: Replay,
    *,
    source: str,
    num_ranks: int,
    other_sizes: Sequence[OtherSize] = (),
    **settings: int | str,
) -> ReportContent:
    """Bin a load and its replays.

    Args:
        load_WYL: Tokens of each expert in each step, int64.
        replays: Replays of this load by policies, all at the same size.
        static: Replay of ``StaticPolicy``.
        source: Source of the load, in a few words.
        num_ranks: Ranks of the replays.
        other_sizes: Results of :func:`try_other_sizes`.
        **settings: Other settings of the replays, to show.
    """
    edges = time_bins(*load_WYL.shape)
    load_BYL = _sum_bins(load_WYL, edges)
    mean_BY = load_BYL.sum(axis=2) / num_ranks
    all_replays = {each.name: each for each in (static, *replays)}
    with np.errstate(invalid="ignore", divide="ignore"):
        share_BYL = (load_BYL / load_BYL.mean(axis=2, keepdims=True)).astype(np.float32)
        by_layer = {
            name: (mean_BY / _sum_bins(each.max_tokens_by_layer, edges)).T for name, each in all_replays.items()
        }
    return ReportContent(
        source=source,
        settings={"num_ranks": num_ranks, **settings},
        edges=edges,
        static=static,
        replays=tuple(replays),
        balancedness={name: _mean_of_bins(each.balancedness, edges) for name, each in all_replays.items()},
        balancedness_by_layer=by_layer,
        share=share_BYL.transpose(1, 2, 0),
        total=load_WYL.sum(axis=0),
        other_sizes=tuple(other_sizes),
    )


def time_bins(steps: int, layers: int, experts: int) -> np.ndarray:
    """Divide the steps into bins of about equal size. Return the first step of each, and ``steps``."""
    bins = min(steps, MOST_BINS, max(MOST_CELLS // (layers * experts), 24))
    return np.linspace(0, steps, bins + 1).astype(np.int64)


def sizes_to_try(num_experts: int, num_ranks: int) -> list[tuple[int, int]]:
    """Return numbers of ranks near ``num_ranks``, at most one for each expert, each with redundant experts per rank."""
    near = [num_ranks // 2, num_ranks, 2 * num_ranks, 4 * num_ranks]
    return [(ranks, redundant) for ranks in near if 1 < ranks <= num_experts for redundant in (0, 1, 2)]


def try_other_sizes(
    load_WYL: np.ndarray,
    sizes: Sequence[tuple[int, int]],
    setting: Setting,
    after_step: Callable[[], object] | None = None,
) -> list[OtherSize]:
    """Replay the load's last steps with ``BalancedPolicy`` at each size.

    Args:
        load_WYL: Tokens of each expert in each step, int64.
        sizes: Results of :func:`sizes_to_try`.
        setting: Schedule, and size of the nodes, which stays the same. Token split and costs are the defaults.
        after_step: Function called after each step of each replay.
    """
    last_WYL = last_steps(load_WYL, setting.step_interval)
    found, first = [], {}
    for ranks, redundant in sizes:
        nodes = max(1, ranks * setting.num_nodes // setting.num_ranks)
        bare = Setting(
            ranks,
            num_nodes=nodes if ranks % nodes == 0 else 1,
            window_size=setting.window_size,
            step_interval=setting.step_interval,
        )
        if ranks not in first:
            first[ranks] = replay(last_WYL, StaticPolicy(), bare, after_step=after_step)
        larger = replace(bare, num_redundant_experts=redundant * ranks)
        tried = replay(last_WYL, BalancedPolicy(), larger, after_step=after_step)
        if len(tried.judged):
            level = float(tried.judged.mean())
            found.append(OtherSize(ranks, redundant, level, speed_up(tried, first[ranks])))
    return found


def last_steps(load_WYL: np.ndarray, step_interval: int) -> np.ndarray:
    """Return the last steps, at least three intervals, that other sizes are replayed with."""
    return load_WYL[-max(GRID_STEPS, 3 * step_interval) :]


def _sum_bins(values_W: np.ndarray, edges: np.ndarray) -> np.ndarray:
    return np.add.reduceat(values_W, edges[:-1], axis=0)


def _mean_of_bins(values_W: np.ndarray, edges: np.ndarray) -> np.ndarray:
    is_known = ~np.isnan(values_W)
    with np.errstate(invalid="ignore"):
        return _sum_bins(np.where(is_known, values_W, 0.0), edges) / _sum_bins(is_known.astype(np.int64), edges)
