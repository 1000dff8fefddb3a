"""The published algorithm is replayed as it is, and the bounds are bounds."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lightning_eplb import BalancedPolicy, DeepSeekPolicy, StaticPolicy
from lightning_eplb.policies.deepseek import rebalance_experts
from lightning_eplb.simulation.baselines import best_of_each_batch, perfect_level, replay_published
from lightning_eplb.simulation.replay import Setting, replay, speed_up

HOT = np.tile(np.array([[[1200, 200, 100, 100]]]), (12, 1, 1))
"""One layer, 1,600 tokens; decisions after steps 2 and 10 with an interval of 8."""
SETTING = Setting(2, num_redundant_experts=2, step_interval=8)


def test_published_plan_of_hot_expert_is_split_evenly() -> None:
    """At first rank 0 holds experts 0, 1 and a replica of 2, rank 1 holds 2, 3 and 1; then what the algorithm says."""
    found = replay_published(HOT, SETTING, name="published")
    assert found.max_tokens[:2].tolist() == [1200 + 200 / 2 + 100 / 2] * 2
    assert found.balancedness[0] == pytest.approx(800 / 1350)
    slots_YP, _, count_YL = rebalance_experts(HOT[0], 6, 1, 1, 2)
    share_P = (HOT[0] / count_YL.numpy())[0][slots_YP.numpy()[0]]
    assert found.max_tokens[2:] == pytest.approx(share_P.reshape(2, 3).sum(axis=1).max())
    assert np.array_equal(found.slots[1].ravel(), slots_YP.numpy()[0])
    assert found.first_decided == 2
    assert found.mean_replicas == 2.0


def test_published_plan_counts_new_slots_as_moved() -> None:
    """Counted from the slots themselves: within the node where a rank of it held the expert, else between nodes."""
    load_WYL = np.random.default_rng(0).integers(0, 1000, (40, 3, 16))
    setting = Setting(4, num_redundant_experts=4, num_nodes=2, step_interval=16)
    found = replay_published(load_WYL, setting)
    assert len(found.decisions) == 3
    for decision, before_YRS, after_YRS in zip(found.decisions, found.slots, found.slots[1:], strict=False):
        within = between = 0
        for layer, rank in np.ndindex(3, 4):
            on_node = before_YRS[layer, rank // 2 * 2 : rank // 2 * 2 + 2]
            for expert in after_YRS[layer, rank]:
                if expert not in before_YRS[layer, rank]:
                    within += expert in on_node
                    between += expert not in on_node
        assert (decision.rows_within_nodes, decision.rows_between_nodes) == (within, between)
    assert found.rows_moved > 0


def test_published_plan_with_any_split_is_the_same() -> None:
    even = replay_published(HOT, Setting(2, num_redundant_experts=2, step_interval=8, split="even"))
    assert np.array_equal(even.max_tokens, replay_published(HOT, SETTING).max_tokens)


def test_published_plan_with_too_many_redundant_experts_raises() -> None:
    with pytest.raises(ValueError, match=r"num_redundant_experts=10 is more than num_ranks=2 can use\. Use at most 4"):
        replay_published(HOT, Setting(2, num_redundant_experts=10))


loads = arrays(np.int64, st.tuples(st.just(9), st.integers(1, 3), st.just(8)), elements=st.integers(0, 500))


@settings(max_examples=40, deadline=None)
@given(
    load_WYL=loads,
    policy=st.sampled_from([StaticPolicy, DeepSeekPolicy, BalancedPolicy]),
    per_rank=st.integers(0, 2),
    split=st.sampled_from(["even", "level"]),
)
def test_bounds_of_any_policy_are_not_exceeded(load_WYL: np.ndarray, policy: type, per_rank: int, split: str) -> None:
    setting = Setting(4, num_redundant_experts=4 * per_rank, step_interval=4, split=split)
    planned = replay(load_WYL, policy(), setting, name="planned")
    best = best_of_each_batch(load_WYL, planned, name="best")
    perfect = perfect_level(load_WYL, planned, 4, name="perfect")
    # Quotas are whole tokens, an even split is not.
    assert (best.max_tokens_by_layer <= planned.max_tokens_by_layer + 1).all()
    assert (perfect.max_tokens_by_layer <= best.max_tokens_by_layer).all()
    assert (perfect.max_tokens_by_layer <= replay_published(load_WYL, setting).max_tokens_by_layer + 1e-9).all()
    if split == "level":
        assert (best.max_tokens_by_layer <= planned.max_tokens_by_layer).all()
        assert speed_up(perfect, planned) >= speed_up(best, planned) >= 1.0
    assert best.decisions == planned.decisions
    assert (best.replicas <= load_WYL.shape[1] * 4 * per_rank).all()
    is_empty_W = ~load_WYL.any(axis=(1, 2))
    for each in (planned, best, perfect):
        assert np.array_equal(np.isnan(each.balancedness), is_empty_W)
        assert not each.max_tokens[is_empty_W].any()
        assert not each.replicas[is_empty_W].any()


def test_best_of_each_batch_with_moving_hot_expert_levels_it() -> None:
    """Each step's tokens go to another expert: planned replicas are of the wrong ones, those of the batch level it."""
    load_WYL = np.full((16, 1, 8), 100)
    load_WYL[np.arange(16), 0, 3 * np.arange(16) % 8] = 4_100
    setting = Setting(4, num_redundant_experts=8, step_interval=4)
    planned = replay(load_WYL, BalancedPolicy(), setting)
    best = best_of_each_batch(load_WYL, planned)
    assert planned.judged.mean() < 0.8
    assert best.judged.mean() > 0.9
    assert perfect_level(load_WYL, planned, 4).judged.tolist() == [1.0] * len(planned.judged)


def test_baselines_after_each_step_report_it() -> None:
    planned = replay(HOT, StaticPolicy(), SETTING)
    for replayed in (
        lambda seen: replay_published(HOT, SETTING, after_step=lambda: seen.append(1)),
        lambda seen: best_of_each_batch(HOT, planned, after_step=lambda: seen.append(1)),
    ):
        seen: list[int] = []
        replayed(seen)
        assert len(seen) == len(HOT)
