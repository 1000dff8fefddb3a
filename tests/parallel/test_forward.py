"""The forward and the backward of a converted layer, against the unmodified module in the same process."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from lightning_eplb import ExpertLoadBalancer, parallelize_experts
from lightning_eplb.parallel.all_to_all import AllToAllDispatcher
from lightning_eplb.parallel.dispatch import DispatchedRows, TokenBatch, TokenDispatcher
from lightning_eplb.parallel.dispatch_plan import DispatchPlan, Routing, assign_slots, plan_dispatch, split_in_parts
from lightning_eplb.parallel.groups import ExpertGroups
from lightning_eplb.parallel.parallelize import expert_layers
from tests.fidelity import ShufflePolicy
from tests.models import hugging_face_model
from tests.workers import Workers

EXPERTS, WIDTH = 8, 16


def layer(name: str = "mixtral") -> nn.Module:
    """One layer's experts, the same weights in every process."""
    model = hugging_face_model(name, num_experts=EXPERTS, layers=1)
    return next(module for module in model.modules() if type(module).__name__.endswith("Experts"))


def routing(tokens: int, top_k: int, experts: range = range(EXPERTS), seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, distinct experts for each token and their weights; other ones on every rank."""
    generator = torch.Generator().manual_seed(seed + 100 * dist.get_rank())
    hidden = torch.randn(tokens, WIDTH, generator=generator, dtype=torch.float64)
    scores = torch.rand(tokens, len(experts), generator=generator, dtype=torch.float64)
    weights, index = scores.topk(top_k, dim=-1)
    return hidden, index + experts.start, weights


def summed(module: nn.Module) -> dict[str, Tensor]:
    """Gradients of all experts in logical order, summed over ranks as if one process had seen all tokens."""
    grads = {name: parameter.grad.clone() for name, parameter in module.named_parameters()}  # type: ignore[union-attr]
    for grad in grads.values():
        dist.all_reduce(grad)
    return grads


def compare(
    redundant: int,
    tokens_of_rank: Callable[[int], int],
    top_k: int = 2,
    experts: range = range(EXPERTS),
    name: str = "mixtral",
    run: Callable[..., Tensor] = lambda module, *args: module(*args),
    ep_group: Any = None,
    redundancy: Any = "window",
    dispatcher: type[TokenDispatcher] | None = None,
) -> float:
    """The largest difference of outputs and of all gradients between a converted layer and the original."""
    original, converted = layer(name), layer(name)
    holder = nn.ModuleDict({"experts": converted})
    parallelize_experts(holder, ep_group, num_redundant_experts=redundant, dispatcher=dispatcher)
    (expert_layer, _), *_ = expert_layers(holder)
    balancer = ExpertLoadBalancer(
        holder, policy=ShufflePolicy(), step_interval=1, redundancy=redundancy, min_tokens_per_copy=1
    )
    differences = []
    for step in range(3):
        tokens = tokens_of_rank(dist.get_rank())
        hidden, index, weights = routing(tokens, top_k, experts, seed=step)
        inputs = [(hidden.clone().requires_grad_(), weights.clone().requires_grad_()) for _ in range(2)]
        original.zero_grad(set_to_none=False)
        holder.zero_grad(set_to_none=False)
        for parameter in (*original.parameters(), *converted.parameters()):
            parameter.grad = torch.zeros_like(parameter)
        outputs = []
        for module, (x, w) in zip((original, converted), inputs, strict=True):
            output = run(module, x, index, w)
            if output.requires_grad:  # the original's is not, where no expert got a token
                (output * torch.arange(WIDTH)).sum().backward()
            outputs.append(output)
        differences.append(largest(outputs[0], outputs[1]))
        for ours, theirs in zip(inputs[1], inputs[0], strict=True):
            if ours.grad is not None:
                differences.append(largest(ours.grad, theirs.grad if theirs.grad is not None else ours.detach() * 0))
            assert theirs.grad is None or ours.grad is not None
        expected = {k: v / dist.get_world_size() for k, v in summed(original).items()}
        for parameter_name, parameter in converted.named_parameters():
            assert parameter.grad is not None
            differences.append(largest(parameter.grad, expected[parameter_name][expert_layer.local_experts]))
        counted = torch.bincount(index.flatten(), minlength=EXPERTS)
        dist.all_reduce(counted)
        load = balancer.step()
        assert (load is None) == (not counted.any())
        if load is not None:
            assert torch.equal(load.load[0], counted[:EXPERTS])
    return max(differences)


def largest(ours: Tensor | None, theirs: Tensor | None) -> float:
    assert ours is not None
    assert theirs is not None
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max()) if ours.numel() else 0.0


class HalvesDispatcher(AllToAllDispatcher):
    """Has even one token travel in two parts."""

    bytes_in_parts = 0


BOTH = pytest.mark.parametrize("redundancy", ["window", "batch"])
PARTS = pytest.mark.parametrize("dispatcher", [AllToAllDispatcher, HalvesDispatcher])


@BOTH
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("top_k", [1, 2, 8])
def test_forward_with_any_top_k_computes_as_unmodified(
    name: str, top_k: int, redundancy: str, workers: Workers
) -> None:
    assert max(workers.run(2, any_top_k, name, top_k, redundancy)) < 1e-12


def any_top_k(name: str, top_k: int, redundancy: str) -> float:
    return compare(4, lambda rank: 7 + rank, top_k, name=name, redundancy=redundancy)


@PARTS
@BOTH
@pytest.mark.parametrize("redundant", [0, 4])
def test_forward_on_rank_without_tokens_computes_as_unmodified(
    redundant: int, redundancy: str, dispatcher: type[TokenDispatcher], workers: Workers
) -> None:
    assert max(workers.run(4, rank_without_tokens, redundant, redundancy, dispatcher)) < 1e-12


def rank_without_tokens(redundant: int, redundancy: str, dispatcher: type[TokenDispatcher]) -> float:
    return compare(redundant, lambda rank: 5 * rank, redundancy=redundancy, dispatcher=dispatcher)


@PARTS
@BOTH
@pytest.mark.parametrize("redundant", [0, 2])
def test_forward_with_experts_without_tokens_computes_as_unmodified(
    redundant: int, redundancy: str, dispatcher: type[TokenDispatcher], workers: Workers
) -> None:
    """Every token goes to two experts, so some ranks compute nothing; they take part in each collective."""
    assert max(workers.run(2, experts_without_tokens, redundant, redundancy, dispatcher)) < 1e-12


def experts_without_tokens(redundant: int, redundancy: str, dispatcher: type[TokenDispatcher]) -> float:
    return compare(redundant, lambda rank: 6, experts=range(2, 4), redundancy=redundancy, dispatcher=dispatcher)


@PARTS
@BOTH
def test_forward_without_tokens_on_any_rank_computes_as_unmodified(
    redundancy: str, dispatcher: type[TokenDispatcher], workers: Workers
) -> None:
    assert max(workers.run(2, no_token, redundancy, dispatcher)) == 0.0


def no_token(redundancy: str, dispatcher: type[TokenDispatcher]) -> float:
    return compare(2, lambda rank: 0, redundancy=redundancy, dispatcher=dispatcher)


@PARTS
@BOTH
@pytest.mark.parametrize("reentrant", [False, True])
def test_forward_under_checkpointing_counts_tokens_once(
    reentrant: bool, redundancy: str, dispatcher: type[TokenDispatcher], workers: Workers
) -> None:
    assert max(workers.run(2, checkpointed, reentrant, redundancy, dispatcher)) < 1e-12


def checkpointed(reentrant: bool, redundancy: str, dispatcher: type[TokenDispatcher]) -> float:
    def run(module: nn.Module, *args: Tensor) -> Tensor:
        return checkpoint(module, *args, use_reentrant=reentrant)  # type: ignore[return-value]

    return compare(2, lambda rank: 9, run=run, redundancy=redundancy, dispatcher=dispatcher)


@BOTH
def test_forward_in_two_ep_groups_computes_as_unmodified(redundancy: str, workers: Workers) -> None:
    """Ranks of both groups hold the same rows; gradients are averaged over the groups, loads summed."""
    assert max(workers.run(4, two_groups, redundancy)) < 1e-12


def two_groups(redundancy: str) -> float:
    group, _ = dist.new_subgroups(2)
    return compare(2, lambda rank: 3 + rank, ep_group=group, redundancy=redundancy)


def test_forward_with_tokens_in_one_of_two_groups_computes_as_unmodified(workers: Workers) -> None:
    """Ranks of the other group average zeros, as they don't know that this group has tokens."""
    assert max(workers.run(4, tokens_in_one_group)) < 1e-12


def tokens_in_one_group() -> float:
    group, _ = dist.new_subgroups(2)
    return compare(2, lambda rank: 3 if rank < 2 else 0, ep_group=group)


@pytest.mark.parametrize("no_expert", [EXPERTS, -1])
def test_forward_with_ids_of_no_expert_drops_them(no_expert: int, workers: Workers) -> None:
    """Hugging Face's routers mark a choice that does not count by the id behind the last expert, others by -1."""
    assert max(workers.run(2, masked_choices, no_expert)) < 1e-12


def masked_choices(no_expert: int) -> float:
    original, converted = layer(), layer()
    holder = nn.ModuleDict({"experts": converted})
    parallelize_experts(holder)
    balancer = ExpertLoadBalancer(holder)
    hidden, index, weights = routing(6, 2)
    mask = torch.tensor([[False, True], [False, False]] * 3)
    output = converted(hidden, index.masked_fill(mask, no_expert), weights)
    load = balancer.step()
    assert load is not None
    assert load.load.sum() == 2 * 9
    return largest(output, original(hidden, index, weights.masked_fill(mask, 0.0)))


def test_forward_with_keyword_arguments_computes_as_unmodified(workers: Workers) -> None:
    assert max(workers.run(2, by_keyword)) < 1e-12


def by_keyword() -> float:
    original, converted = layer("gpt_oss"), layer("gpt_oss")
    parallelize_experts(nn.ModuleDict({"experts": converted}))
    hidden, index, weights = routing(6, 2)
    ours = converted(hidden, routing_weights=weights, router_indices=index)
    return largest(ours, original(hidden, index, weights))


@BOTH
def test_forward_with_grouped_mm_in_float32_computes_as_unmodified(redundancy: str, workers: Workers) -> None:
    """The rows come sorted to transformers' grouped products, of the primaries and of the copies."""
    assert max(workers.run(2, grouped_kernels, redundancy)) < 1e-4


def grouped_kernels(redundancy: Any) -> float:
    original, converted = (layer("gpt_oss").float() for _ in range(2))
    for module in (original, converted):
        module.config._experts_implementation = "grouped_mm"
    holder = nn.ModuleDict({"experts": converted})
    parallelize_experts(holder, num_redundant_experts=4)
    ExpertLoadBalancer(holder, redundancy=redundancy, min_tokens_per_copy=1)
    hidden, index, weights = (x.float() if x.is_floating_point() else x for x in routing(40, 2))
    index[:30, 0] = 0  # a hot expert, which the batch's copies serve
    index[:30, 1] = 1
    outputs = [module(hidden, index, weights) for module in (original, converted)]
    for output in outputs:
        (output * torch.arange(WIDTH)).sum().backward()
    expected = {k: v / dist.get_world_size() for k, v in summed(original).items()}
    (expert_layer, _), *_ = expert_layers(holder)
    grads = [largest(p.grad, expected[n][expert_layer.local_experts]) for n, p in converted.named_parameters()]
    scale = max(float(grad.abs().max()) for grad in expected.values())
    return max(largest(*outputs), max(grads) / scale)


class OwnDispatcher(TokenDispatcher):
    """Further arguments travel as the tokens do."""

    def dispatch_argument(self, handle: Any, rows_TC: Tensor) -> Any:
        return self.send(rows_TC, handle)

    def receive_argument(self, handle: Any, part: int) -> tuple[Tensor, Tensor]:
        first, second = self.receive(handle, part)
        return first.hidden, second.hidden

    def send(self, rows_TD: Tensor, like: Any) -> Any:
        raise NotImplementedError


class GatheringDispatcher(OwnDispatcher):
    """Another way to exchange tokens: every rank gathers what all ranks have, and picks what it needs."""

    def dispatch(self, batch: TokenBatch, routing: Routing, in_flight: Any = None) -> "GatheredHandle":
        plan = plan_dispatch(batch.sorted_pairs[0], routing, math.inf)
        return self.send(batch.hidden, GatheredHandle(plan, batch.weights, [], batch.hidden))

    def send(self, rows_TD: Tensor, like: "GatheredHandle") -> "GatheredHandle":
        (part,) = like.plan.parts
        sent: list[list[int]] = [[] for _ in range(self.groups.size)]
        dist.all_gather_object(sent, part.send_counts, group=self.groups.ep_group)
        rank, top_k = self.groups.rank, like.weights.shape[1]
        pairs_of = _gather(rows_TD[like.plan.pairs // top_k], [sum(counts) for counts in sent], self.groups.ep_group)
        received = [pairs.split(counts)[rank] for pairs, counts in zip(pairs_of, sent, strict=True)]
        return GatheredHandle(like.plan, like.weights, sent, torch.cat(received))

    def receive(self, handle: "GatheredHandle", part: int) -> tuple[DispatchedRows, DispatchedRows]:
        plan = handle.plan.parts[part]
        return (
            DispatchedRows(handle.rows[plan.primary_rows], plan.primary_ends),
            DispatchedRows(handle.rows[plan.copy_rows], plan.copy_ends),
        )

    def send_back(self, handle: "GatheredHandle", part: int, primaries_MD: Tensor, redundant_MD: Tensor) -> None:
        plan = handle.plan.parts[part]
        places = torch.cat((plan.primary_rows, plan.copy_rows))
        handle.rows = torch.cat((primaries_MD, redundant_MD))[torch.argsort(places)]

    def combine(self, handle: "GatheredHandle") -> Tensor:
        rank, weights_TK = self.groups.rank, handle.weights
        served = [sum(counts[server] for counts in handle.sent) for server in range(self.groups.size)]
        home = [
            rows.split([counts[server] for counts in handle.sent])[rank]
            for server, rows in enumerate(_gather(handle.rows, served, self.groups.ep_group))
        ]
        pairs = torch.zeros(weights_TK.numel(), handle.rows.shape[1], dtype=handle.rows.dtype)
        pairs = pairs.index_copy(0, handle.plan.pairs, torch.cat(home))
        return (pairs.view(*weights_TK.shape, -1) * weights_TK.unsqueeze(-1)).sum(1)


class LabelledDispatcher(OwnDispatcher):
    """As DeepEP's kernels do, each pair travels with the slot that is to serve it. Parts are experts' halves."""

    def parts(self, batch: TokenBatch, routing: Routing) -> list[slice]:
        return split_in_parts(routing, 0)

    def dispatch(self, batch: TokenBatch, routing: Routing, in_flight: Any = None) -> "LabelledHandle":
        slots_TK = assign_slots(routing, batch.sorted_pairs[0], batch.index.shape)
        pairs = torch.where(slots_TK.flatten() < routing.slots.size)[0]
        own = self.groups.rank * routing.slots.shape[1] + routing.serving_order
        served = [(own[part], own[:0]) for part in self.parts(batch, routing)]
        served[-1] = served[-1][0], own[routing.num_primaries :]
        like = LabelledHandle(pairs, slots_TK.flatten()[pairs], served, batch.weights, batch.hidden, pairs, pairs, [])
        return self.send(batch.hidden, like)

    def send(self, rows_TD: Tensor, like: "LabelledHandle") -> "LabelledHandle":
        sent: list[Any] = [None] * self.groups.size
        dist.all_gather_object(sent, like.labels, group=self.groups.ep_group)
        own = rows_TD[like.pairs // like.weights.shape[1]]
        rows = torch.cat(_gather(own, [len(x) for x in sent], self.groups.ep_group))
        mixed = torch.from_numpy(np.random.default_rng(0).permutation(len(rows)))
        return replace(like, rows=rows[mixed], slots=torch.cat(sent)[mixed], mixed=mixed, outputs=[])

    def receive(self, handle: "LabelledHandle", part: int) -> tuple[DispatchedRows, DispatchedRows]:
        """Rows arrive in any order; within an expert they are put in that of their source ranks."""
        both = []
        for slots in handle.served[part]:
            places = [torch.where(handle.slots == slot)[0] for slot in slots.tolist()]
            places = [place[torch.argsort(handle.mixed[place])] for place in places]
            ends = torch.tensor([len(place) for place in places], dtype=torch.int64).cumsum(0).to(torch.int32)
            both.append((torch.cat([torch.empty(0, dtype=torch.int64), *places]), ends))
        (first, own_ends), (second, other_ends) = both
        handle.outputs.append([first, second])
        return DispatchedRows(handle.rows[first], own_ends), DispatchedRows(handle.rows[second], other_ends)

    def send_back(self, handle: "LabelledHandle", part: int, primaries_MD: Tensor, redundant_MD: Tensor) -> None:
        handle.outputs[part] += [primaries_MD, redundant_MD]

    def combine(self, handle: "LabelledHandle") -> Tensor:
        all_MD = torch.zeros_like(handle.rows)
        for first, second, primaries_MD, redundant_MD in handle.outputs:
            all_MD = all_MD.index_copy(0, torch.cat((first, second)), torch.cat((primaries_MD, redundant_MD)))
        all_MD = torch.zeros_like(all_MD).index_copy(0, handle.mixed, all_MD)
        summed_MD = sum(_gather(all_MD, [len(all_MD)] * self.groups.size, self.groups.ep_group))
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.groups.size)]
        dist.all_gather(lengths, torch.tensor([len(handle.pairs)]), group=self.groups.ep_group)
        home_ND = summed_MD.split([int(length) for length in lengths])[self.groups.rank]  # type: ignore[union-attr]
        pairs = torch.zeros(handle.weights.numel(), home_ND.shape[1], dtype=home_ND.dtype)
        pairs = pairs.index_copy(0, handle.pairs, home_ND)
        return (pairs.view(*handle.weights.shape, -1) * handle.weights.unsqueeze(-1)).sum(1)


@dataclass
class LabelledHandle:
    pairs: Tensor
    labels: Tensor
    served: list[Any]
    weights: Tensor
    rows: Tensor
    slots: Tensor
    mixed: Tensor
    outputs: list[list[Tensor]]


@dataclass
class GatheredHandle:
    plan: DispatchPlan
    weights: Tensor
    sent: list[list[int]]
    rows: Tensor


def _gather(rows: Tensor, lengths: list[int], group: Any) -> list[Tensor]:
    """The rows of all ranks, as many as ``lengths`` says."""
    from torch.distributed.nn.functional import all_gather

    padded = torch.cat((rows, rows.new_zeros(max(lengths) - len(rows), rows.shape[1])))
    return [part[:length] for part, length in zip(all_gather(padded, group=group), lengths, strict=True)]


@BOTH
@pytest.mark.parametrize("dispatcher", [GatheringDispatcher, LabelledDispatcher, HalvesDispatcher])
def test_forward_with_other_dispatcher_computes_as_unmodified(
    dispatcher: type[TokenDispatcher], redundancy: str, workers: Workers
) -> None:
    assert max(workers.run(2, with_another_dispatcher, dispatcher, redundancy)) < 1e-12


def with_another_dispatcher(dispatcher: type[TokenDispatcher], redundancy: str) -> float:
    return compare(2, lambda rank: 5 + 4 * rank, redundancy=redundancy, dispatcher=dispatcher, name="gpt_oss")


class HomeDispatcher(AllToAllDispatcher):
    """Written for the contract before this one."""

    def send_home(self, handle: Any, part: int, primaries_MD: Tensor, copies_MD: Tensor) -> None: ...


class HalfADispatcher(TokenDispatcher):
    def combine(self, handle: Any) -> Tensor:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("dispatcher", "reason"),
    [
        (HomeDispatcher, "dispatcher=HomeDispatcher has methods of an earlier contract. TokenDispatcher now has"),
        (HalfADispatcher, "dispatcher=HalfADispatcher lacks dispatch, receive, send_back. TokenDispatcher now has"),
        (AllToAllDispatcher(ExpertGroups()), "must be a subclass of lightning_eplb.parallel.dispatch.TokenDispatcher"),
    ],
)
def test_dispatchers_without_the_contracts_methods_are_refused_by_name(dispatcher: Any, reason: str) -> None:
    with pytest.raises(TypeError, match=reason.replace(".", r"\.")):
        parallelize_experts(nn.ModuleDict({"experts": layer()}), dispatcher=dispatcher)


def test_forward_on_one_rank_runs_the_unmodified_module() -> None:
    original, converted = layer(), layer()
    weight = converted.gate_up_proj
    holder = nn.ModuleDict({"experts": converted})
    parallelize_experts(holder)
    assert converted.gate_up_proj is weight
    balancer = ExpertLoadBalancer(holder)
    hidden = torch.randn(5, WIDTH, dtype=torch.float64)
    index = torch.tensor([[0, 1], [1, 2], [1, 3], [7, 0], [1, 5]])
    weights = torch.rand(5, 2, dtype=torch.float64)
    assert torch.equal(converted(hidden, index, weights), original(hidden, index, weights))
    load = balancer.step()
    assert load is not None
    assert load.load.tolist() == [[2, 4, 1, 1, 0, 1, 0, 1]]
    assert load.balancedness == 1.25 / 4  # of experts: 10 tokens of 8 experts, the hottest has 4


def summing_hook(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda future: future.value()[0])


HOOKS: dict[str, Any] = {
    "summing": summing_hook,
    "summing in fp16": default_hooks.fp16_compress_wrapper(summing_hook),
    "noop": noop_hook,
    "allreduce": default_hooks.allreduce_hook,
    "allreduce in fp16": default_hooks.fp16_compress_wrapper(default_hooks.allreduce_hook),
    "fp16_compress": default_hooks.fp16_compress_hook,
    "allreduce of a part": default_hooks.allreduce_hook,
}


def hooked(name: str) -> str:
    group = dist.new_subgroups(1)[0] if name == "allreduce of a part" else None
    return wrapped(True, lambda ddp: ddp.register_comm_hook(group, HOOKS[name]))


@pytest.mark.parametrize(
    ("name", "hook", "inner"),
    [
        ("summing", "summing_hook", "summing_hook"),
        ("summing in fp16", "fp16_compress_wrapper_hook", "summing_hook"),
        ("noop", "noop_hook", "noop_hook"),
    ],
)
def test_forward_under_ddp_hook_that_may_sum_raises(name: str, hook: str, inner: str, workers: Workers) -> None:
    for message in workers.run(2, hooked, name):
        assert message == (
            f"DistributedDataParallel.register_comm_hook(hook={hook}) is not supported with expert parallelism:"
            " expert gradients are averaged over all ranks, and so must all others be, which"
            f" {inner} may not do. Use one of torch's hooks that average, allreduce_hook, fp16_compress_hook,"
            " bf16_compress_hook, powerSGD_hook, batched_powerSGD_hook, quantization_pertensor_hook,"
            " quantization_perchannel_hook, or none"
        )


def test_forward_under_ddp_hook_over_part_of_the_ranks_raises(workers: Workers) -> None:
    for message in workers.run(2, hooked, "allreduce of a part"):
        assert message == (
            "DistributedDataParallel.register_comm_hook(hook=allreduce_hook) averages gradients over a process group of"
            " 1 ranks, and expert gradients are averaged over all 2. Leave the process group out of the hook's state."
        )


@pytest.mark.parametrize("name", ["allreduce", "allreduce in fp16", "fp16_compress"])
def test_forward_under_ddp_hook_that_averages_passes(name: str, workers: Workers) -> None:
    assert workers.run(2, hooked, name) == ["", ""]


def wrapped(ignored: bool, register: Callable[[DistributedDataParallel], None] = lambda ddp: None) -> str:
    block = nn.ModuleDict({"norm": nn.LayerNorm(WIDTH, dtype=torch.float64), "experts": layer()})
    parallelize_experts(block)
    if ignored:
        names = [name for name, _ in block.named_parameters() if name.startswith("experts.")]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(block, names)
    block.forward = lambda hidden, index, weights: block["experts"](block["norm"](hidden), index, weights)  # type: ignore[method-assign]
    ddp = DistributedDataParallel(block)
    register(ddp)
    try:
        ddp(*routing(4, 2)).sum().backward()
    except (RuntimeError, ValueError) as error:
        return str(error)
    return ""


def test_forward_under_ddp_that_has_experts_raises(workers: Workers) -> None:
    """It would average the gradients of different experts, in silence: as where EPLBCallback was forgotten."""
    for message in workers.run(2, wrapped, False):
        assert message.startswith("DistributedDataParallel averages experts, whose rows are other experts on each rank")
        assert "Add EPLBCallback" in message
    assert workers.run(2, wrapped, True) == ["", ""]


def refused_call(*arguments: Tensor) -> str:
    converted = layer()
    parallelize_experts(nn.ModuleDict({"experts": converted}))
    try:
        converted(*arguments)
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (
            ((2, 3, 16), (6, 2), (6, 2)),
            "ValueError: experts (MixtralExperts) was called with hidden_states: [2, 3, 16]",
        ),
        (
            ((6, 16), (6, 2), (6, 1)),
            "top_k_weights: [6, 1] torch.float32; experts over several ranks take hidden states",
        ),
        (((5, 16), (6, 2), (6, 2)), "Flatten batches of sequences to T tokens"),
    ],
)
def test_forward_with_arguments_of_other_shapes_raises_on_all_ranks(
    shapes: Any, message: str, workers: Workers
) -> None:
    hidden, index, weights = shapes
    arguments = torch.zeros(hidden), torch.zeros(index, dtype=torch.int64), torch.zeros(weights)
    for refusal in workers.run(2, refused_call, *arguments):
        assert message in refusal


