"""Loops without the Trainer: plain PyTorch and Fabric train, clip, save and go on as one process does."""

import copy
import math
import time
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

from lightning_eplb import (
    ExpertLoadBalancer,
    ExpertPlacement,
    clip_grad_norm_,
    fully_shard_moe,
    leave_experts_out_of_ddp,
    logical_parameters,
    parallelize_experts,
)
from lightning_eplb.integrations.fabric import clip_fabric_by_global_norm
from lightning_eplb.parallel import barrier
from lightning_eplb.parallel.fsdp1_parameters import spread_parameters
from lightning_eplb.parallel.parallelize import expert_layers
from tests.fidelity import TOLERANCE, ShufflePolicy, named_state
from tests.models import hugging_face_model, language_loss, optimizer_of, token_batches
from tests.workers import Workers

STEPS, SEQUENCES, CLIP = 6, 4, 0.5
SHUFFLED = ExpertPlacement([[7, 2, 5, 0, 3, 6, 1, 4], [4, 1, 6, 3, 0, 5, 2, 7]], 8, 2)
"""Of two layers of eight experts on two ranks."""


def batches() -> list[Tensor]:
    return list(token_batches(STEPS * SEQUENCES).split(SEQUENCES))


def reference(clip: bool) -> dict[str, Tensor]:
    """One process, the unmodified model: weights and optimizer state after all steps."""
    model = hugging_face_model("mixtral")
    optimizer = optimizer_of("adamw", model)
    for tokens in batches():
        language_loss(model, tokens).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach() for name, parameter in model.named_parameters()} | named_state(model, optimizer)


def largest_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    assert sorted(ours) == sorted(theirs)
    return max(float((ours[name] - tensor).abs().max()) for name, tensor in theirs.items())


class Loop:
    """A loop of one's own: experts are shuffled after every step."""

    def __init__(self, **balancer: Any) -> None:
        self.model = hugging_face_model("mixtral")
        parallelize_experts(self.model, num_redundant_experts=2)
        leave_experts_out_of_ddp(self.model)
        self.wrapped = DistributedDataParallel(self.model)
        self.optimizer = optimizer_of("adamw", self.model)
        self.balancer = ExpertLoadBalancer(self.wrapped, policy=ShufflePolicy(), step_interval=1, **balancer)
        self.balancer.optimizers = [self.optimizer]

    def run(self, start: int, stop: int, clip: bool = True) -> None:
        for tokens in batches()[start:stop]:
            language_loss(self.wrapped, tokens[dist.get_rank() :: dist.get_world_size()]).backward()
            if clip:
                clip_grad_norm_(self.wrapped, CLIP)
            self.balancer.before_optimizer_step()
            self.optimizer.step()
            self.balancer.step()
            self.optimizer.zero_grad()

    def state(self) -> dict[str, Any]:
        parts = {"model": self.model, "optimizer": self.optimizer, "balancer": self.balancer}
        return copy.deepcopy({name: part.state_dict() for name, part in parts.items()})

    def load(self, state: dict[str, Any]) -> None:
        for name in state:
            getattr(self, name).load_state_dict(state[name])


def go_back(use_async: bool) -> dict[str, Tensor]:
    """On every worker: save after three steps, two more, load, and three again."""
    loop = Loop(use_async=use_async)
    loop.run(0, 3)
    saved = loop.state()
    loop.run(3, 5)
    assert loop.balancer.num_rearrangements >= 2
    loop.load({name: saved[name] for name in ("model", "optimizer")})
    loop.run(3, STEPS)
    return logical_parameters(loop.wrapped) | named_state(loop.model, loop.optimizer)


@pytest.mark.parametrize("use_async", [False, True])
def test_own_loop_that_loads_its_state_trains_as_one_process(use_async: bool, workers: Workers) -> None:
    expected = reference(clip=True)
    for ours in workers.run(2, go_back, use_async):
        assert largest_difference(ours, expected) < TOLERANCE


def fabric_run(ranks: int, start: int, stop: int, source: str | None, target: str) -> dict[str, Tensor]:
    """On every worker: as in the docstring of ``ExpertLoadBalancer``."""
    strategy = DDPStrategy(cluster_environment=TorchElasticEnvironment(), process_group_backend="gloo")
    fabric = Fabric(accelerator="cpu", strategy=strategy if ranks > 1 else "auto", devices=ranks)
    fabric.launch()
    model = hugging_face_model("mixtral")
    parallelize_experts(model, num_redundant_experts=ranks)
    leave_experts_out_of_ddp(model)
    wrapped, optimizer = fabric.setup(model, optimizer_of("adamw", model))
    balancer = ExpertLoadBalancer(wrapped, [optimizer], policy=ShufflePolicy(start), step_interval=1)
    state: dict[str, Any] = {"model": wrapped, "optimizer": optimizer, "balancer": balancer}
    if source is not None:
        fabric.load(source, state)
        assert balancer.num_steps == start
        balancer.rearrange()
    for tokens in batches()[start:stop]:
        fabric.backward(language_loss(wrapped, tokens[fabric.global_rank :: ranks]))
        fabric.clip_gradients(wrapped, optimizer, max_norm=CLIP)
        optimizer.step()
        balancer.step()
        optimizer.zero_grad()
    assert ranks == 1 or balancer.last_rearrangement is not None
    fabric.save(target, state)
    return logical_parameters(wrapped) | named_state(model, optimizer)


