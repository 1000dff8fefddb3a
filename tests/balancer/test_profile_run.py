"""A profile run reserves memory in the first step and changes nothing; dummy steps count nothing."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_eplb import (
    EPLBCallback,
    ExpertLoadBalancer,
    ExpertParallelStrategy,
    ExpertPlacement,
    parallelize_experts,
)
from lightning_eplb.balancer.profile_run import imbalance_of
from lightning_eplb.parallel.all_to_all import AllToAllDispatcher
from lightning_eplb.parallel.dummy_dispatch import dummy_index
from lightning_eplb.parallel.parallelize import expert_layers
from tests.balancer.test_resumption import is_same
from tests.balancer.test_warm_start import HOT
from tests.fidelity import SEQUENCES, ShufflePolicy, named_state, trainer_for, whole
from tests.fsdp1 import DoublePrecision, fsdp1, full_state
from tests.models import (
    SEQUENCE,
    LanguageModel,
    ShardedLanguageModel,
    hugging_face_model,
    language_loss,
    loader,
    optimizer_of,
    token_batches,
)
from tests.parallel.test_per_expert_state import EXPERTS, WIDTH, Counters
from tests.workers import Workers

STEPS = 5


def fit(kind: str, profile: bool) -> dict[str, Any]:
    """On every worker: all that training leaves, and the rows of each dispatch in the first step."""
    torch.manual_seed(3)
    model, strategy = hugging_face_model("qwen3_moe" if kind == "async" else "mixtral"), None
    plugins: list[Any] = []
    if kind == "fsdp1":
        strategy, plugins = fsdp1(sharding_strategy="FULL_SHARD"), [DoublePrecision()]
    module = LanguageModel(model, "adamw")
    ranks = dist.get_world_size()
    if kind == "checkpointing":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if kind == "sharded":
        module = ShardedLanguageModel(model, "adamw", 2)
        strategy = ExpertParallelStrategy(ep_size=2)
    asynchronous = kind == "async"
    eplb = EPLBCallback(
        2, 2, ShufflePolicy(), step_interval=4, use_async=asynchronous, initial_load=HOT, profile=profile
    )
    trainer = trainer_for(ranks, strategy, plugins=plugins, max_steps=STEPS, callbacks=[eplb])
    tokens: list[list[int]] = []
    dispatch = AllToAllDispatcher.dispatch

    def record(self: AllToAllDispatcher, batch: Any, routing: Any, in_flight: Any = None) -> Any:
        if trainer.global_step <= 1:
            tokens.append(routing.tokens.tolist())
        return dispatch(self, batch, routing, in_flight)

    with patch.object(AllToAllDispatcher, "dispatch", record):
        trainer.fit(module, loader(token_batches(STEPS * ranks * SEQUENCES), SEQUENCES))
    assert eplb.balancer is not None
    if kind == "fsdp1":
        weights, state = full_state(trainer)
    else:
        weights = {name: whole(tensor) for name, tensor in model.state_dict().items()}
        state = named_state(model, trainer.optimizers[0])
    return {
        "losses": module.losses,
        "weights": weights,
        "state": state,
        "balancer": eplb.balancer.state_dict(),
        "random": torch.get_rng_state(),
        "tokens": tokens,
    }


@pytest.mark.parametrize("kind", ["ddp", "sharded", "fsdp1", "async", "checkpointing"])
def test_profile_run_changes_no_bit_of_training(kind: str, workers: Workers) -> None:
    ranks = 4 if kind == "sharded" else 2
    without, profiled = (workers.run(ranks, fit, kind, profile, seconds=120) for profile in (False, True))
    for expected, ours in zip(without, profiled, strict=True):
        plain, more = expected.pop("tokens"), ours.pop("tokens")
        assert is_same(expected, ours)
        dummies = [each for each in more if each not in plain]
        mean = 2 * SEQUENCES * SEQUENCE  # top-2
        assert sorted(dummies)[:2] == [[mean // 2, 3 * mean // 2], [3 * mean // 2, mean // 2]]


class CountingExperts(Counters):
    """Has a counter by expert, and draws random numbers in its forward."""

    def change(self, expert: int, rows: Tensor) -> Tensor:
        return nn.functional.dropout(super().change(expert, rows), 0.5).to(self.up.dtype)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router = nn.Linear(WIDTH, EXPERTS, dtype=torch.float64)
        self.experts = CountingExperts()

    def forward(self, hidden: Tensor) -> Tensor:
        weights, index = self.router(hidden).softmax(dim=-1).topk(2)
        return hidden + self.experts(hidden, index, weights)


def count(profile: bool, autocast: bool, direct: bool = False) -> tuple[dict[str, Tensor], Tensor, list[int]]:
    """On every worker: weights and counters, the state of the random generator, and calls of a gradient hook."""
    torch.manual_seed(dist.get_rank())
    dispatcher = None
    if direct:
        from tests.parallel.shared_memory import CPUDirectDispatcher as dispatcher  # noqa: N813
    model = parallelize_experts(Counting(), num_redundant_experts=2, dispatcher=dispatcher)
    if autocast:
        model.float()
    optimizer = optimizer_of("sgd", model)
    balancer = ExpertLoadBalancer(model, [optimizer], policy=ShufflePolicy(), step_interval=100)
    balancer.rearrange()
    if profile:
        balancer.profile()
    calls: list[int] = []
    if not autocast:
        model.experts.up.register_hook(lambda grad: calls.append(len(grad)))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for step in range(3):
            hidden = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
            model(hidden.float() if autocast else hidden).square().mean().backward()
            optimizer.step()
            balancer.step()
            optimizer.zero_grad()
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}, torch.get_rng_state(), calls


@pytest.mark.parametrize("autocast", [False, True])
def test_profile_run_changes_no_counter_random_generator_or_autocast_cache(autocast: bool, workers: Workers) -> None:
    without, profiled = (workers.run(2, count, profile, autocast) for profile in (False, True))
    for expected, ours in zip(without, profiled, strict=True):
        assert all(is_same(one, other) for one, other in zip(expected, ours, strict=True))
        assert ours[2] == ([] if autocast else [EXPERTS] * 3)


def test_profile_run_of_direct_dispatch_changes_nothing(workers: Workers) -> None:
    pytest.importorskip("triton", reason="the kernels are Triton's")
    without, profiled = (workers.run(2, count, profile, False, True) for profile in (False, True))
    for expected, ours in zip(without, profiled, strict=True):
        assert all(is_same(one, other) for one, other in zip(expected, ours, strict=True))


@pytest.mark.parametrize(
    ("num_tokens", "top_k", "num_experts", "own", "share"),
    [
        (5, 2, 8, [0, 1, 2, 3], 0.75),
        (64, 8, 16, [3], 0.25),
        (7, 1, 4, [2, 3], 0.5),
        (0, 2, 4, [0], 0.5),
        (9, 4, 4, [1], 0.3),
    ],
)
def test_dummy_index_has_share_and_different_experts(
    num_tokens: int, top_k: int, num_experts: int, own: list[int], share: float
) -> None:
    index_TK = dummy_index(num_tokens, top_k, np.array(own), num_experts, share)
    assert index_TK.shape == (num_tokens, top_k)
    assert all(len(set(choices)) == top_k for choices in index_TK.tolist())
    wanted = min(max(share * top_k, top_k - (num_experts - len(own))), len(own)) * num_tokens
    assert np.isin(index_TK, own).sum() == math.floor(wanted + 1e-9)
    assert index_TK.min(initial=0) >= 0
    assert index_TK.max(initial=0) < num_experts


def test_imbalance_is_twice_the_mean_but_never_all_tokens() -> None:
    assert [imbalance_of(ranks) for ranks in (2, 3, 4, 64)] == [1.5, 2.0, 2.0, 2.0]


class Limited(AllToAllDispatcher):
    """Has memory for the tokens of ordinary steps: a fifth more than the mean."""

    def dispatch(self, batch: Any, routing: Any, in_flight: Any = None) -> Any:
        if routing.tokens.max() > 1.2 * routing.tokens.mean():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")
        return super().dispatch(batch, routing, in_flight)


def even_loop(profile: bool, dispatcher: type[AllToAllDispatcher] | None = None, steps: int = 3) -> ExpertLoadBalancer:
    """A loop of one's own with a load that is about even; experts are shuffled after its second step."""
    model = hugging_face_model("mixtral")
    for name, parameter in model.named_parameters():
        if ".gate.weight" in name:
            nn.init.zeros_(parameter)  # then all choose the same two experts, one on each rank
    parallelize_experts(model, dispatcher=dispatcher)
    for layer, _ in expert_layers(model):
        layer.set_placement(ExpertPlacement([[0, 2, 4, 6, 1, 3, 5, 7]], 8, 2))
    optimizer = optimizer_of("adamw", model)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    balancer = ExpertLoadBalancer(model, [optimizer], policy=ShufflePolicy(), step_interval=8)
    if profile:
        balancer.profile()
    for tokens in token_batches(steps * 4).split(4):
        language_loss(model, tokens[dist.get_rank() :: 2]).backward()
        optimizer.step()
        balancer.step()
        optimizer.zero_grad()
    return balancer


