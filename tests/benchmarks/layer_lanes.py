"""Lanes of the layer benchmark: one MoE layer computed in several ways, on the same weights, tokens and routing.

Shape suffixes: ``T`` tokens, ``K`` top-k, ``L`` logical experts, ``n`` experts of a rank, ``D`` model width.
"""

import copy
import inspect
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import lightning_eplb
from lightning_eplb.parallel.discovery import find_experts
from lightning_eplb.parallel.dispatch import TokenDispatcher
from tests.benchmarks.earlier_package import EarlierPackage
from tests.benchmarks.lanes import memory, wait_for_all
from tests.benchmarks.models import Size, steered_model
from tests.benchmarks.textbook_layer import Products, TextbookExperts

try:
    from lightning_eplb.parallel.all_to_all import AllToAllDispatcher
except ImportError:
    AllToAllDispatcher = None
PARTS = {"one part": math.inf, "two parts": 0}
"""Bytes of tokens from which on they travel in two parts."""

REFERENCE = "transformers, one rank"
BEFORE = "ours, before"


class Batch(NamedTuple):
    """Tokens of this rank, their routing, and the gradient of the layer's output.

    Attributes:
        hidden: ``[T, D]``.
        index: ``[T, K]`` int64, even but for chance.
        weights: ``[T, K]``, each token's sum to 1.
        grad: ``[T, D]``.
    """

    hidden: Tensor
    index: Tensor
    weights: Tensor
    grad: Tensor

    @classmethod
    def draw(cls, size: Size, device: torch.device, dtype: torch.dtype) -> "Batch":
        """Draw a batch, another one on each rank."""
        generator = torch.Generator(device).manual_seed(rank())

        def normal() -> Tensor:
            return torch.randn(size.tokens, size.width, device=device, generator=generator).to(dtype)

        hidden, grad = normal(), normal()
        noise_TL = torch.rand(size.tokens, size.experts, device=device, generator=generator)
        weights, index = noise_TL.topk(size.top_k, dim=-1)
        return cls(hidden, index, (weights / weights.sum(dim=-1, keepdim=True)).to(dtype), grad)

    def leaves(self) -> tuple[Tensor, Tensor]:
        """Return hidden states and weights as tensors that get gradients of their own."""
        return self.hidden.detach().requires_grad_(), self.weights.detach().requires_grad_()