@pytest.mark.parametrize("sizes", [(2, 1, 2), (2, 4)], ids=str)
def test_fabric_resumed_on_other_ranks_trains_as_one_process(
    sizes: tuple[int, ...], workers: Workers, tmp_path: Path
) -> None:
    expected, source, start = reference(clip=True), None, 0
    for i, ranks in enumerate(sizes):
        stop, target = STEPS * (i + 1) // len(sizes), str(tmp_path / f"{i}.ckpt")
        outcomes = workers.run(ranks, fabric_run, ranks, start, stop, source, target)
        source, start = target, stop
    for ours in outcomes:
        assert largest_difference(ours, expected) < TOLERANCE
    checkpoint = torch.load(source, weights_only=True)  # type: ignore[arg-type]
    hugging_face_model("mixtral").load_state_dict(checkpoint["model"])


def test_fabric_clip_gradients_of_other_model_is_unchanged() -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    linear = nn.Linear(2, 2)
    model, optimizer = fabric.setup(linear, torch.optim.SGD(linear.parameters(), lr=1.0))
    clip_fabric_by_global_norm([model, optimizer, linear])
    fabric.backward(model(torch.ones(1, 2)).sum())
    assert float(fabric.clip_gradients(model, optimizer, max_norm=0.5, norm_type=math.inf)) == 1.0  # type: ignore[arg-type]
    assert linear.weight.grad is not None
    assert float(linear.weight.grad.max()) == pytest.approx(0.5, abs=1e-5)


def alone_in(call: str, comes_after: float | None) -> tuple[list[str], str]:
    """On every worker: rank 1 comes later, or never; what rank 0 was told. Then all ranks call it."""
    loop = Loop()
    loop.run(0, 1)
    calls = {
        "model": loop.model.state_dict,
        "optimizer": loop.optimizer.state_dict,
        "parameters": lambda: logical_parameters(loop.model),
        "rearrange": loop.balancer.rearrange,
    }
    told, failure = [], ""
    with (
        warnings.catch_warnings(record=True) as caught,
        mock.patch.multiple(barrier, WARN_AFTER=timedelta(seconds=0.2), CPU_GROUP_TIMEOUT=timedelta(seconds=1.5)),
    ):
        warnings.simplefilter("always")
        if dist.get_rank() == 0 or comes_after is not None:
            time.sleep((comes_after or 0) * dist.get_rank())
            try:
                calls[call]()
            except RuntimeError as error:
                failure = str(error)
        told = [str(each.message) for each in caught if "every rank must" in str(each.message)]
    dist.barrier()
    calls[call]()
    return told, failure


ALONE = {
    "model": "state_dict() of a model gathers experts from all ranks",
    "optimizer": "state_dict() of an optimizer gathers the state of experts from all ranks",
    "parameters": "logical_parameters() gathers experts from all ranks",
    "rearrange": "rearrange() moves experts between ranks",
}


@pytest.mark.parametrize("call", ALONE)
def test_collective_call_on_one_rank_alone_raises_and_can_be_repeated(call: str, workers: Workers) -> None:
    words = f"{ALONE[call]}, so every rank must call it: rank 1 did not come within"
    (told, failure), nothing = workers.run(2, alone_in, call, None)
    assert told == [f"{words} 0.2 s; it raises after 1.5 s"]
    assert failure == f"{words} 1.5 s"
    assert nothing == ([], "")


def test_collective_call_with_late_rank_waits(workers: Workers) -> None:
    (told, failure), nothing = workers.run(2, alone_in, "model", 0.6)
    assert len(told) == 1
    assert failure == ""
    assert nothing == ([], "")


def other_optimizer_state() -> str:
    loop = Loop()
    loop.run(0, 1)
    if dist.get_rank() == 1:
        loop.optimizer.state.clear()
    with pytest.raises(ValueError, match="state=") as raised:
        loop.optimizer.state_dict()
    return str(raised.value)


def test_optimizer_state_dict_unequal_on_ranks_raises_on_all(workers: Workers) -> None:
    for message in workers.run(2, other_optimizer_state):
        assert message.startswith("state=AdamW with 8 tensors")
        assert "is not the same on rank 1 (AdamW with 0 tensors" in message