def run_limited(profile: bool) -> str:
    try:
        return f"{even_loop(profile, Limited, steps=1).num_steps} steps"
    except torch.OutOfMemoryError as error:
        return str(error)


def test_profile_run_without_memory_for_skewed_dispatch_fails_in_first_step(workers: Workers) -> None:
    assert workers.run(2, run_limited, False) == ["1 steps"] * 2
    for message in workers.run(2, run_limited, True):
        assert message.startswith(
            "profile run: out of memory in model.layers.0.mlp.experts, forward and backward, with 48"
        )
        assert "1.5 times the mean" in message
        assert "larger ep_size" in message
        assert message.endswith("(CUDA out of memory. Tried to allocate 1.00 GiB.)")


class Allocator(TorchDispatchMode):
    """Knows the largest tensor that was made, and has no memory for larger ones than a limit."""

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit, self.largest = limit, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and "empty" in func.__name__:
            self.largest = max(self.largest, result.nbytes)
            if result.nbytes > self.limit:
                raise torch.OutOfMemoryError(f"Tried to allocate {result.nbytes} bytes.")
        return result


@contextmanager
def _steps_counted() -> Iterator[list[int]]:
    steps: list[int] = []
    original = ExpertLoadBalancer.step

    def step(self: ExpertLoadBalancer, **arguments: Any) -> Any:
        steps.append(1)
        return original(self, **arguments)

    with patch.object(ExpertLoadBalancer, "step", step), patch("lightning_eplb.balancer.cost_model.PROBE_BYTES", 8):
        yield steps


