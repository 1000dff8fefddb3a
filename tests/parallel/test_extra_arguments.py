"""Extra arguments of the experts' call, against the unmodified module in one process."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from lightning_eplb import ExpertLoadBalancer, leave_experts_out_of_ddp, parallelize_experts
from lightning_eplb.parallel.dispatch import TokenDispatcher
from lightning_eplb.parallel.parallelize import expert_layers
from tests.fidelity import ShufflePolicy
from tests.parallel.test_forward import GatheringDispatcher, HalvesDispatcher, LabelledDispatcher, largest
from tests.workers import Workers

EXPERTS, WIDTH, HIDDEN = 8, 6, 5


class Experts(nn.Module):
    """Takes a gate for each token, the kind of each, a scale and a number."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.num_experts = EXPERTS
        self.up = nn.Parameter(torch.randn(EXPERTS, WIDTH, HIDDEN, generator=generator, dtype=torch.float64))
        self.down = nn.Parameter(torch.randn(EXPERTS, HIDDEN, WIDTH, generator=generator, dtype=torch.float64))

    def forward(
        self,
        hidden: Tensor,
        index: Tensor,
        weights: Tensor,
        gate: Tensor | None = None,
        kind: Tensor | None = None,
        *,
        scale: Tensor | None = None,
        power: float = 1.0,
        note: Any = None,
    ) -> Tensor:
        output = torch.zeros_like(hidden)
        for expert in range(self.num_experts):
            token, k = torch.where(index == expert)
            x = hidden[token]
            if gate is not None:
                x = x * gate[token]
            if kind is not None:
                x = torch.where(kind[token, None], x, -x)
            inner = torch.tanh(x @ self.up[expert])
            if scale is not None:
                inner = inner * scale
            y = inner.abs().pow(power) @ self.down[expert]
            output = output.index_add(0, token, y * weights[token, k, None])
        return output


def routing(tokens: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed + 100 * dist.get_rank())
    weights, index = torch.rand(tokens, EXPERTS, generator=generator, dtype=torch.float64).topk(2)
    return {
        "hidden": torch.randn(tokens, WIDTH, generator=generator, dtype=torch.float64),
        "index": index,
        "weights": weights,
        "gate": torch.rand(tokens, WIDTH, generator=generator, dtype=torch.float64),
        "kind": torch.rand(tokens, generator=generator) < 0.5,
    }


