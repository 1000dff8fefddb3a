"""Prefetch of redundant weights: when they are sent, and that stale ones are never used."""

import gc
import weakref
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from lightning_eplb import ExpertLoadBalancer, ExpertPlacement, StaticPolicy, parallelize_experts
from lightning_eplb.parallel.all_to_all import AllToAllDispatcher
from lightning_eplb.parallel.row_exchange import RowExchange
from tests.parallel.test_redundant_experts import EXPERTS, HOT_RANK_ZERO, WIDTH, Experts
from tests.workers import Workers

LAYERS = 3
log: list[str] = []


class Stack(nn.Module):
    """Layers that are called in the order of ``path``."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Experts() for _ in range(LAYERS))

    def forward(self, hidden: Tensor, path: tuple[int, ...]) -> Tensor:
        index = torch.tensor(HOT_RANK_ZERO)[:, None]
        for layer in path:
            log.append(f"layer {layer}")
            hidden = hidden + 0.1 * self.layers[layer](hidden, index, torch.ones(len(index), 1, dtype=torch.float64))
        return hidden


def train(model: nn.Module, paths: list[tuple[int, ...]], balancer: ExpertLoadBalancer | None = None) -> list[Tensor]:
    """A step on each path, then what the last one computes; a path of which ``-1`` is the end is broken off."""
    optimizer, outputs = torch.optim.SGD(model.parameters(), lr=0.1), []
    for path in paths:
        hidden = torch.ones(len(HOT_RANK_ZERO), WIDTH, dtype=torch.float64)
        output = model(hidden, [layer for layer in path if layer >= 0])
        outputs.append(output.detach())
        if path[-1] >= 0:
            output.sum().backward()
        else:
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
        if balancer is not None:
            balancer.step()
    return outputs


def spread() -> tuple[nn.Module, ExpertLoadBalancer]:
    model = Stack()
    parallelize_experts(model, num_redundant_experts=2)
    balancer = ExpertLoadBalancer(model, policy=StaticPolicy())
    balancer.rearrange(ExpertPlacement(np.array([[0, 1, 2, 2, 3, 0]] * LAYERS), EXPERTS, 2))
    return model, balancer


def events(paths: list[tuple[int, ...]]) -> list[str]:
    """On every worker: when weights of redundant experts and tokens are sent, in the forward of the last path."""
    model, balancer = spread()
    start, dispatch = RowExchange.__init__, AllToAllDispatcher.dispatch

    def noted_start(self: RowExchange, *args: Any, **kwargs: Any) -> None:
        log.append("redundant")
        start(self, *args, **kwargs)

    def noted_dispatch(self: AllToAllDispatcher, *args: Any) -> Any:
        log.append("tokens")
        return dispatch(self, *args)

    train(model, paths[:-1], balancer)
    log.clear()
    with (
        torch.no_grad(),
        patch.object(RowExchange, "__init__", noted_start),
        patch.object(AllToAllDispatcher, "dispatch", noted_dispatch),
    ):
        model(torch.ones(len(HOT_RANK_ZERO), WIDTH, dtype=torch.float64), paths[-1])
    return log.copy()


def test_prefetch_in_second_forward_sends_next_layers_weights(workers: Workers) -> None:
    for seen in workers.run(2, events, [(0, 1, 2), (0, 1, 2)]):
        assert seen == [
            *("layer 0", "tokens", "redundant", "redundant"),  # its own and the next one's
            *("layer 1", "tokens", "redundant"),
            *("layer 2", "tokens"),
        ]


def test_prefetch_in_first_forward_is_off(workers: Workers) -> None:
    for seen in workers.run(2, events, [(0, 1)]):
        assert seen == ["layer 0", "tokens", "redundant", "layer 1", "tokens", "redundant"]


def outputs_of(paths: list[tuple[int, ...]]) -> list[Tensor]:
    model, balancer = spread()
    return train(model, paths, balancer)


@pytest.mark.parametrize(
    "paths",
    [
        [(0, 1, 2)] * 3,
        [(0, 1, 2), (0, 2), (0, 1, 2), (1, 2), (0, 2)],  # another layer follows than the one that was prefetched
        [(0, 1, 2), (0, -1), (1, 2), (0, -1), (0, 1)],  # broken off, the weights change, and it goes on behind
        [(0, 1), (1, 0), (0, 1, 1, 2)],
    ],
)
def test_prefetch_with_changing_paths_computes_as_unmodified(paths: list[tuple[int, ...]], workers: Workers) -> None:
    expected = train(Stack(), paths)
    for outputs in workers.run(2, outputs_of, paths):
        for ours, theirs in zip(outputs, expected, strict=True):
            assert float((ours - theirs).abs().max()) < 1e-12


class Checkpointed(nn.Module):
    """A layer whose matrix products are kept for the backward pass, all else being computed again."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Tensor) -> Any:
        return checkpoint(self.layer, *args, use_reentrant=False, context_fn=_keep_products)


def _keep_products() -> Any:
    def policy(_: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        kept = operation == torch.ops.aten.mm.default
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def outputs_with_kept_products(paths: list[tuple[int, ...]]) -> list[Tensor]:
    model, balancer = spread()
    first, *others = model.layers.children()  # type: ignore[union-attr, operator]
    model.layers = nn.ModuleList([first, *(Checkpointed(layer) for layer in others)])
    return train(model, paths, balancer)


def test_prefetch_under_selective_checkpointing_computes_as_unmodified(workers: Workers) -> None:
    paths = [(0, 1, 2)] * 3
    expected = train(Stack(), paths)
    for outputs in workers.run(2, outputs_with_kept_products, paths):
        for ours, theirs in zip(outputs, expected, strict=True):
            assert float((ours - theirs).abs().max()) < 1e-12


def output_of_changed_weights(change: str) -> float:
    """On every worker: a forward ends at layer 0, weights change, and the next begins at layer 1."""
    outputs = []
    for model, balancer in ((Stack(), None), spread()):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=change == "fused")
        if balancer is not None and change == "fused":  # which changes weights without a new version of them
            balancer.optimizers = [optimizer]
        hidden = torch.ones(len(HOT_RANK_ZERO), WIDTH, dtype=torch.float64)
        for path in [(0, 1, 2), (1, 2), (0,)]:
            model(hidden, path).sum().backward()
        if change == "load_state_dict":
            model.load_state_dict({name: 2 * tensor for name, tensor in model.state_dict().items()})
        else:
            optimizer.step()
        outputs.append(model(hidden, (1, 2)).detach())
    return float((outputs[0] - outputs[1]).abs().max())


@pytest.mark.parametrize("change", ["step", "fused", "load_state_dict"])
def test_prefetch_of_changed_weights_sends_them_again(change: str, workers: Workers) -> None:
    assert max(workers.run(2, output_of_changed_weights, change)) < 1e-12


def is_freed() -> list[bool]:
    """On every worker: whether layers of a model that nobody has are gone, before garbage in cycles is looked for."""
    model, balancer = spread()
    for _ in range(2):
        model(torch.ones(len(HOT_RANK_ZERO), WIDTH, dtype=torch.float64), (0, 1, 2))
    layers = [weakref.ref(layer) for layer in model.layers]  # type: ignore[attr-defined]
    gc.collect()
    gc.disable()
    try:
        del model, balancer
        return [layer() is None for layer in layers]
    finally:
        gc.enable()


def test_prefetch_after_model_is_deleted_frees_it(workers: Workers) -> None:
    for freed in workers.run(2, is_freed):
        assert all(freed)