def test_forward_with_arguments_in_other_order_raises_on_all_ranks(workers: Workers) -> None:
    arguments = torch.zeros(6, 16), torch.zeros(6, 2), torch.zeros(6, 2, dtype=torch.int64)
    for refusal in workers.run(2, refused_call, *arguments):
        assert refusal.startswith("TypeError: experts (MixtralExperts) was called with hidden_states: [6, 16]")
        assert "top_k_index: [6, 2] torch.float32, top_k_weights: [6, 2] torch.int64; experts over several" in refusal


class Raises(nn.Module):
    """Follows the protocol until its model tells it to fail."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = EXPERTS
        self.up = nn.Parameter(torch.ones(EXPERTS, WIDTH, WIDTH, dtype=torch.float64))
        self.failure: Callable[[Tensor], Any] | None = None

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Any:
        if self.failure is not None:
            return self.failure(hidden)
        output = torch.zeros_like(hidden)
        for expert in range(self.num_experts):
            token, k = torch.where(index == expert)
            output = output.index_add(0, token, hidden[token] @ self.up[expert] * weights[token, k, None])
        return output


def failed_call(failure: Callable[[Tensor], Any]) -> str:
    """One rank's experts get all tokens, the other's none."""
    experts = Raises()
    parallelize_experts(nn.ModuleDict({"experts": experts}))
    experts.failure = failure
    try:
        experts(*routing(6, 2, range(4)))
    except (IndexError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def third_of_two(hidden: Tensor) -> Tensor:
    return hidden[:2][5]


def tuple_of(hidden: Tensor) -> tuple[Tensor]:
    return (hidden,)


def sum_of(hidden: Tensor) -> Tensor:
    return hidden.sum(dim=0)


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (third_of_two, "This is from experts (Raises), on a rank that holds"),
        (tuple_of, "TypeError: experts (Raises) returned a tuple; the protocol is: forward(hidden [T, D]"),
        (sum_of, "ValueError: experts (Raises) returned shape [16] for hidden states of shape"),
    ],
)
def test_forward_when_experts_raise_names_them_on_all_ranks(failure: Any, message: str, workers: Workers) -> None:
    for error in workers.run(2, failed_call, failure):
        assert message in error
        assert "top_k_weights [T, K]) returns [T, D]" in error
