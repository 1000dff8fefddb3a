"""Direct dispatch on the CPU: interpreted kernels write into memory that processes share."""

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_eplb import ExpertLoadBalancer, ExpertPlacement, StaticPolicy, parallelize_experts
from lightning_eplb.parallel.parallelize import expert_layers
from lightning_eplb.parallel.symmetric_buffers import SymmetricBuffers
from tests.parallel.shared_memory import CPUDirectDispatcher
from tests.parallel.test_extra_arguments import difference as difference_with_arguments
from tests.parallel.test_extra_arguments import with_all
from tests.parallel.test_forward import EXPERTS, WIDTH, compare, largest, layer, routing, summed
from tests.workers import Workers

pytest.importorskip("triton", reason="the kernels are Triton's")


class CountingDispatcher(CPUDirectDispatcher):
    """Counts the batches of this process that were dispatched directly."""

    batches = 0

    def dispatch(self, *args: Any) -> Any:
        assert self.is_direct
        CountingDispatcher.batches += 1
        return super().dispatch(*args)


def compared(tokens_of_rank: Callable[[int], int], redundant: int = 0, **settings: Any) -> float:
    before = CountingDispatcher.batches
    found = compare(redundant, tokens_of_rank, dispatcher=CountingDispatcher, **settings)
    assert CountingDispatcher.batches > before or not any(map(tokens_of_rank, range(dist.get_world_size())))
    return found


REDUNDANCY = pytest.mark.parametrize(("redundant", "redundancy"), [(0, "window"), (4, "window"), (4, "batch")])


def ragged(redundant: int, redundancy: str, top_k: int, name: str) -> float:
    return compared(lambda rank: 7 + 4 * rank, redundant, redundancy=redundancy, top_k=top_k, name=name)


@REDUNDANCY
@pytest.mark.parametrize(("top_k", "name"), [(1, "mixtral"), (3, "gpt_oss")])
def test_direct_dispatch_with_unequal_token_counts_computes_as_unmodified(
    redundant: int, redundancy: str, top_k: int, name: str, workers: Workers
) -> None:
    assert max(workers.run(2, ragged, redundant, redundancy, top_k, name)) < 1e-12


def four_ranks(redundant: int, redundancy: str) -> float:
    return compared(lambda rank: 3 * rank, redundant, redundancy=redundancy)


@REDUNDANCY
def test_direct_dispatch_with_a_rank_without_tokens_computes_as_unmodified(
    redundant: int, redundancy: str, workers: Workers
) -> None:
    assert max(workers.run(4, four_ranks, redundant, redundancy)) < 1e-12


def two_experts(redundant: int) -> float:
    return compared(lambda rank: 6, redundant, experts=range(2, 4))


@pytest.mark.parametrize("redundant", [0, 2])
def test_direct_dispatch_with_ranks_that_compute_nothing_computes_as_unmodified(
    redundant: int, workers: Workers
) -> None:
    assert max(workers.run(2, two_experts, redundant)) < 1e-12


def hooked_on_one_rank() -> float:
    """Difference of gradients of experts where rank 0 keeps the module's own forward and rank 1 fuses."""
    original, converted = layer(), layer()
    holder = nn.ModuleDict({"experts": converted})
    parallelize_experts(holder, num_redundant_experts=2, fused_experts=True, dispatcher=CountingDispatcher)
    (expert_layer, _), *_ = expert_layers(holder)
    slots = np.arange(EXPERTS).reshape(2, -1)
    slots = np.concatenate((slots, [[EXPERTS - 1], [0]]), axis=1)  # each rank computes an expert of the other
    expert_layer.set_placement(ExpertPlacement(slots.reshape(1, -1), EXPERTS, 2))
    if dist.get_rank() == 0:
        converted.act_fn.register_forward_hook(lambda *_: None)  # type: ignore[operator]
    for module in (original, converted):
        module(*routing(9, 2)).sum().backward()
    assert (expert_layer.fused_choice.form_for(converted, list(converted.parameters()), False) is None) == (
        dist.get_rank() == 0
    )
    expected = {name: grad / 2 for name, grad in summed(original).items()}
    rows = expert_layer.local_experts
    return max(largest(p.grad, expected[name][rows]) for name, p in converted.named_parameters())