def wrapped_in(kind: str) -> nn.Module:
    """A model of two layers under a wrapper of torch's, with experts that have moved."""
    model = hugging_face_model("mixtral")
    if kind == "fsdp2":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("efsdp", "ep"))
        model = fully_shard_moe(model, mesh)
    else:
        parallelize_experts(model)
    if kind == "ddp":
        leave_experts_out_of_ddp(model)
        model = DistributedDataParallel(model)
    elif kind == "fsdp1":
        blocks = ModuleWrapPolicy({type(model.model.layers[0])})  # type: ignore[index, union-attr]
        model = FullyShardedDataParallel(
            model,
            auto_wrap_policy=blocks,
            sharding_strategy=ShardingStrategy.FULL_SHARD,
            device_id=torch.device("cpu"),
            use_orig_params=True,
            ignored_states=list(spread_parameters(model).values()),
        )
    ExpertLoadBalancer(model).rearrange(SHUFFLED)
    return model


RANKS = {"plain": 2, "ddp": 2, "fsdp1": 2, "fsdp2": 4}


def parameters_under(kind: str) -> dict[str, Tensor]:
    return logical_parameters(wrapped_in(kind))


@pytest.mark.parametrize("kind", RANKS)
def test_logical_parameters_under_each_strategy_equal_unmodified(kind: str, workers: Workers) -> None:
    expected = {name: parameter.detach() for name, parameter in hugging_face_model("mixtral").named_parameters()}
    for ours in workers.run(RANKS[kind], parameters_under, kind):
        assert largest_difference(ours, expected) == 0
        assert not any(tensor.requires_grad or type(tensor) is not Tensor for tensor in ours.values())


def test_logical_parameters_of_one_process_share_no_memory() -> None:
    model = hugging_face_model("mixtral")
    expected = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    ours = logical_parameters(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert largest_difference(ours, expected) == 0


def norm_under(kind: str, max_norm: float) -> tuple[float, float]:
    """On every worker: the norm before clipping, and the norm after, of the whole model."""
    model = wrapped_in(kind)
    ranks = dist.get_world_size()
    language_loss(model, batches()[0].repeat(ranks // 2, 1)[dist.get_rank() :: ranks]).backward()
    if kind == "plain":
        experts = {id(parameter) for _, module in expert_layers(model) for parameter in module.parameters()}
        for parameter in model.parameters():
            if id(parameter) not in experts and parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= ranks
    return float(clip_grad_norm_(model, max_norm)), float(clip_grad_norm_(model, math.inf))


@pytest.mark.parametrize("kind", RANKS)
def test_clip_grad_norm_under_each_strategy_uses_norm_of_whole_model(kind: str, workers: Workers) -> None:
    model = hugging_face_model("mixtral")
    language_loss(model, batches()[0]).backward()
    expected = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1))
    for before, after in workers.run(RANKS[kind], norm_under, kind, 0.1):
        assert before == pytest.approx(expected, abs=1e-12)
        assert after == pytest.approx(0.1, abs=1e-6)


def test_clip_grad_norm_with_other_norm_type_raises() -> None:
    with pytest.raises(ValueError, match=r"norm_type=inf is not supported .* Use 2\.0\."):
        clip_grad_norm_(hugging_face_model("mixtral"), 1.0, math.inf)


def test_clip_grad_norm_of_nonfinite_gradient_raises() -> None:
    model = nn.Linear(2, 2)
    model.weight.grad = torch.full((2, 2), math.inf)
    with pytest.raises(RuntimeError, match="the norm of all gradients is inf"):
        clip_grad_norm_(model, 1.0, error_if_nonfinite=True)


def left_out() -> tuple[list[str], list[str]]:
    loop = Loop()
    ignored = leave_experts_out_of_ddp(loop.model)
    ours = {id(parameter) for parameter in loop.wrapped._module_parameters}
    return ignored, [name for name, parameter in loop.model.named_parameters() if id(parameter) not in ours]


def test_leave_experts_out_of_ddp_returns_their_names(workers: Workers) -> None:
    names = [
        f"model.layers.{layer}.mlp.experts.{weight}" for layer in range(2) for weight in ("gate_up_proj", "down_proj")
    ]
    assert workers.run(2, left_out) == [(names, names)] * 2
    assert leave_experts_out_of_ddp(parallelize_experts(hugging_face_model("mixtral"))) == []


def not_left_out() -> str:
    model = DistributedDataParallel(parallelize_experts(hugging_face_model("mixtral")))
    with pytest.raises(RuntimeError) as raised:
        language_loss(model, batches()[0])
    return str(raised.value)


def test_ddp_with_experts_raises_and_names_remedy(workers: Workers) -> None:
    for message in workers.run(2, not_left_out):
        assert "call lightning_eplb.leave_experts_out_of_ddp(model) before you wrap the model" in message