@dataclass
class Lane:
    """One way to compute the layer.

    Attributes:
        layer: ``layer(hidden, index, weights)``, or a function without arguments that is timed and nothing else.
        parameters: Expert parameters by name, ``[n, ...]`` each; empty for a function without arguments.
        experts: Logical expert of each of their rows, ``[n]``.
        gradient_scale: Factor of expert gradients over the sum of all ranks' gradients.
        active: Makes a context in which the lane must run.
        seconds: Of each turn on this rank.
        bytes: Most that a turn added to the memory of this rank.
    """

    layer: Callable[..., Any]
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    experts: Tensor | None = None
    gradient_scale: float = 1.0
    active: Callable[[], AbstractContextManager[None]] = nullcontext
    seconds: list[float] = field(default_factory=list)
    bytes: int = 0

    def take_turn(self, batch: Batch) -> None:
        """Run forward and backward, from all ranks' begin to this rank's end, and note time and memory."""
        device = batch.hidden.device
        hidden, weights = batch.leaves()
        self.drop_gradients()
        with self.active():
            before = memory(device)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            wait_for_all(device)
            start = time.perf_counter()
            if self.parameters:
                self.layer(hidden, batch.index, weights).backward(batch.grad)
            else:
                self.layer()
            if device.type == "cuda":
                torch.cuda.synchronize()
            self.seconds.append(time.perf_counter() - start)
        if device.type == "cuda":
            self.bytes = max(self.bytes, torch.cuda.max_memory_allocated() - before)

    def drop_gradients(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None

    def compute(self, batch: Batch) -> dict[str, Tensor]:
        """Return the output and all gradients, by name."""
        hidden, weights = batch.leaves()
        self.drop_gradients()
        with self.active():
            output = self.layer(hidden, batch.index, weights)
            output.backward(batch.grad)
        found = {"output": output, "hidden": hidden.grad, "weights": weights.grad}
        found |= {name: parameter.grad for name, parameter in self.parameters.items()}
        self.drop_gradients()
        return {name: tensor.detach() for name, tensor in found.items() if tensor is not None}


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def num_ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def make_lanes(size: Size, batch: Batch, earlier: EarlierPackage | None, in_parts: bool = False) -> dict[str, Lane]:
    """Make all lanes that this package, this transformers and the number of ranks allow.

    Args:
        size: Of the layer.
        batch: What the lanes will run on.
        earlier: This package at another commit.
        in_parts: Also make lanes whose all-to-all has one part, and two.
    """
    device = batch.hidden.device
    _, experts = next(find_experts(steered_model(size, device, batch.hidden.dtype)))
    over_ranks = dist.is_initialized()
    lanes = {"ours": _converted(experts, fused_experts=None if over_ranks else True)}
    if "fused_experts" in _known_options():
        lanes["ours, unfused"] = _converted(experts, fused_experts=False)
    if over_ranks and AllToAllDispatcher is not None:
        lanes["ours, all-to-all"] = _converted(experts, dispatcher=AllToAllDispatcher)
        lanes["ours, all-to-all, unfused"] = _converted(experts, dispatcher=AllToAllDispatcher, fused_experts=False)
    for name, bytes_in_parts in PARTS.items() if over_ranks and in_parts else ():
        base = AllToAllDispatcher or TokenDispatcher
        dispatcher = type("InParts", (base,), {"bytes_in_parts": bytes_in_parts})
        lanes[f"ours, all-to-all, {name}"] = _converted(experts, dispatcher=dispatcher)
    if earlier is not None:
        with earlier.active():
            lanes[BEFORE] = _converted(experts, earlier)
            lanes[BEFORE].active = earlier.active
    local = {name: _local(parameter).clone() for name, parameter in experts.named_parameters()}
    if over_ranks and (theirs := _their_expert_parallelism(experts, device)) is not None:
        lanes["transformers' EP"] = theirs
    if over_ranks:
        textbook = TextbookExperts(**local)
        lanes["textbook all-to-all"] = Lane(textbook, dict(textbook.named_parameters()), _local_experts(size))
    counts = torch.bincount(batch.index.flatten(), minlength=size.experts)
    if over_ranks:
        dist.all_reduce(counts)
    lanes["products alone"] = Lane(Products(**local, tokens_n=_local(counts)))
    return {REFERENCE: Lane(experts, dict(experts.named_parameters()), torch.arange(size.experts)), **lanes}


def _known_options() -> set[str]:
    return set(inspect.signature(lightning_eplb.parallelize_experts).parameters)


def _converted(experts: nn.Module, package: Any = lightning_eplb, **options: Any) -> Lane:
    """Convert a copy of ``experts`` by ``package``, with those of the options that it has."""
    holder = nn.ModuleDict({"experts": copy.deepcopy(experts)})
    given = {name: value for name, value in options.items() if name in _known_options() and package is lightning_eplb}
    package.parallelize_experts(holder, **given)
    package.ExpertLoadBalancer(holder, policy=package.StaticPolicy())  # counts; other policies compile
    module: Any = holder["experts"]
    rows = module.expert_layer.local_experts
    return Lane(module, dict(module.named_parameters()), rows, gradient_scale=1 / num_ranks())


def _their_expert_parallelism(experts: nn.Module, device: torch.device) -> Lane | None:
    """Make transformers' all-to-all over all ranks; ``None`` where the release has none, before 5.24."""
    try:
        from transformers.distributed.expert_parallel import AllToAllEP
    except ImportError:
        return None
    part: Any = copy.deepcopy(experts)
    rows = torch.arange(part.num_experts)
    part.num_experts //= num_ranks()
    part._is_expert_parallel = True
    for parameter in part.parameters():
        parameter.data = _local(parameter.data).clone()
    mesh = init_device_mesh(device.type, (num_ranks(), 1), mesh_dim_names=("ep", "tp"))
    return Lane(AllToAllEP(part, mesh["ep"], mesh["tp"]), dict(part.named_parameters()), _local(rows))


def _local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor of all experts."""
    return tensor.detach().chunk(num_ranks())[rank()]


def _local_experts(size: Size) -> Tensor:
    return _local(torch.arange(size.experts))


def largest_errors(lanes: dict[str, Lane], batch: Batch) -> dict[str, float]:
    """Compare outputs and all gradients of each lane with one rank's, whose expert gradients are summed over ranks.

    Returns:
        The largest relative error of each lane, ``|x - reference| / |reference|``, over all tensors and ranks.
    """
    reference = lanes[REFERENCE].compute(batch)
    for name in lanes[REFERENCE].parameters:
        reference[name] = reference[name].float()
        if dist.is_initialized():
            dist.all_reduce(reference[name])
    errors = {}
    for name, lane in lanes.items():
        if not lane.parameters or name == REFERENCE:
            continue
        assert lane.experts is not None
        found, experts = lane.compute(batch), lane.experts.to(batch.hidden.device)
        each = []
        for key, expected in reference.items():
            is_local = key in lane.parameters
            rows = experts if is_local else torch.arange(len(expected), device=experts.device)
            each.append(_error(found[key], expected, rows, lane.gradient_scale if is_local else 1.0))
        errors[name] = _largest(each, batch.hidden.device)
    return errors


def _error(found: Tensor, expected: Tensor, rows: Tensor, scale: float) -> float:
    """Return ``|found - scale * expected[rows]| / |scale * expected[rows]|``, or infinity where it is not a number."""
    if found.shape != (len(rows), *expected.shape[1:]):
        return float("inf")
    error, norm = torch.zeros(2, dtype=torch.float64, device=found.device)
    for part, part_rows in zip(found.chunk(16), rows.chunk(16), strict=True):  # whole tensors may not fit once more
        exact = scale * expected[part_rows].float()
        error += (part.float() - exact).square().sum()
        norm += exact.square().sum()
    return (error / norm).sqrt().nan_to_num(nan=float("inf")).item()


def _largest(values: Sequence[float], device: torch.device) -> float:
    largest = torch.tensor(max(values), dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest.item()
