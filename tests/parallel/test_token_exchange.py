"""Tokens in two parts: one travels while the other is computed, forward and backward."""

import itertools
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from lightning_eplb import parallelize_experts
from lightning_eplb.parallel.all_to_all import AllToAllDispatcher
from lightning_eplb.parallel.token_exchange import TokenExchange
from tests.workers import Workers

EXPERTS, WIDTH, TOKENS = 8, 6, 24

log: list[str] = []


class _Noted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        log.append("compute")
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        log.append("compute")
        return grads[0]


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_experts = EXPERTS
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH, generator=generator, dtype=torch.float64))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        rows = _Noted.apply(hidden_states)
        experts = self.weight[top_k_index[:, 0]]
        return torch.einsum("td,tdw->tw", rows, experts) * top_k_weights


class HalvesDispatcher(AllToAllDispatcher):
    bytes_in_parts = 0


def spread(dispatcher: type[AllToAllDispatcher] = HalvesDispatcher) -> nn.Module:
    holder = nn.ModuleDict({"experts": Experts()})
    parallelize_experts(holder, dispatcher=dispatcher)
    return holder["experts"]


def run(experts: nn.Module, with_gradient: bool = True) -> tuple[Tensor, Tensor]:
    """Return what is put in and what comes out; on every rank the same."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator, dtype=torch.float64).requires_grad_(with_gradient)
    index = torch.randint(EXPERTS, (TOKENS, 1), generator=generator)
    return hidden, experts(hidden, index, torch.ones(TOKENS, 1, dtype=torch.float64))


def order_of_events() -> tuple[list[str], list[str]]:
    """On every worker: what happened in the forward, and what in the backward pass."""
    experts = spread()

    def noted(name: str) -> Any:
        method = getattr(TokenExchange, name)

        def call(self: TokenExchange, *args: Any) -> Any:
            parts = args[1] if name == "send_parts" else args[:1]
            log.append(" ".join([name, *map(str, parts)]))
            return method(self, *args)

        return patch.object(TokenExchange, name, call)

    log.clear()
    with noted("send_parts"), noted("receive_part"), noted("send_part_back"), noted("receive_back"):
        _, output = run(experts)
        forward = log.copy()
        log.clear()
        output.sum().backward()
    return forward, log.copy()


def test_token_exchange_in_two_parts_overlaps_with_compute(workers: Workers) -> None:
    def in_turn(*parts: int) -> list[str]:
        each = ((f"receive_part {part}", "compute", f"send_part_back {part}") for part in parts)
        return [" ".join(["send_parts", *map(str, parts)]), *itertools.chain(*each), "receive_back"]

    for forward, backward in workers.run(2, order_of_events):
        assert forward == in_turn(0, 1)
        assert backward == in_turn(1, 0)


def difference(frozen: str, passes: int) -> float:
    """Between a converted layer and the original, in output and gradients."""
    original, converted = Experts(), spread()
    seen = []
    for experts in (original, converted):
        experts.requires_grad_(frozen != "weights")
        hidden, output = run(experts, with_gradient=frozen != "hidden")
        for _ in range(passes):
            output.square().sum().backward(retain_graph=True)
        seen.append((output, hidden.grad, next(experts.parameters()).grad))
    rows = converted.expert_layer.local_experts  # type: ignore[union-attr, operator]
    outputs, inputs, weights = zip(*seen, strict=True)
    differences = [outputs[1] - outputs[0]]
    if frozen != "hidden":
        differences.append(inputs[1] - inputs[0])
    if frozen != "weights":  # all ranks had the same tokens, and losses are averaged over ranks
        differences.append(weights[1] - weights[0][rows])
    return max(float(tensor.abs().max()) for tensor in differences)


@pytest.mark.parametrize("frozen", ["nothing", "weights", "hidden"])
@pytest.mark.parametrize("passes", [1, 2])
def test_token_exchange_of_frozen_inputs_has_gradients_of_unmodified(
    frozen: str, passes: int, workers: Workers
) -> None:
    assert max(workers.run(2, difference, frozen, passes)) < 1e-12


def gradients_of_gradients() -> tuple[float, str]:
    """How far first gradients are from the original's if they are to have gradients, and what becomes of these."""
    original, converted = Experts(), spread()
    first = []
    for experts in (original, converted):
        hidden, output = run(experts)
        parameters = [hidden, *experts.parameters()]
        first.append(torch.autograd.grad(output.square().sum(), parameters, create_graph=True))
    with pytest.raises(RuntimeError) as error:
        first[1][0].sum().backward()
    rows = converted.expert_layer.local_experts  # type: ignore[union-attr, operator]
    differences = first[1][0] - first[0][0], first[1][1] - first[0][1][rows]
    return max(float(tensor.abs().max()) for tensor in differences), str(error.value)


def test_token_exchange_differentiated_twice_raises(workers: Workers) -> None:
    """They would need the exchanges once more; without them they came out wrong, in silence."""
    for difference, message in workers.run(2, gradients_of_gradients):
        assert difference < 1e-12
        assert "once_differentiable" in message


def parts_by_bytes() -> list[int]:
    """On every worker: in how many parts tokens travel, where half of the width is enough for two, and where not."""
    counts, send = [], AllToAllDispatcher.dispatch
    for limit in (TOKENS * WIDTH * 8 // 2, TOKENS * WIDTH * 8 * 4):
        with (
            patch.object(HalvesDispatcher, "bytes_in_parts", limit),
            patch.object(HalvesDispatcher, "dispatch", autospec=True, side_effect=send) as dispatch,
        ):
            run(spread())
            self, batch, routing, _ = dispatch.call_args.args
            counts.append(len(self.parts(batch, routing)))
    return counts


def test_token_exchange_of_few_bytes_is_in_one_part(workers: Workers) -> None:
    assert workers.run(2, parts_by_bytes) == [[2, 1]] * 2
