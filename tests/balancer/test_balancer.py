"""The balancer in a plain PyTorch loop, with a hand-written MoE."""

import io
import sys
import threading
import time
import warnings
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from lightning_eplb import (
    BalancedPolicy,
    EPLBCallback,
    ExpertLoad,
    ExpertLoadBalancer,
    ExpertPlacement,
    StaticPolicy,
    parallelize_experts,
)
from lightning_eplb.balancer.cost_model import HardwareProfile
from lightning_eplb.balancer.step_stats import StepStats
from lightning_eplb.parallel.parallelize import expert_layers
from lightning_eplb.policies import Costs
from lightning_eplb.policies.token_split import split_tokens
from tests.fidelity import TOLERANCE, ShufflePolicy
from tests.workers import WorkerError, Workers

EXPERTS, WIDTH, TOKENS = 4, 6, 10


def rearrange_before_the_first_step() -> list[str]:
    model = parallelize_experts(Model(), num_redundant_experts=2)
    balancer = ExpertLoadBalancer(model, step_interval=10)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        balancer.rearrange()
        assert balancer.window_balancedness() == 1.0
    return [str(each.message) for each in caught]


def test_rearrange_before_first_step_warns_nothing(workers: Workers) -> None:
    assert workers.run(2, rearrange_before_the_first_step) == [[], []]


class SlowToCompile(BalancedPolicy):
    """Takes a second to compile, and knows in which thread it did and that it was compiled before it planned."""

    compiled_in = planned_after = ""

    def warm_up(self, placement: ExpertPlacement) -> None:
        time.sleep(1)
        self.compiled_in = threading.current_thread().name

    def look_ahead(self, *args: Any) -> ExpertPlacement:
        self.planned_after = self.compiled_in
        return super().look_ahead(*args)


def decide_while_the_planner_compiles() -> tuple[bool, str, str]:
    policy = SlowToCompile()
    with patch("lightning_eplb.balancer.planner.is_on_disk", return_value=False):
        balancer = ExpertLoadBalancer(parallelize_experts(Model()), step_interval=10, policy=policy)
    is_behind = policy.compiled_in == ""
    balancer.rearrange()
    return is_behind, policy.compiled_in, policy.planned_after


def test_planner_not_compiled_yet_compiles_behind_and_first_decision_waits(workers: Workers) -> None:
    name = "compile the planner"
    assert workers.run(2, decide_while_the_planner_compiles) == [(True, name, name), (True, "", "")]


