"""Baselines for replays: the published algorithm as it is, and two upper bounds.

Shape suffixes: ``Y`` MoE layers, ``L`` logical experts, ``P`` physical experts (slots), ``R`` ranks, ``S`` slots on a
rank.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from lightning_eplb.functional import balancedness
from lightning_eplb.placement import EMPTY, ExpertPlacement, num_primary_slots
from lightning_eplb.policies import Outlook
from lightning_eplb.policies.batch_redundancy import choose_copies
from lightning_eplb.policies.deepseek import rebalance_experts
from lightning_eplb.policies.token_split import level_tokens
from lightning_eplb.simulation.replay import Replay, Setting, count_replicas, run


class _PublishedPlanner:
    """Slots as the algorithm returns them. Replicas of an expert compute equal parts of its tokens."""

    def __init__(self, placement: ExpertPlacement, setting: Setting, num_groups: int) -> None:
        self.slots = placement.by_rank
        self.num_primaries = placement.primaries_per_rank
        self.setting, self.num_groups = setting, num_groups

    def serve(self, load_YL: np.ndarray) -> np.ndarray:
        layer_YRS = np.arange(len(load_YL))[:, None, None]
        is_held_YRS, expert_YRS = self.slots != EMPTY, np.maximum(self.slots, 0)
        count_YL = np.zeros(load_YL.shape, dtype=np.int64)
        np.add.at(count_YL, (layer_YRS, expert_YRS), is_held_YRS)
        return np.where(is_held_YRS, (load_YL / count_YL)[layer_YRS, expert_YRS], 0.0).sum(axis=2)

    def plan(self, outlook: Outlook) -> np.ndarray:
        slots_YP = rebalance_experts(
            outlook.window, self.slots[0].size, self.num_groups, self.setting.num_nodes, self.setting.num_ranks
        )[0]
        return slots_YP.numpy().reshape(self.slots.shape)

    def adopt(self, slots_YRS: np.ndarray) -> tuple[int, int, int]:
        layers, ranks, _ = slots_YRS.shape
        was_there_YRL = np.zeros((layers, ranks, int(slots_YRS.max()) + 1), dtype=bool)
        layer_YRS, rank_YRS = np.ix_(range(layers), range(ranks), [0])[:2]
        is_held_YRS = self.slots != EMPTY
        np.logical_or.at(was_there_YRL, (layer_YRS, rank_YRS, np.maximum(self.slots, 0)), is_held_YRS)
        by_node_YNRL = was_there_YRL.reshape(layers, self.setting.num_nodes, -1, was_there_YRL.shape[2])
        was_on_node_YNL = np.logical_or.reduce(by_node_YNRL, axis=2)
        node_YRS = rank_YRS // (ranks // self.setting.num_nodes)
        is_new_YRS = np.logical_not(was_there_YRL[layer_YRS, rank_YRS, slots_YRS])
        is_far_YRS = is_new_YRS & np.logical_not(was_on_node_YNL[layer_YRS, node_YRS, slots_YRS])
        self.slots = slots_YRS
        between = int(is_far_YRS.sum())
        return int(is_new_YRS.any(axis=(1, 2)).sum()), int(is_new_YRS.sum()) - between, between


def replay_published(
    load_WYL: np.ndarray,
    setting: Setting,
    num_groups: int = 1,
    *,
    name: str = "",
    after_step: Callable[[], object] | None = None,
) -> Replay:
    """Replay a load with DeepSeek's algorithm as it was published, for serving.

    Slots are the result of :func:`~lightning_eplb.policies.deepseek.rebalance_experts` for the sum of the window: any
    replica may be the primary, and a rank may hold an expert twice. Replicas of an expert compute equal parts of its
    tokens, whatever ``setting.split`` is. Moves are counted for slots, also redundant ones, whose expert was not on
    the rank before. A move is within nodes if the expert was on the node.

    Source: https://github.com/deepseek-ai/EPLB (2025).

    Args:
        load_WYL: Tokens of each expert in each step, int64.
        setting: Cluster and schedule.
        num_groups: Groups of experts that the router chooses first. Defaults to 1.
        name: Name of the result.
        after_step: Called after each step, to show progress.

    Raises:
        ValueError: A number does not fit the load or another number.
    """
    planner = _PublishedPlanner(setting.first_placement(load_WYL), setting, num_groups)
    return run(load_WYL, planner, setting, name=name, after_step=after_step)


def best_of_each_batch(
    load_WYL: np.ndarray,
    planned: Replay,
    *,
    name: str = "",
    after_step: Callable[[], object] | None = None,
) -> Replay:
    """Choose redundant experts for the known load of each step. Primaries stay as planned.

    Each layer takes the planned replicas or those of ``redundancy="batch"``, whichever leave less to its fullest rank
    under levelled quotas. The search is a heuristic: the result is the best choice that was found, not the best choice.

    Args:
        load_WYL: Load of the replay, int64.
        planned: Replay of a policy on equal ranks.
        name: Name of the result.
        after_step: Called after each step, to show progress.

    Returns:
        Replay with the decisions of ``planned`` and the redundant experts chosen for each step.
    """
    levels_W, max_tokens_WY = np.full(len(load_WYL), np.nan), np.zeros(load_WYL.shape[:2])
    replicas_W = np.zeros(len(load_WYL), dtype=np.int64)
    for step, load_YL in enumerate(load_WYL):
        if after_step is not None:
            after_step()
        if not load_YL.any():
            continue
        slots_YRS = planned.slots_at(step)
        num_primaries = num_primary_slots(load_YL.shape[1], slots_YRS.shape[1])
        equal_R = np.ones(slots_YRS.shape[1])
        chosen_YRS = np.stack(
            [
                choose_copies(load_L, slots_RS, num_primaries, equal_R, 1)
                for load_L, slots_RS in zip(load_YL, slots_YRS, strict=True)
            ]
        )
        planned_YR, tokens_YR = (level_tokens(load_YL, each_YRS) for each_YRS in (slots_YRS, chosen_YRS))
        is_worse_Y = tokens_YR.max(axis=1) > planned_YR.max(axis=1)
        tokens_YR[is_worse_Y], chosen_YRS[is_worse_Y] = planned_YR[is_worse_Y], slots_YRS[is_worse_Y]
        levels_W[step] = balancedness(tokens_YR)
        max_tokens_WY[step] = tokens_YR.max(axis=1)
        replicas_W[step] = count_replicas(chosen_YRS, num_primaries)
    return replace(
        planned,
        name=name,
        balancedness=levels_W,
        max_tokens_by_layer=max_tokens_WY,
        replicas=replicas_W,
        is_bound=True,
    )


def perfect_level(load_WYL: np.ndarray, like: Replay, num_ranks: int, *, name: str = "") -> Replay:
    """Divide the tokens of each layer into equal parts, also fractions. No placement does better.

    Args:
        load_WYL: Load of the replay, int64.
        like: Replay whose first decision determines the steps that count.
        num_ranks: Ranks that share the experts of a layer.
        name: Name of the result.

    Returns:
        Replay without slots, moves and redundant experts.
    """
    mean_WY = load_WYL.sum(axis=2) / num_ranks
    levels_W = np.where(mean_WY.any(axis=1), 1.0, np.nan)
    decisions = tuple(replace(each, num_layers=0, rows_within_nodes=0, rows_between_nodes=0) for each in like.decisions)
    return Replay(name, levels_W, mean_WY, np.zeros(len(load_WYL), dtype=np.int64), decisions, is_bound=True)
