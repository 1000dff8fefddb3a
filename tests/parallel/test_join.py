"""Layers that ranks call unequally often, without a trainer."""

import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_eplb import parallelize_experts
from lightning_eplb.parallel.join import ExpertJoin
from lightning_eplb.parallel.parallelize import expert_layers
from tests.models import hugging_face_model
from tests.parallel.test_forward import WIDTH, routing
from tests.workers import Workers


def layers() -> nn.ModuleList:
    """Three layers' experts, the same weights in every process."""
    model = hugging_face_model("mixtral", layers=3)
    return nn.ModuleList(module for module in model.modules() if type(module).__name__.endswith("Experts"))


def differences(calls_of_rank: tuple[list[int], ...], dtype: torch.dtype, inference: bool) -> list[float]:
    """Of the outputs of the layers that each rank calls, in order, from those of the unmodified modules."""
    original, converted = layers().to(dtype), layers().to(dtype)
    parallelize_experts(converted, num_redundant_experts=2)
    found = list(expert_layers(converted))
    named: list[Any] = [(layer.name, layer.num_logical_experts, module) for layer, module in found]
    join = ExpertJoin(named, found[0][0].groups, torch.device("cpu"))
    for layer, _ in found:
        layer.set_join(join)
    outputs: list[tuple[Tensor, Tensor]] = []
    with torch.inference_mode(inference), torch.no_grad():
        for number, index in enumerate(calls_of_rank[dist.get_rank()]):
            hidden, experts, weights = routing(3 + number, 2, seed=number)
            inputs = hidden.to(dtype), experts, weights.to(dtype)
            outputs.append((converted[index](*inputs), original[index](*inputs)))
            if number == 2:
                join.pause()
        join.finish()
    return [float((ours - theirs).abs().max()) for ours, theirs in outputs]


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize(
    "calls",
    [
        ([0, 1, 2, 0, 1, 2], [0, 1, 2]),
        ([], [0, 1, 2]),
        ([0, 2, 1, 1], [2, 0, 0, 1, 2]),
        ([0, 1], [0, 1, 2, 2, 0]),  # rank 1 pauses when rank 0 is done
        ([], []),
    ],
)
def test_join_with_uneven_calls_equals_unmodified(
    calls: tuple[list[int], list[int]], inference: bool, workers: Workers
) -> None:
    for rank, found in enumerate(workers.run(2, differences, calls, torch.float64, inference)):
        assert len(found) == len(calls[rank])
        assert max(found, default=0.0) < 1e-12


def test_join_without_own_call_computes_in_dtype_of_call(workers: Workers) -> None:
    for found in workers.run(2, differences, ([0, 1, 2], []), torch.bfloat16, False):
        assert max(found, default=0.0) < 1e-2


def with_gradients() -> str:
    model = parallelize_experts(layers())
    ((layer, module), *_) = expert_layers(model)
    join = ExpertJoin([("experts", 8, module)], layer.groups, torch.device("cpu"))  # type: ignore[list-item]
    layer.set_join(join)
    inputs = torch.ones(1, WIDTH, dtype=torch.float64), torch.tensor([[0]]), torch.ones(1, 1)
    call = functools.partial(module, *inputs) if dist.get_rank() == 0 else join.finish
    with pytest.raises(RuntimeError, match=r"experts was called with gradients enabled while EP ranks \[1\] did not"):
        call()
    return "raised"


def test_join_of_call_with_gradients_raises_on_all_ranks(workers: Workers) -> None:
    assert workers.run(2, with_gradients) == ["raised", "raised"]