def difference(
    run: Callable[..., Tensor],
    tokens_of_rank: tuple[int, int] = (9, 5),
    redundancy: Any = "window",
    dispatcher: type[TokenDispatcher] | None = None,
) -> float:
    """The largest of outputs and gradients, experts moving and copied, over three steps."""
    original, converted = Experts(), Experts()
    scales = [torch.full((HIDDEN,), 1.5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    holder = nn.ModuleDict({"experts": converted})
    parallelize_experts(holder, num_redundant_experts=4, dispatcher=dispatcher)
    (layer, _), *_ = expert_layers(holder)
    balancer = ExpertLoadBalancer(
        holder, policy=ShufflePolicy(), step_interval=1, redundancy=redundancy, min_tokens_per_copy=1
    )
    found, ranks = [], dist.get_world_size()
    for step in range(3):
        given = routing(tokens_of_rank[dist.get_rank()], step)
        grads = []
        for module, scale in zip((original, converted), scales, strict=True):
            module.zero_grad()
            scale.grad = None
            leaves = {k: v.clone().requires_grad_(v.is_floating_point()) for k, v in given.items()}
            output = run(module, scale, **leaves)
            (output * torch.arange(WIDTH)).sum().backward()
            found_here = {k: v.grad for k, v in leaves.items() if v.grad is not None}
            grads.append((output, found_here, scale.grad, {k: p.grad for k, p in module.named_parameters()}))
        (theirs, their_inputs, their_scale, their_weights), (ours, our_inputs, our_scale, our_weights) = grads
        found.append(largest(ours, theirs))
        assert their_inputs.keys() == our_inputs.keys()
        found += [largest(our_inputs[name], grad) for name, grad in their_inputs.items()]
        assert (their_scale is None) == (our_scale is None)
        if their_scale is not None and our_scale is not None:  # averaged over ranks by DDP, each is its share
            for grad in (their_scale, our_scale):
                dist.all_reduce(grad)
            found.append(largest(our_scale, their_scale))
        for name, grad in their_weights.items():
            assert grad is not None
            dist.all_reduce(grad)
            found.append(largest(our_weights[name], grad[layer.local_experts] / ranks))
        balancer.step()
    assert balancer.num_rearrangements == 3
    return max(found)


def with_all(
    module: nn.Module, scale: Tensor, hidden: Tensor, index: Tensor, weights: Tensor, **rows: Tensor
) -> Tensor:
    return module(hidden, index, weights, rows["gate"], rows["kind"], scale=scale, power=2.0)


def with_gate(
    module: nn.Module, scale: Tensor, hidden: Tensor, index: Tensor, weights: Tensor, **rows: Tensor
) -> Tensor:
    return module(hidden, index, weights, gate=rows["gate"])


def with_frozen_tokens(module: nn.Module, scale: Tensor, **given: Tensor) -> Tensor:
    return with_all(module, scale, **given | {"hidden": given["hidden"].detach()})


def checkpointed(
    module: nn.Module, scale: Tensor, hidden: Tensor, index: Tensor, weights: Tensor, **rows: Tensor
) -> Tensor:
    gate, kind = rows["gate"], rows["kind"]
    return checkpoint(module, hidden, index, weights, gate, kind, scale=scale, use_reentrant=False)  # type: ignore


def reentrant(
    module: nn.Module, scale: Tensor, hidden: Tensor, index: Tensor, weights: Tensor, **rows: Tensor
) -> Tensor:
    return checkpoint(module, hidden, index, weights, rows["gate"], rows["kind"], use_reentrant=True)  # type: ignore


@pytest.mark.parametrize("redundancy", ["window", "batch"])
@pytest.mark.parametrize("run", [with_all, with_gate, with_frozen_tokens, checkpointed, reentrant])
def test_extra_arguments_on_two_ranks_compute_the_same(
    run: Callable[..., Tensor], redundancy: str, workers: Workers
) -> None:
    assert max(workers.run(2, difference, run, (9, 5), redundancy)) < 1e-12


def test_extra_arguments_with_a_rank_without_tokens_compute_the_same(workers: Workers) -> None:
    assert max(workers.run(2, difference, with_all, (9, 0))) < 1e-12


@pytest.mark.parametrize("dispatcher", [GatheringDispatcher, LabelledDispatcher, HalvesDispatcher])
def test_extra_arguments_with_other_dispatcher_compute_the_same(
    dispatcher: type[TokenDispatcher], workers: Workers
) -> None:
    assert max(workers.run(2, difference, with_all, (9, 5), "window", dispatcher)) < 1e-12


def refusal(given: Callable[[int, int], dict[str, Any]], tokens_of_rank: tuple[int, int] = (9, 5)) -> str:
    """On every worker: how a call with further arguments is refused."""
    converted = Experts()
    parallelize_experts(nn.ModuleDict({"experts": converted}))
    rank = dist.get_rank()
    rows = routing(tokens_of_rank[rank], 0)
    try:
        converted(rows["hidden"], rows["index"], rows["weights"], **given(rank, tokens_of_rank[rank]))
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def one_rank_only(rank: int, tokens: int) -> dict[str, Any]:
    return {"gate": torch.ones(tokens, WIDTH)} if rank == 0 else {}


def other_numbers(rank: int, tokens: int) -> dict[str, Any]:
    return {"power": float(tokens)}


def other_values(rank: int, tokens: int) -> dict[str, Any]:
    return {"scale": torch.full((HIDDEN,), float(rank))}


def other_dtypes(rank: int, tokens: int) -> dict[str, Any]:
    return {"gate": torch.ones(tokens, WIDTH, dtype=torch.float32 if rank else torch.float64)}


def other_widths(rank: int, tokens: int) -> dict[str, Any]:
    return {"gate": torch.ones(tokens, 3 + rank)}


def rows_on_one_rank(rank: int, tokens: int) -> dict[str, Any]:
    return {"gate": torch.ones(tokens + rank, WIDTH)}


def for_each_expert(rank: int, tokens: int) -> dict[str, Any]:
    return {"note": torch.ones(EXPERTS)}


def for_each_choice(rank: int, tokens: int) -> dict[str, Any]:
    return {"note": torch.ones(tokens, 2)}


def logits(rank: int, tokens: int) -> dict[str, Any]:
    return {"note": torch.ones(tokens, EXPERTS)}


def batch_of_sequences(rank: int, tokens: int) -> dict[str, Any]:
    return {"note": torch.ones(3, tokens // 3)}


def list_of_tensors(rank: int, tokens: int) -> dict[str, Any]:
    return {"note": [torch.ones(tokens)]}


def list_for_each_expert(rank: int, tokens: int) -> dict[str, Any]:
    return {"note": [1.0] * EXPERTS}


def an_object(rank: int, tokens: int) -> dict[str, Any]:
    return {"note": object()}


def unknown(rank: int, tokens: int) -> dict[str, Any]:
    return {"gates": torch.ones(tokens)}


def gate(rank: int, tokens: int) -> dict[str, Any]:
    return {"gate": torch.ones(tokens, 1, dtype=torch.float64)}


def plain(rank: int, tokens: int) -> dict[str, Any]:
    return {"note": [1, None, {"name": torch.float32}], "power": 2, "gate": None}


@pytest.mark.parametrize(
    ("given", "tokens", "message"),
    [
        (
            one_rank_only,
            (9, 5),
            "argument 'gate' differs between ranks, a tensor of torch.float32 of shape [9, 6] on EP",
        ),
        (other_numbers, (9, 5), "argument 'power' differs between ranks, 9.0 on EP rank 0 and 5.0 on 1"),
        (other_values, (9, 5), "argument 'scale' differs between ranks"),
        (other_dtypes, (9, 5), "argument 'gate' differs between ranks, a tensor of torch.float64 of shape [9, 6]"),
        (other_widths, (9, 5), "argument 'gate' differs between ranks, a tensor of torch.float32 of shape [9, 3]"),
        (rows_on_one_rank, (9, 5), "argument 'gate' differs between ranks"),
        (
            for_each_expert,
            (9, 5),
            "ValueError: experts (Experts): argument 'note' has shape [8], a value for each of 8",
        ),
        (for_each_choice, (9, 7), "a value for each of a token's 2 experts, which is not supported"),
        (logits, (9, 7), "a value for each of 8 experts, which is not supported"),
        (batch_of_sequences, (9, 9), "and there are 9 tokens; tokens must be its first dimension, and no other"),
        (list_of_tensors, (9, 5), "TypeError: experts (Experts): argument 'note' is a list that holds tensors"),
        (list_for_each_expert, (9, 5), "argument 'note' is a list with a value for each of 8 experts"),
        (an_object, (9, 5), "argument 'note' is a object; only tensors, numbers, strings"),
        (unknown, (9, 5), "TypeError: got an unexpected keyword argument 'gates'"),
        (
            gate,
            (WIDTH, WIDTH),
            "6 is both the number of tokens and a size of the experts; set token_arguments = ('gate',)",
        ),
    ],
)
def test_extra_arguments_when_invalid_raise_on_all_ranks(
    given: Callable[[int, int], dict[str, Any]], tokens: tuple[int, int], message: str, workers: Workers
) -> None:
    for refused in workers.run(2, refusal, given, tokens):
        assert message in refused


@pytest.mark.parametrize(
    ("given", "tokens"), [(plain, (9, 5)), (gate, (9, 9)), (gate, (WIDTH, 5)), (gate, (1, 1)), (gate, (0, 0))]
)
def test_extra_arguments_when_valid_are_taken(given: Any, tokens: tuple[int, int], workers: Workers) -> None:
    assert workers.run(2, refusal, given, tokens) == ["", ""]


class Declares(Experts):
    token_arguments = ("gate",)


def difference_where_sizes_coincide(remembers: bool) -> float:
    """As many tokens as the model is wide; and what the shapes told before."""
    original, converted = Experts(), Experts() if remembers else Declares()
    parallelize_experts(nn.ModuleDict({"experts": converted}))
    found = []
    for tokens in (9, WIDTH) if remembers else (WIDTH,):
        rows = routing(tokens, 0)
        given = rows["hidden"], rows["index"], rows["weights"], rows["gate"]
        found.append(largest(converted(*given, scale=rows["gate"].new_ones(HIDDEN)), original(*given)))
    return max(found)


@pytest.mark.parametrize("remembers", [True, False])
def test_extra_arguments_of_ambiguous_size_are_told_apart(remembers: bool, workers: Workers) -> None:
    assert max(workers.run(2, difference_where_sizes_coincide, remembers)) < 1e-12


def resized_behind_a_call() -> int:
    """As FSDP1 frees what it has gathered, of which an argument may be a part."""
    converted, storage = Experts(), torch.ones(HIDDEN, dtype=torch.float64)
    parallelize_experts(nn.ModuleDict({"experts": converted}))
    rows = routing(9, 0)
    converted(rows["hidden"], rows["index"], rows["weights"], scale=storage.view(-1))
    storage.untyped_storage().resize_(0)
    return storage.untyped_storage().size()


def test_extra_arguments_after_call_can_be_freed(workers: Workers) -> None:
    assert workers.run(2, resized_behind_a_call) == [0, 0]


class SomeExperts(Experts):
    """Computes the experts that got tokens only, of inputs that have been gated before."""

    def forward(  # type: ignore[override]
        self, hidden: Tensor, index: Tensor, weights: Tensor, gate: Tensor | None = None
    ) -> Tensor:
        output = torch.zeros_like(hidden) if gate is None else 0 * gate
        for expert in index[index >= 0].unique():
            token, k = torch.where(index == expert)
            x = hidden[token] if gate is None else hidden[token] * gate[token]
            output = output.index_add(
                0, token, torch.tanh(x @ self.up[expert]) @ self.down[expert] * weights[token, k, None]
            )
        return output


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = SomeExperts()
        self.gate = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return hidden + self.experts(hidden, index, weights, self.gate(hidden))


def gradients_without_tokens(wraps: bool) -> tuple[bool, bool]:
    """Two steps in which no rank has a token: whether the gate has a gradient, and whether experts have."""
    model: Any = Gated()
    parallelize_experts(model)
    trained = model
    if wraps:
        leave_experts_out_of_ddp(model)
        trained = DistributedDataParallel(model)
    rows = routing(9, 0)
    for _ in range(2):
        trained(rows["hidden"], torch.full_like(rows["index"], -1), rows["weights"]).sum().backward()
    return model.gate.weight.grad is not None, model.experts.up.grad is not None


@pytest.mark.parametrize("wraps", [False, True])
def test_extra_arguments_without_tokens_on_any_rank_get_gradients(wraps: bool, workers: Workers) -> None:
    assert workers.run(2, gradients_without_tokens, wraps) == [(True, False)] * 2
