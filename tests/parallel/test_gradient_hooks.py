"""Gradient hooks on expert parameters do what they do to the unmodified model in one process."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_eplb import EPLBCallback, ExpertLoadBalancer, ExpertParallelStrategy, materialize, parallelize_experts
from tests.fidelity import TOLERANCE, ShufflePolicy, trainer_for
from tests.fsdp1 import DoublePrecision, fsdp1, full_state
from tests.models import (
    LanguageModel,
    ShardedLanguageModel,
    hugging_face_model,
    language_loss,
    loader,
    optimizer_of,
    token_batches,
)
from tests.workers import Workers

EXPERTS, STEPS, SEQUENCES, FROZEN = 8, 6, 2, [1, 2, 5]

Weights = dict[str, Tensor]
Hook = Callable[[Tensor], Any]


def mask_of(gradient: Tensor) -> Tensor:
    mask = gradient.new_ones(EXPERTS, *[1] * (gradient.ndim - 1))
    mask[FROZEN] = 0
    return mask


def masked(gradient: Tensor) -> Tensor:
    return gradient * mask_of(gradient)


def zeroed_in_place(gradient: Tensor) -> None:
    gradient[FROZEN] = 0


def normalized(gradient: Tensor) -> Tensor:
    return gradient / (0.1 + gradient.norm())


def masked_after(parameter: Tensor) -> None:
    assert parameter.grad is not None
    parameter.grad.mul_(mask_of(parameter.grad))


def edited_after(parameter: Tensor) -> None:
    assert parameter.grad is not None
    assert parameter.shape == parameter.grad.shape
    parameter.grad.data[FROZEN] = 0


def normalized_after(parameter: Tensor) -> None:
    assert parameter.grad is not None
    parameter.grad = parameter.grad / (0.1 + parameter.grad.norm())


def register(model: nn.Module, hooks: list[Hook]) -> list[Any]:
    """Those that are called ``..._after`` run after accumulation."""
    return [
        parameter.register_post_accumulate_grad_hook(hook)
        if hook.__name__.endswith("_after")
        else parameter.register_hook(hook)
        for parameter in experts_of(model)
        for hook in hooks
    ]


def experts_of(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for name, parameter in model.named_parameters() if "experts" in name]


@dataclass(frozen=True)
class Case:
    hooks: tuple[Hook, ...]
    ranks: int = 2
    ep_size: int = 2
    redundant: int = 2
    use_async: bool = False
    accumulation: int = 1
    model: str = "mixtral"
    checkpointing: Literal["off", "reentrant", "non-reentrant"] = "off"
    registered: Literal["before", "after"] = "after"
    """The conversion."""
    lasts: tuple[int, int] = (0, STEPS)
    """The first step with hooks that are registered after it, and the first one without them again."""
    penalty: float = 0.0

    def __str__(self) -> str:
        names = "+".join(hook.__name__ for hook in self.hooks)
        others = [f"{name}_{value}" for name, value in vars(self).items() if value != getattr(Case, name, None)]
        return "-".join([names, *[other for other in others if not other.startswith("hooks")]])


def steps(case: Case) -> Iterator[list[Tensor]]:
    size = SEQUENCES * case.ranks
    batches = token_batches(STEPS * case.accumulation * size).split(size)
    for step in range(STEPS):
        yield list(batches[step * case.accumulation : (step + 1) * case.accumulation])


def train(case: Case, model: nn.Module, part: slice, convert: Callable[[], ExpertLoadBalancer | None]) -> Weights:
    """A plain loop on one process, or on every worker."""
    if case.checkpointing != "off":
        model.gradient_checkpointing_enable({"use_reentrant": case.checkpointing == "reentrant"})  # type: ignore[operator]
    handles = register(model, list(case.hooks)) if case.registered == "before" else []
    balancer = convert()
    optimizer = optimizer_of("sgd", model)
    if balancer is not None:
        balancer.optimizers = [optimizer]
    first, end = case.lasts
    experts = experts_of(model)
    ids = {id(parameter) for parameter in experts}
    for step, batches in enumerate(steps(case)):
        if step == first and case.registered == "after":
            handles = register(model, list(case.hooks))
        if step == end:
            for handle in handles:
                handle.remove()
        for batch in batches:
            penalty = case.penalty * sum(parameter.square().sum() for parameter in experts) if case.penalty else 0.0
            ((language_loss(model, batch[part]) + penalty) / case.accumulation).backward()
        if balancer is not None:
            for parameter in model.parameters():
                if id(parameter) not in ids and parameter.grad is not None:
                    dist.all_reduce(parameter.grad)
                    parameter.grad /= case.ranks
            balancer.before_optimizer_step()
        optimizer.step()
        optimizer.zero_grad()
        if balancer is not None:
            balancer.step(with_gradients=False)
    if balancer is not None:
        balancer.finish_rearrangement()
        assert balancer.num_rearrangements > 0
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def on_ranks(case: Case) -> Weights:
    model = hugging_face_model(case.model, num_experts=EXPERTS)

    def convert() -> ExpertLoadBalancer:
        group = None if case.ep_size == case.ranks else dist.new_subgroups(case.ep_size)[0]
        parallelize_experts(model, group, num_redundant_experts=case.redundant)  # type: ignore[arg-type]
        return ExpertLoadBalancer(model, policy=ShufflePolicy(), step_interval=1, use_async=case.use_async)

    return train(case, model, slice(dist.get_rank(), None, case.ranks), convert)


def difference(ours: Weights, theirs: Weights) -> float:
    return max(float((ours[name] - tensor).abs().max()) for name, tensor in theirs.items())


CASES = [
    Case((masked,)),
    Case((masked,), registered="before", use_async=True),
    Case((zeroed_in_place, normalized), accumulation=2, penalty=0.01),
    Case((normalized,), redundant=0, checkpointing="reentrant"),
    Case((masked_after,), registered="before"),
    Case((edited_after, normalized_after), accumulation=2, use_async=True),
    Case((normalized, normalized_after), model="gpt_oss", checkpointing="non-reentrant"),
    Case((masked, normalized_after), lasts=(2, 4)),
    Case((masked, normalized), ranks=4, accumulation=2, use_async=True),
    Case((edited_after, normalized_after), ranks=4, registered="before"),
    Case((normalized_after,), ranks=4, accumulation=2, lasts=(2, 5), checkpointing="reentrant"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradient_hooks_on_experts_see_gradients_of_all(case: Case, workers: Workers) -> None:
    model = hugging_face_model(case.model, num_experts=EXPERTS)
    expected = train(case, model, slice(None), lambda: None)
    unhooked = train(replace(case, hooks=()), hugging_face_model(case.model, EXPERTS), slice(None), lambda: None)
    assert difference(unhooked, expected) > 1e-4
    for weights in workers.run(case.ranks, on_ranks, case, seconds=180):
        assert difference(weights, expected) < TOLERANCE


class MasksWhenFitStarts(pl.Callback):
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        register(pl_module, [masked, normalized_after])


def under_a_trainer(kind: str) -> Weights:
    """On every worker."""
    strategy, plugins = fsdp1() if kind == "fsdp1" else None, [DoublePrecision()] if kind == "fsdp1" else []
    eplb = EPLBCallback(2, policy=ShufflePolicy(), step_interval=1, use_async=kind == "async")
    module = LanguageModel(hugging_face_model("mixtral", num_experts=EXPERTS), "sgd")
    trainer = trainer_for(2, strategy, plugins=plugins, max_steps=STEPS, callbacks=[eplb, MasksWhenFitStarts()])
    trainer.fit(module, loader(token_batches(STEPS * SEQUENCES * 2), SEQUENCES))
    assert eplb.balancer is not None
    assert eplb.balancer.num_rearrangements > 0
    if kind == "fsdp1":
        return full_state(trainer)[0]
    return {name: tensor.clone() for name, tensor in module.model.state_dict().items()}


@pytest.mark.parametrize("kind", ["ddp", "async", "fsdp1"])
def test_gradient_hooks_of_a_callback_train_as_one_process(kind: str, workers: Workers) -> None:
    case = Case((masked, normalized_after))
    expected = train(case, hugging_face_model("mixtral", num_experts=EXPERTS), slice(None), lambda: None)
    for weights in workers.run(2, under_a_trainer, kind, seconds=180):
        assert difference(weights, expected) < TOLERANCE


def converted() -> tuple[nn.Module, nn.Parameter, Tensor]:
    model = hugging_face_model("mixtral", num_experts=EXPERTS)
    parallelize_experts(model)
    return model, experts_of(model)[0], token_batches(4)[dist.get_rank() :: 2]


def on_rank_zero_only() -> None:
    model, parameter, tokens = converted()
    if dist.get_rank() == 0:
        parameter.register_hook(masked)
    language_loss(model, tokens)


def behind_the_forward() -> None:
    model, parameter, tokens = converted()
    loss = language_loss(model, tokens)
    parameter.register_hook(masked)
    loss.backward()


def one_that_reads_weights() -> None:
    model, parameter, tokens = converted()
    parameter.register_hook(lambda grad: grad + 0.1 * parameter.detach()[0])
    language_loss(model, tokens).backward()


def one_that_steps() -> None:
    model, parameter, tokens = converted()
    optimizer = torch.optim.AdamW([parameter])
    before = parameter.detach().clone()
    parameter.register_post_accumulate_grad_hook(lambda _: optimizer.step())
    try:
        language_loss(model, tokens).backward()
    finally:
        assert torch.equal(parameter.detach(), before)
        assert parameter.grad is not None
        assert parameter.grad.shape == parameter.shape


def one_that_makes_rows() -> None:
    model, parameter, tokens = converted()
    parameter.register_hook(lambda grad: grad[:4])
    language_loss(model, tokens).backward()


def on_the_meta_device() -> None:
    with torch.device("meta"):
        model = hugging_face_model("mixtral", num_experts=EXPERTS)
    experts_of(model)[0].register_hook(masked)
    parallelize_experts(model)
    materialize(model)


def fit_sharded(before: bool) -> None:
    model = hugging_face_model("mixtral", num_experts=EXPERTS)
    if before:
        register(model, [masked])
    callbacks = [EPLBCallback(2), *([] if before else [MasksWhenFitStarts()])]
    trainer = trainer_for(2, ExpertParallelStrategy(), max_steps=2, callbacks=callbacks)
    trainer.fit(ShardedLanguageModel(model, "sgd", 2), loader(token_batches(2 * SEQUENCES * 2), SEQUENCES))


def sharded_before() -> None:
    fit_sharded(before=True)


def sharded_after() -> None:
    fit_sharded(before=False)


REFUSED = {
    on_rank_zero_only: r"EP ranks \[1\] have other gradient hooks on the parameters of model.layers.0.mlp.experts than"
    " EP rank 0. .* Register the same hooks on every rank",
    behind_the_forward: "registered on a parameter of .*experts between its forward and its backward pass. Register it"
    " before the forward pass",
    one_that_reads_weights: r"hook on a parameter of .*experts uses the parameter itself \(detach\)",
    one_that_steps: "uses the parameter itself .* step an optimizer after the backward pass",
    one_that_makes_rows: r"returned a gradient of shape \[4, 48, 16\]. It must be that of all experts, \[8, 48, 16\]",
    on_the_meta_device: "is on the meta device and has a gradient hook, which would be lost",
    sharded_before: r"model.layers.0.mlp.experts.gate_up_proj has a gradient hook, which ExpertParallelStrategy .*"
    r"FSDPStrategy\(\)\.",
    sharded_after: "a parameter of .*experts has a gradient hook, which ExpertParallelStrategy",
}


def message_of(function: Callable[[], None]) -> str:
    """On every worker."""
    with pytest.raises(ValueError, match=r"\w") as raised:
        function()
    return str(raised.value)


@pytest.mark.parametrize("function", REFUSED, ids=lambda function: function.__name__)
def test_gradient_hooks_when_unsupported_raise_on_all_ranks(function: Callable[[], None], workers: Workers) -> None:
    for message in workers.run(2, message_of, function, seconds=180):
        assert re.search(REFUSED[function], message)


def frozen() -> bool:
    """The gate's parameter is frozen after a hook was registered on it, the other one has a hook, too."""
    model, parameter, tokens = converted()
    register(model, [masked])
    parameter.requires_grad_(False)
    language_loss(model, tokens).backward()
    return parameter.grad is None and all(other.grad is not None for other in experts_of(model)[1:])


def test_gradient_hooks_on_frozen_parameter_do_not_run(workers: Workers) -> None:
    assert workers.run(2, frozen, seconds=180) == [True, True]