class Experts(nn.Module):
    """As in the docstring of ``parallelize_experts``."""

    def __init__(self, num_experts: int, width: int, hidden: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.up = nn.Parameter(torch.randn(num_experts, width, hidden) / width**0.5)
        self.down = nn.Parameter(torch.randn(num_experts, hidden, width) / hidden**0.5)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        output = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique():
            token, k = torch.where(top_k_index == expert)
            expert_output = F.relu(hidden_states[token] @ self.up[expert]) @ self.down[expert]
            output = output.index_add(0, token, expert_output * top_k_weights[token, k, None])
        return output


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.experts = Experts(EXPERTS, WIDTH, 5)
        self.double()

    def forward(self, hidden: Tensor) -> Tensor:
        weights, index = self.router(hidden).softmax(dim=-1).topk(2)
        return hidden + self.experts(hidden, index, weights)


def inputs(step: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randn(TOKENS, WIDTH, generator=generator, dtype=torch.float64)


def loop(steps: int, balancer_arguments: dict[str, Any]) -> tuple[ExpertLoadBalancer, Model, list[int]]:
    """Two micro-batches a step; which steps ended with a rearrangement."""
    model = Model()
    parallelize_experts(model, num_redundant_experts=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    balancer = ExpertLoadBalancer(model, [optimizer], **balancer_arguments)
    rearranged_at = []
    for step in range(steps):
        for micro_batch in range(2):
            (model(inputs(2 * step + micro_batch, dist.get_rank())).square().mean() / 2).backward()
        for parameter in model.router.parameters():
            assert parameter.grad is not None
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()
        optimizer.step()
        before = balancer.num_rearrangements
        load = balancer.step()
        assert load is not None
        assert int(load.load.sum()) == 2 * 2 * 2 * TOKENS  # micro-batches, ranks, top-2
        if balancer.num_rearrangements > before:
            rearranged_at.append(step + 1)
        optimizer.zero_grad()
    return balancer, model, rearranged_at


def shuffled_weights() -> dict[str, Tensor]:
    _, model, rearranged_at = loop(8, {"policy": ShufflePolicy(), "step_interval": 1})
    assert rearranged_at == list(range(1, 9))
    return model.state_dict()


def test_balancer_with_random_policy_trains_as_one_process(workers: Workers) -> None:
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    for step in range(8):
        for micro_batch in range(2):
            hidden = torch.cat([inputs(2 * step + micro_batch, rank) for rank in range(2)])
            (model(hidden).square().mean() / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    for weights in workers.run(2, shuffled_weights):
        for name, tensor in model.state_dict().items():
            assert float((weights[name] - tensor).abs().max()) < TOLERANCE, name


def when(step_interval: int) -> list[int]:
    return loop(20, {"policy": ShufflePolicy(), "step_interval": step_interval})[2]


def test_balancer_in_first_interval_rearranges_after_a_quarter(workers: Workers) -> None:
    assert workers.run(2, when, 8) == [[2, 10, 18]] * 2
    assert workers.run(2, when, 3) == [[1, 4, 7, 10, 13, 16, 19]] * 2


def resume_into(window_size: int) -> None:
    balancer, _, _ = loop(6, {"policy": BalancedPolicy(), "step_interval": 8, "window_size": 4})
    file = io.BytesIO()
    torch.save(balancer.state_dict(), file)
    file.seek(0)
    model = Model()
    parallelize_experts(model, num_redundant_experts=2)
    resumed = ExpertLoadBalancer(model, step_interval=8, window_size=window_size)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    kept = min(4, window_size)
    assert torch.equal(resumed.load.steps(), balancer.load.steps()[4 - kept :])
    assert balancer.state_dict()["physical_to_logical"].tolist() == balancer.placement.physical_to_logical.tolist()
    ours, theirs = ({k: v for k, v in b.state_dict().items() if not isinstance(v, Tensor)} for b in (resumed, balancer))
    assert ours == theirs


@pytest.mark.parametrize("window_size", [2, 4, 9])
def test_state_dict_loaded_into_new_balancer_restores_window(window_size: int, workers: Workers) -> None:
    workers.run(2, resume_into, window_size)


def saved_by_seconds() -> list[float]:
    """Of a step's tokens on ranks that hold two experts each, and of the same had the placement levelled them."""
    balancer, _, _ = loop(1, {})
    balancer._cost_model.profiles = [HardwareProfile(0.5, 1.0, 1.0)]
    load = torch.tensor([[30, 10, 4, 4]])
    step = StepStats(load, torch.tensor([24.0]), torch.tensor([40]))
    levelled = StepStats(load, torch.tensor([24.0]), torch.tensor([26]))
    return [balancer.seconds_saved(each) for each in (step, levelled)]  # type: ignore[misc]


def test_seconds_saved_after_rearrangement_are_those_of_fewer_max_tokens(workers: Workers) -> None:
    assert workers.run(2, saved_by_seconds) == [[0.0, 7.0]] * 2


def resume_another_model() -> None:
    balancer, _, _ = loop(1, {})
    balancer.load_state_dict(balancer.state_dict() | {"window": torch.zeros(2, 3, 4)})


def test_load_state_dict_of_other_model_raises(workers: Workers) -> None:
    with pytest.raises(WorkerError, match=r"has \[3, 4\] layers and experts, the model has \[1, 4\]"):
        workers.run(2, resume_another_model)


def without_tokens() -> None:
    model = Model()
    parallelize_experts(model)
    balancer = ExpertLoadBalancer(model, policy=ShufflePolicy(), step_interval=4)
    model(torch.zeros(0, WIDTH, dtype=torch.float64))
    assert balancer.step() is None
    balancer.record(False)
    model(inputs(0, 0))
    assert balancer.step() is None
    assert (balancer.num_steps, balancer.num_rearrangements, balancer.load.num_steps) == (0, 0, 0)
    balancer.record(True)
    model(inputs(0, 0))
    assert balancer.step() is not None
    assert (balancer.num_steps, balancer.num_rearrangements) == (1, 1)


def test_step_without_tokens_returns_none(workers: Workers) -> None:
    workers.run(2, without_tokens)


def with_a_policy_that_stays() -> None:
    balancer, _, rearranged_at = loop(3, {"policy": StaticPolicy(), "step_interval": 4})
    assert rearranged_at == []
    assert (balancer.num_rearrangements, balancer.rearranged_bytes) == (0, 0)
    done = balancer.rearrange()
    assert done is not None
    assert (done.before == done.after, done.num_rows, done.num_bytes) == (True, 0, 0)


def test_step_when_policy_keeps_placement_counts_no_rearrangement(workers: Workers) -> None:
    workers.run(2, with_a_policy_that_stays)


def to_a_given_placement() -> None:
    balancer, model, _ = loop(1, {"policy": StaticPolicy()})
    before = model.state_dict()
    goal = ExpertPlacement([[3, 0, 1, 2, 1, -1]], 4, 2)
    done = balancer.rearrange(goal)
    assert done is not None
    assert balancer.placement == goal
    assert (done.num_layers, done.num_rows) == (1, 2)  # experts 3 and 1 change ranks, 0 and 2 rows
    assert done.num_bytes == 2 * 2 * WIDTH * 5 * 8 * 3  # two rows of two matrices, each with two moments
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    rows = torch.tensor([3, 0] if dist.get_rank() == 0 else [2, 1])
    assert torch.equal(model.experts.up, before["experts.up"][rows])


def test_rearrange_with_placement_moves_to_it(workers: Workers) -> None:
    workers.run(2, to_a_given_placement)


@pytest.mark.parametrize("argument", ["window_size", "step_interval"])
def test_balancer_with_number_below_one_raises(argument: str) -> None:
    with pytest.raises(ValueError, match=f"{argument}=0 must be at least 1"):
        ExpertLoadBalancer(Model(), **{argument: 0})


def test_balancer_of_unconverted_model_raises() -> None:
    with pytest.raises(ValueError, match=r"call parallelize_experts\(model\) before"):
        ExpertLoadBalancer(Model())


def steered(
    loads: list[list[int]],
    balancer_arguments: dict[str, Any],
    **attributes: Any,
) -> tuple[ExpertLoadBalancer, list[tuple[int, Any]]]:
    """Each step's tokens go where ``loads`` says, each rank sends all of them; the decisions, by step."""
    model = Model()
    parallelize_experts(model, num_redundant_experts=2)
    optimizer = torch.optim.AdamW(model.parameters())
    balancer = ExpertLoadBalancer(model, [optimizer], **balancer_arguments)
    for name, value in attributes.items():
        setattr(balancer, name, value)
    decisions = []
    for step, load in enumerate(loads, start=1):
        index = torch.arange(EXPERTS).repeat_interleave(torch.tensor(load))[:, None]
        hidden = torch.ones(len(index), WIDTH, dtype=torch.float64)
        model.experts(hidden, index, torch.ones_like(index, dtype=torch.float64)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        served = balancer.step()
        assert served is not None
        assert served.load.tolist() == [[2 * tokens for tokens in load]]
        if served.rearrangement is not None:
            decisions.append((step, served.rearrangement))
    return balancer, decisions


FREE = Costs(1.0)
LEVEL, SKEWED = [10, 10, 10, 10], [20, 16, 2, 2]


def errors_after_each_step() -> list[float | None]:
    errors: list[float | None] = []

    class Watched(ExpertLoadBalancer):
        def step(self, **kwargs: Any) -> StepStats | None:
            served = super().step(**kwargs)
            errors.append(self.forecast_error)
            return served

    with patch(f"{__name__}.ExpertLoadBalancer", Watched):
        steered([LEVEL] * 5 + [[20, 10, 10, 0]] * 5, {"step_interval": 4, "policy": StaticPolicy()})
    return errors


def test_forecast_error_after_interval_compares_with_its_load(workers: Workers) -> None:
    """Decisions after 1, 5 and 9 steps: the first interval was as expected, the second was not."""
    off = (2 * 10**2 / (20**2 + 2 * 10**2)) ** 0.5
    for errors in workers.run(2, errors_after_each_step):
        assert errors[:4] == [None] * 4
        assert errors[4:8] == [0.0] * 4
        assert errors[8:] == pytest.approx([off] * 2)


def served_with_capacity(capacity: tuple[float, ...] | None) -> tuple[StepStats | None, list[float]]:
    loads = [[16, 12, 8, 4]] * 8
    balancer, _ = steered(loads, {"step_interval": 4}, costs=FREE, capacity=capacity if dist.get_rank() == 0 else None)
    layer, _ = next(expert_layers(balancer.model))
    counts_RL = np.array([loads[-1]] * 2)
    slot_map = layer.slot_map
    tokens_R = split_tokens(counts_RL, slot_map.slots, slot_map.node_of_rank, slot_map.weights, 0)[2]
    return balancer.last_step, tokens_R.tolist()


@pytest.mark.parametrize(
    ("capacity", "expected"), [(None, [40, 40]), ((2, 1), [53, 27]), ((1, 3), [20, 60]), ((0, 1), [8, 72])]
)
def test_capacity_of_rank_zero_levels_tokens_on_all_ranks(
    capacity: tuple[float, ...] | None, expected: list[int], workers: Workers
) -> None:
    """With one redundant slot a rank, a drained rank keeps its other expert."""
    for step, tokens in workers.run(2, served_with_capacity, capacity):
        assert tokens == pytest.approx(expected, abs=1)
        assert step.max_tokens == max(tokens)
        assert step.avg_tokens == 40
        assert step.balancedness == 40 / max(tokens)


def decided_with_costs(costs: Costs) -> list[tuple[int, int]]:
    """Primaries that moved and redundant experts that were kept, in each decision."""
    _, decisions = steered([SKEWED] * 6, {"step_interval": 4}, costs=costs if dist.get_rank() == 0 else None)
    return [(done.num_rows, int((done.after.replica_count - 1).sum())) for _, done in decisions]


def test_costs_of_rank_zero_decide_on_all_ranks(workers: Workers) -> None:
    """Two primaries change ranks where moves are free and replicas are not; where it is the other way round, none."""
    costly = 1e9
    for costs, moved, redundant in (
        (Costs(1.0, 0.0, 0.0, costly), 2, 0),
        (Costs(1.0, costly, costly, 0.0), 0, 2),
        (Costs(1.0, costly, costly, costly), 0, 0),
    ):
        for first, second in workers.run(2, decided_with_costs, costs):
            assert first == (moved, redundant)
            assert second == (0, redundant)


def redundant_of_even_router() -> list[tuple[int, int]]:
    balancer, decisions = steered([LEVEL] * 6, {"step_interval": 4}, costs=Costs(1.0, copy=5.0))
    assert balancer.last_step is not None
    assert balancer.last_step.num_copies == balancer.last_step.copy_bytes == 0
    return [
        (int((done.before.replica_count - 1).sum()), int((done.after.replica_count - 1).sum())) for _, done in decisions
    ]


def test_redundant_experts_of_even_router_are_empty_after_first_decision(workers: Workers) -> None:
    assert workers.run(2, redundant_of_even_router) == [[(2, 0), (0, 0)]] * 2


def when_the_load_drifts() -> tuple[list[int], list[int]]:
    loads = [LEVEL] * 12 + [[30, 6, 2, 2]] * 28
    _, decisions = steered(loads, {"step_interval": 20, "window_size": 20, "policy": StaticPolicy()})
    return [step for step, _ in decisions], [int(done.load.sum()) for _, done in decisions]


def test_balancer_after_drift_rearranges_early(workers: Workers) -> None:
    """Two of twenty steps tell, a quarter of the interval is over, and all ranks say so at once."""
    for steps, _ in workers.run(2, when_the_load_drifts):
        assert steps == [5, 14, 34]


def steps_to_go_through_a_checkpoint() -> tuple[int, list[int]]:
    saved, _ = steered([LEVEL] * 7, {"step_interval": 8, "policy": StaticPolicy()})
    state = saved.state_dict()
    model = Model()
    parallelize_experts(model)
    resumed = ExpertLoadBalancer(model, policy=StaticPolicy(), step_interval=8)
    resumed.load_state_dict(state)
    decided_after = []
    for step in range(1, 12):
        model(inputs(step, dist.get_rank()))
        served = resumed.step()
        assert served is not None
        if served.rearrangement is not None:
            decided_after.append(step)
    return state["steps_to_go"], decided_after


def test_resumed_balancer_rearranges_at_same_steps(workers: Workers) -> None:
    """Decisions after 2 and 10 steps: three are left after seven."""
    assert workers.run(2, steps_to_go_through_a_checkpoint) == [(3, [3, 11])] * 2


def shorter_interval() -> int:
    saved, _ = steered([LEVEL] * 3, {"step_interval": 100, "policy": StaticPolicy()})
    model = Model()
    parallelize_experts(model)
    resumed = ExpertLoadBalancer(model, policy=StaticPolicy(), step_interval=5)
    resumed.load_state_dict(saved.state_dict())
    return resumed.state_dict()["steps_to_go"]


def test_resumed_balancer_with_shorter_interval_waits_no_longer_than_it(workers: Workers) -> None:
    assert workers.run(2, shorter_interval) == [5, 5]


def due_when_loaded() -> tuple[bool, bool]:
    """A decision is due and not made yet, and an earlier state is loaded."""
    model = Model()
    parallelize_experts(model)
    balancer = ExpertLoadBalancer(model, policy=StaticPolicy(), step_interval=8, use_async=True)
    early = balancer.state_dict()
    for step in range(2):
        model(inputs(step, dist.get_rank()))
        balancer.step()
    was_due = balancer.state_dict()["is_rearranging"]
    balancer.load_state_dict(early)
    return was_due, balancer.state_dict()["is_rearranging"]


def test_load_state_dict_when_due_clears_due(workers: Workers) -> None:
    assert workers.run(2, due_when_loaded) == [(True, False)] * 2


def redundant_of_steps(redundancy: str, min_tokens: int | None) -> list[tuple[int, float]]:
    """The hot expert changes its rank with every step."""
    loads = [[24, 4, 4, 4], [4, 4, 4, 24], [8, 8, 8, 8]] * 2
    seen: list[tuple[int, float]] = []

    class Watched(ExpertLoadBalancer):
        def step(self, **kwargs: Any) -> StepStats | None:
            served = super().step(**kwargs)
            assert served is not None
            seen.append((served.num_copies, served.balancedness))
            return served

    arguments = {"policy": StaticPolicy(), "redundancy": redundancy, "min_tokens_per_copy": min_tokens}
    with patch(f"{__name__}.ExpertLoadBalancer", Watched):
        steered(loads, arguments)
    return seen


def test_redundancy_batch_with_skewed_batch_sends_replica(workers: Workers) -> None:
    """A replica in each step that needs one, none where the ranks are level or too few tokens would change ranks."""
    for seen in workers.run(2, redundant_of_steps, "batch", 1):
        assert seen == [(1, 1.0), (1, 1.0), (0, 1.0)] * 2
    for seen in workers.run(2, redundant_of_steps, "batch", 21):  # 20 of the hot rank's 56 tokens are too many
        assert seen == [(0, 36 / 56), (0, 36 / 56), (0, 1.0)] * 2


def test_redundancy_batch_after_first_step_has_same_floor_on_all_ranks(workers: Workers) -> None:
    """All ranks have the same floor, and until it is known any redundant expert will do."""
    first, second = workers.run(2, redundant_of_steps, "batch", None)
    assert first == second
    assert first[0] == (1, 1.0)


def predictions(redundancy: str) -> list[tuple[float | None, list[float]]]:
    """Return what each decision expects, and what the steps until the next one had."""
    found: list[tuple[float | None, list[float]]] = []

    class Watched(ExpertLoadBalancer):
        def step(self, **kwargs: Any) -> StepStats | None:
            served = super().step(**kwargs)
            assert served is not None
            if found:
                found[-1][1].append(served.balancedness)
            if served.rearrangement is not None:
                assert self.predicted_balancedness == served.rearrangement.predicted_balancedness
                found.append((self.predicted_balancedness, []))
            return served

    arguments = {"policy": StaticPolicy(), "redundancy": redundancy, "step_interval": 4, "min_tokens_per_copy": 1}
    with patch(f"{__name__}.ExpertLoadBalancer", Watched):
        steered([SKEWED] * 10, arguments)
    return found


@pytest.mark.parametrize("redundancy", ["window", "batch"])
def test_predicted_balancedness_of_steady_load_is_exact(redundancy: str, workers: Workers) -> None:
    """Redundant experts of the placement, and those that the batch will choose."""
    for found in workers.run(2, predictions, redundancy):
        assert len(found) == 3
        for predicted, achieved in found:
            assert achieved
            assert achieved == [pytest.approx(predicted)] * len(achieved)


def placements_by_batch() -> list[ExpertPlacement]:
    balancer, decisions = steered(
        [SKEWED] * 6, {"policy": ShufflePolicy(), "redundancy": "batch", "step_interval": 4}, costs=FREE
    )
    return [balancer.placement, *(done.after for _, done in decisions)]


def test_placement_with_redundancy_batch_has_no_redundant_experts(workers: Workers) -> None:
    for placements in workers.run(2, placements_by_batch):
        assert len(placements) == 3
        for placement in placements:
            assert placement == placement.without_copies()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"redundancy": "always"}, "redundancy='always' must be"),
        ({"min_tokens_per_copy": 0}, "min_tokens_per_copy=0"),
        ({"use_async": 1}, "use_async=1 must be True or False"),
    ],
)
def test_arguments_of_balancer_when_invalid_raise(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExpertLoadBalancer(Model(), **arguments)
    with pytest.raises(ValueError, match=message):
        EPLBCallback(**arguments)


IDLE = {
    "no slots": ({"redundancy": "batch"}, 0, "redundancy='batch' has no effect with num_redundant_experts=0"),
    "by window": ({"min_tokens_per_copy": 3}, 1, "min_tokens_per_copy=3 has no effect with redundancy='window'"),
    "batch": ({"redundancy": "batch", "min_tokens_per_copy": 3}, 1, None),
    "window": ({}, 0, None),
}


@pytest.mark.parametrize("name", IDLE)
def test_arguments_without_effect_warn(name: str) -> None:
    arguments, redundant, message = IDLE[name]
    model = parallelize_experts(Model(), num_redundant_experts=redundant)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ExpertLoadBalancer(model, **arguments)
    told = [str(warning.message) for warning in caught if "has no effect" in str(warning.message)]
    assert len(told) == (message is not None)
    assert message is None or message in told[0]


def seconds_with_a_slow_window() -> float | None:
    def slow(metric: ExpertLoad) -> Tensor:
        time.sleep(0.3)
        return steps(metric)

    steps = ExpertLoad.steps
    with patch.object(ExpertLoad, "steps", slow):
        balancer, _, _ = loop(1, {"policy": StaticPolicy(), "step_interval": 1})
    assert balancer.last_step is not None
    done = balancer.last_step.rearrangement
    return done.plan_seconds if done is not None else None


def test_rearrange_seconds_with_slow_window_include_it(workers: Workers) -> None:
    for seconds in workers.run(2, seconds_with_a_slow_window):
        assert seconds is not None
        assert seconds > 0.3


def compiled_versions() -> dict[str, int]:
    """For how many kinds of arguments each loop of the package is compiled in this process."""
    modules = [module for name, module in sys.modules.items() if name.startswith("lightning_eplb")]
    loops = [value for module in modules for value in vars(module).values() if hasattr(value, "nopython_signatures")]
    return {f"{loop.__module__}.{loop.__name__}": len(loop.nopython_signatures) for loop in loops}


def compiled_after_set_up(redundancy: Any) -> list[str]:
    """On every worker: the loops that training compiled, with a decision and a forward for other capacities."""
    torch.manual_seed(dist.get_rank())
    model = Model()
    parallelize_experts(model, num_redundant_experts=2)
    balancer = ExpertLoadBalancer(model, step_interval=2, redundancy=redundancy)
    before = compiled_versions()
    for _ in range(5):
        model(torch.randn(TOKENS, WIDTH, dtype=torch.float64)).sum().backward()
        balancer.step()
        balancer.capacity = (1.0, 0.5)
    balancer.window_balancedness()
    assert balancer.predicted_balancedness is not None
    return [name for name, versions in compiled_versions().items() if versions > before.get(name, 0)]


@pytest.mark.slow
@pytest.mark.parametrize("redundancy", ["window", "batch"])
def test_training_after_setup_compiles_nothing(redundancy: str) -> None:
    """If the first decision compiles, all ranks wait for it in the middle of training."""
    fresh = Workers(2)  # in the shared ones other tests have compiled
    try:
        assert fresh.run(2, compiled_after_set_up, redundancy) == [[], []]
    finally:
        fresh.stop()