def run_with_little_memory(profile: bool) -> tuple[int, str]:
    """On every worker: the step in which memory runs out, and the error; memory is what a step without moves needs."""
    with _steps_counted(), Allocator(math.inf) as plenty:
        even_loop(False, steps=1)
    with _steps_counted() as steps, Allocator(plenty.largest):
        try:
            even_loop(profile)
        except torch.OutOfMemoryError as error:
            return len(steps), str(error)
    return -1, ""


def test_profile_run_without_memory_for_relocation_fails_in_first_step(workers: Workers) -> None:
    for step, message in workers.run(2, run_with_little_memory, False):
        assert (step, message[:9]) == (2, "Tried to ")
    for step, message in workers.run(2, run_with_little_memory, True):
        assert step == 1
        assert message.startswith(
            "profile run: out of memory in a relocation of 4 primaries a rank with their optimizer"
        )
        assert "MiB, in model.layers.0.mlp.experts" in message
        assert "larger ep_size" in message


def own_loop(dummies: bool, use_async: bool) -> tuple[dict[str, Any], dict[str, Any], list[int]]:
    """On every worker: weights and the balancer's state, with two dummy steps behind every step or without."""
    model = parallelize_experts(hugging_face_model("mixtral"), num_redundant_experts=2)
    optimizer = optimizer_of("adamw", model)
    policy = ShufflePolicy()
    with patch("lightning_eplb.balancer.cost_model.MAX_BYTES_IN_FLIGHT", 1):
        balancer = ExpertLoadBalancer(model, [optimizer], policy=policy, step_interval=4, use_async=use_async)
        ended = []
        for step, tokens in enumerate(token_batches(10 * 4).split(4)):
            language_loss(model, tokens[dist.get_rank() :: 2]).backward()
            balancer.before_optimizer_step()
            optimizer.step()
            stats = balancer.step()
            optimizer.zero_grad()
            assert stats is not None
            ended += [step] * (stats.rearrangement is not None)
            for _ in range(2 * dummies):
                in_flight = balancer.state_dict()
                language_loss(model, torch.zeros(dist.get_rank() + 1, SEQUENCE, dtype=torch.int64))
                assert balancer.step(dummy=True) is None
                assert is_same(in_flight, balancer.state_dict())
        balancer.finish_rearrangement()
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}, balancer.state_dict(), ended


@pytest.mark.parametrize("use_async", [False, True])
def test_dummy_steps_count_nothing_and_change_nothing(use_async: bool, workers: Workers) -> None:
    without, with_dummies = (workers.run(2, own_loop, dummies, use_async) for dummies in (False, True))
    for expected, ours in zip(without, with_dummies, strict=True):
        assert len(expected[2]) >= 2
        assert all(is_same(one, other) for one, other in zip(expected, ours, strict=True))


def profile_with_one_rank() -> int:
    balancer = ExpertLoadBalancer(parallelize_experts(hugging_face_model("mixtral")))
    balancer.profile()
    language_loss(balancer.model, token_batches(2))
    stats = balancer.step()
    assert stats is not None
    return int(stats.load.sum())


def test_profile_run_with_one_rank_does_nothing() -> None:
    assert profile_with_one_rank() == 2 * 2 * 2 * SEQUENCE  # layers, sequences, top-2


def test_profile_of_other_type_is_refused() -> None:
    with pytest.raises(ValueError, match="profile=3 must be True or False"):
        EPLBCallback(profile=3)  # type: ignore[arg-type]