def test_fused_on_one_rank_only_has_the_gradients_of_redundant_experts(workers: Workers) -> None:
    assert max(workers.run(2, hooked_on_one_rank)) < 1e-12


class WiderExperts(nn.Module):
    """Experts whose outputs are wider than hidden states."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.num_experts = EXPERTS
        self.weight = nn.Parameter(torch.randn(EXPERTS, WIDTH, 3 * WIDTH, dtype=torch.float64))

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        output = hidden.new_zeros(len(hidden), self.weight.shape[-1])
        for expert in range(self.num_experts):
            token, k = torch.where(top_k_index == expert)
            output = output.index_add(0, token, hidden[token] @ self.weight[expert] * top_k_weights[token, k, None])
        return output


def wider_outputs() -> float:
    original, converted = WiderExperts(), WiderExperts()
    parallelize_experts(nn.ModuleDict({"experts": converted}), dispatcher=CountingDispatcher)
    hidden, index, weights = routing(6, 2)
    results = []
    for module in (original, converted):
        output = module(x := hidden.clone().requires_grad_(), index, weights)
        results.append((output.detach(), *torch.autograd.grad(output.square().sum(), x)))
    return max(map(largest, *results))


def test_outputs_wider_than_hidden_states(workers: Workers) -> None:
    assert max(workers.run(2, wider_outputs)) < 1e-9


def no_token() -> float:
    return compared(lambda rank: 0)


def test_direct_dispatch_without_tokens_on_any_rank_computes_as_unmodified(workers: Workers) -> None:
    assert max(workers.run(2, no_token)) == 0.0


def checkpointed(reentrant: bool, redundant: int) -> float:
    def run(module: nn.Module, *args: Tensor) -> Tensor:
        return checkpoint(module, *args, use_reentrant=reentrant)  # type: ignore[return-value]

    return compared(lambda rank: 9 + 3 * rank, redundant, run=run)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("redundant", [0, 2])
def test_direct_dispatch_under_checkpointing_computes_as_unmodified(
    reentrant: bool, redundant: int, workers: Workers
) -> None:
    assert max(workers.run(2, checkpointed, reentrant, redundant)) < 1e-12


def two_groups() -> float:
    group, _ = dist.new_subgroups(2)
    return compared(lambda rank: 3 + rank, 2, ep_group=group)


def test_direct_dispatch_in_two_ep_groups_computes_as_unmodified(workers: Workers) -> None:
    assert max(workers.run(4, two_groups)) < 1e-12


def with_extra_arguments() -> float:
    return difference_with_arguments(with_all, (9, 5), "window", CountingDispatcher)


def test_direct_dispatch_with_rows_of_arguments_computes_as_unmodified(workers: Workers) -> None:
    assert max(workers.run(2, with_extra_arguments)) < 1e-12


def spread(*names: str) -> list[nn.Module]:
    """Layers of one model, with direct dispatch and new buffers."""
    holder = nn.ModuleDict({name: layer() for name in names})
    parallelize_experts(holder, dispatcher=CountingDispatcher)
    layers = list(holder.values())
    expert_groups(layers[0]).shared.clear()
    return layers


def masked_choices(no_expert: int) -> float:
    original, (converted,) = layer(), spread("experts")
    hidden, index, weights = routing(6, 2)
    weights.requires_grad_()
    mask = torch.tensor([[False, True], [True, True]] * 3)
    output = converted(hidden, index.masked_fill(mask, no_expert), weights)
    (gradient,) = torch.autograd.grad(output.sum(), weights)
    assert (gradient[mask] == 0).all()
    assert (gradient[~mask] != 0).all()
    return largest(output.detach(), original(hidden, index, weights.detach().masked_fill(mask, 0.0)).detach())


@pytest.mark.parametrize("no_expert", [EXPERTS, -1])
def test_direct_dispatch_with_ids_of_no_expert_drops_them(no_expert: int, workers: Workers) -> None:
    assert max(workers.run(2, masked_choices, no_expert)) < 1e-12


def longer_batches() -> tuple[float, list[int]]:
    """Batches of one rank that get longer than the buffers, one of them between a forward and its backward pass."""
    original, (converted,) = layer(), spread("experts")
    errors, capacities = [], []
    kept = []
    with patch("lightning_eplb.parallel.symmetric_buffers.CAPACITY_STEP", 2):
        for tokens in (3, 6, 5, 9):
            hidden, index, weights = routing(tokens if dist.get_rank() else 2, 2, seed=tokens)
            pair = [hidden.clone().requires_grad_() for _ in range(2)]
            kept.append((pair, [m(x, index, weights) for m, x in zip((original, converted), pair, strict=True)]))
            capacities.append(buffers_of(converted).layout.capacity)
    for pair, outputs in kept:
        errors.append(largest(outputs[0].detach(), outputs[1].detach()))
        for output in outputs:
            output.square().sum().backward()
        errors.append(largest(pair[0].grad, pair[1].grad))
    return max(errors), capacities


def test_direct_dispatch_with_longer_batches_grows_buffers(workers: Workers) -> None:
    for error, capacities in workers.run(2, longer_batches):
        assert error < 1e-12
        assert capacities == [4, 6, 6, 10]


def without_memory() -> tuple[float, bool]:
    """No memory for longer batches on one rank: all go by all-to-all from then on."""
    original, (converted,) = layer(), spread("experts")
    make = CPUDirectDispatcher.memory

    def fails(num_bytes: int, device: torch.device) -> Any:
        if dist.get_rank() == 1:
            raise RuntimeError("out of memory")
        return make(num_bytes, device)

    errors = []
    for tokens in (3, 300, 9):
        hidden, index, weights = routing(tokens, 2, seed=tokens)
        ours = hidden.clone().requires_grad_()
        theirs = hidden.clone().requires_grad_()
        output, expected = converted(ours, index, weights), original(theirs, index, weights)
        patch.object(buffers_of(converted), "_make", fails).start()
        output.square().sum().backward()
        expected.square().sum().backward()
        errors += [largest(output.detach(), expected.detach()), largest(ours.grad, theirs.grad)]
    patch.stopall()
    expert_groups(converted).shared.clear()
    return max(errors), converted.expert_layer.dispatcher.is_direct  # type: ignore[union-attr]


def expert_groups(converted: nn.Module) -> Any:
    return converted.expert_layer.groups  # type: ignore[union-attr]


def buffers_of(converted: nn.Module) -> SymmetricBuffers:
    return next(value for value in expert_groups(converted).shared.values() if isinstance(value, SymmetricBuffers))


def test_direct_dispatch_on_rank_without_memory_falls_back_on_all_ranks(workers: Workers) -> None:
    for error, is_direct in workers.run(2, without_memory):
        assert error < 1e-12
        assert not is_direct


def in_one_block(reentrant: bool) -> float:
    """Two layers in one checkpointed block: recomputed in order, then backward in reverse."""
    first, second = layer(), layer()
    ours = spread("first", "second")
    inputs = [routing(5, 2, seed=seed) for seed in range(2)]

    def block(layers: list[nn.Module], hidden: Tensor) -> Tensor:
        for module, (_, index, weights) in zip(layers, inputs, strict=True):
            hidden = hidden + module(hidden, index, weights)
        return hidden

    found = []
    for layers in ([first, second], ours):
        hidden = inputs[0][0].clone().requires_grad_()
        output = checkpoint(block, layers, hidden, use_reentrant=reentrant)
        assert isinstance(output, Tensor)
        output.square().sum().backward()
        found.append((output.detach(), hidden.grad))
    return max(largest(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_direct_dispatch_of_two_layers_in_one_checkpoint_computes_as_unmodified(
    reentrant: bool, workers: Workers
) -> None:
    assert max(workers.run(2, in_one_block, reentrant)) < 1e-12


def looped_and_accumulated() -> float:
    """One layer called twice in a forward pass, gradients of two of them summed, and an evaluation between."""
    original, (converted,) = layer(), spread("experts")
    found = []
    for module in (original, converted):
        hidden, index, weights = routing(5, 2)
        hidden.requires_grad_()
        losses = []
        for _ in range(2):
            losses.append(module(module(hidden, index, weights), index, weights).square().sum())
            with torch.inference_mode():
                module(hidden, index, weights)
        for loss in losses:
            loss.backward()
        found.append(hidden.grad)
    return largest(*found)


def test_direct_dispatch_in_loops_accumulation_and_inference_mode_computes_as_unmodified(workers: Workers) -> None:
    assert max(workers.run(2, looped_and_accumulated)) < 1e-12


def other_layers() -> str:
    first, second = spread("first", "second")
    hidden, index, weights = routing(5, 2)
    first(hidden, index, weights)
    second(hidden, index, weights)
    try:
        (second if dist.get_rank() else first)(hidden, index, weights)
    except RuntimeError as error:
        return str(error)
    return ""


def test_direct_dispatch_of_different_layers_raises_with_both_names(workers: Workers) -> None:
    zero, one = workers.run(2, other_layers)
    assert "of EP rank 0 is the dispatch of first, and exchange 5 of EP rank 1 is the dispatch of second" in zero
    assert "of EP rank 1 is the dispatch of second, and exchange 5 of EP rank 0 is the dispatch of first" in one


def other_layers_with_redundant_experts() -> str:
    holder = nn.ModuleDict({name: layer() for name in ("first", "second")})
    parallelize_experts(holder, num_redundant_experts=2, dispatcher=CountingDispatcher)
    expert_groups(holder["first"]).shared.clear()
    placement = ExpertPlacement(np.array([[0, 1, 2, 3, 4, 4, 5, 6, 7, 0]] * 2), EXPERTS, 2)
    ExpertLoadBalancer(holder, policy=StaticPolicy()).rearrange(placement)
    hidden, index, weights = routing(5, 2)
    try:
        for step in range(3):
            turn = list(holder.values())
            if step == 1 and dist.get_rank():
                turn.reverse()
            for module in turn:
                module(hidden, index, weights)
    except RuntimeError as error:
        return str(error)
    return ""


def test_direct_dispatch_of_different_layers_with_redundant_experts_raises_with_both_names(workers: Workers) -> None:
    zero, one = workers.run(2, other_layers_with_redundant_experts)
    assert "of EP rank 0 is the dispatch of first, and exchange 5 of EP rank 1 is the dispatch of second" in zero
    assert "of EP rank 1 is the dispatch of second, and exchange 5 of EP rank 0 is the dispatch of first" in one


def other_order_of_backward_passes() -> str:
    first, second = spread("first", "second")
    hidden, index, weights = routing(5, 2)
    outputs = [module(hidden.clone().requires_grad_(), index, weights).sum() for module in (first, second)]
    for output in outputs if dist.get_rank() else outputs[::-1]:
        output.backward()
    try:
        first(hidden, index, weights)
    except RuntimeError as error:
        return str(error)
    return ""


def test_direct_dispatch_after_backward_in_another_order_raises_in_next_forward(workers: Workers) -> None:
    zero, _ = workers.run(2, other_order_of_backward_passes)
    assert "is the backward pass of dispatch of second, and exchange" in zero
    assert "of EP rank 1 is the backward pass of dispatch of first. All ranks must call the same layers" in zero
