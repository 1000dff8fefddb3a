"""A layer that gets no token on any rank in some steps: its experts are trained as in one process."""

from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from lightning_eplb import EPLBCallback, ExpertParallelStrategy, fully_shard_moe, parallelize_experts
from tests.fidelity import ShufflePolicy, trainer_for, whole
from tests.models import LanguageModel, hugging_face_model, loader, token_batches
from tests.workers import Workers

WIDTH, STEPS = 16, 6
HAS_TOKENS = [False, True, False, False, True, True]
"""Of each batch."""


class SometimesExperts(nn.Module):
    """A layer that all tokens go through, and experts for the tokens that are marked: none, in some batches."""

    def __init__(self, implementation: str, checkpointing: bool = False) -> None:
        super().__init__()
        language_model: Any = hugging_face_model("mixtral", layers=1)
        self.dense = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)
        with torch.no_grad():
            self.dense.weight.copy_(torch.eye(WIDTH))
        self.router = language_model.model.layers[0].mlp.gate
        self.experts = language_model.model.layers[0].mlp.experts
        self.experts.config._experts_implementation = implementation
        self.embedding = language_model.model.embed_tokens
        self.checkpointing = checkpointing

    def forward(self, tokens: Tensor, marked: Tensor) -> Tensor:
        hidden = self.dense(self.embedding(tokens.flatten()))
        selected = hidden[marked.expand(tokens.shape).flatten()]
        if self.checkpointing:
            output = checkpoint(self.expert_outputs, selected, use_reentrant=False)
        else:
            output = self.expert_outputs(selected)
        return hidden.square().mean() + output.square().sum() / len(hidden)  # type: ignore[union-attr]

    def expert_outputs(self, hidden: Tensor) -> Tensor:
        _, weights, index = self.router(hidden)
        return hidden + self.experts(hidden, index, weights)


class Module(LanguageModel):
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self.model(*batch)


def batches(accumulation: int) -> tuple[Tensor, Tensor]:
    """Two sequences a rank and batch; whether their tokens are marked, ``[sequences, 1]``."""
    ranks, count = dist.get_world_size(), STEPS * accumulation
    marked = torch.tensor([HAS_TOKENS[batch % STEPS] for batch in range(count)])
    return token_batches(2 * ranks * count), marked.repeat_interleave(2 * ranks).unsqueeze(-1)


def reference(model: SometimesExperts, accumulation: int) -> dict[str, Tensor]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    for i, batch in enumerate(
        zip(*(each.split(2 * dist.get_world_size()) for each in batches(accumulation)), strict=True)
    ):
        (model(*batch) / accumulation).backward()
        if (i + 1) % accumulation == 0:
            optimizer.step()
            optimizer.zero_grad()
    return model.state_dict()


class ShardedModule(Module):
    def configure_model(self) -> None:
        assert self.device_mesh is not None
        fully_shard_moe(self.model, self.device_mesh, num_redundant_experts=2)


def train(
    strategy: Literal["ddp", "fsdp2"],
    implementation: str = "eager",
    accumulation: int = 1,
    redundancy: Any = "window",
    use_async: bool = False,
    checkpointing: bool = False,
    find_unused_parameters: bool = True,
) -> float:
    """The largest difference of the weights."""
    model, unmodified = (SometimesExperts(implementation, checkpointing) for _ in range(2))
    for module in (model, unmodified):  # DDP that does not look for unused parameters has zeros for the router
        module.router.requires_grad_(find_unused_parameters)
    expected = reference(unmodified, accumulation)
    callback = EPLBCallback(
        2, policy=ShufflePolicy(), step_interval=1, redundancy=redundancy, use_async=use_async, min_tokens_per_copy=None
    )
    if strategy == "ddp":
        trained: Module = Module(model, "adamw")
        parallel: Any = DDPStrategy(process_group_backend="gloo", find_unused_parameters=find_unused_parameters)
    else:
        trained, parallel = ShardedModule(model, "adamw"), ExpertParallelStrategy()
    trainer = trainer_for(
        dist.get_world_size(), parallel, max_steps=STEPS, callbacks=[callback], accumulate_grad_batches=accumulation
    )
    trainer.fit(trained, two_column_loader(*batches(accumulation)))
    weights = {name: whole(tensor) for name, tensor in trained.model.state_dict().items()}
    return max(float((weights[name] - tensor).abs().max()) for name, tensor in expected.items())


def two_column_loader(tokens: Tensor, marked: Tensor) -> Any:
    made = loader(tokens, 2)
    made.dataset.tensors = (tokens, marked)  # type: ignore[attr-defined]
    return made


@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        ("ddp", {}),
        ("ddp", {"find_unused_parameters": False}),
        ("ddp", {"redundancy": "batch", "accumulation": 2}),
        ("ddp", {"use_async": True}),
        ("ddp", {"checkpointing": True}),
        ("ddp", {"implementation": "batched_mm"}),  # which gives zeros in one process, too
        ("fsdp2", {}),
        ("fsdp2", {"redundancy": "batch", "accumulation": 2}),
        ("fsdp2", {"checkpointing": True}),
    ],
)
def test_experts_without_tokens_on_any_rank_train_as_one_process(
    strategy: Any, options: dict[str, Any], workers: Workers
) -> None:
    assert max(workers.run(2, trained_in_steps, strategy, options)) < 1e-10


def trained_in_steps(strategy: Any, options: dict[str, Any]) -> float:
    return train(strategy, **options)


class NormedExperts(nn.Module):
    """Experts and a norm that all of them share, which DDP has."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = 4
        self.up = nn.Parameter(torch.randn(4, WIDTH, WIDTH, generator=torch.Generator().manual_seed(0)))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        output = torch.zeros_like(hidden_states)
        for expert in top_k_index[top_k_index < self.num_experts].unique():
            token, k = torch.where(top_k_index == expert)
            added = self.norm(hidden_states[token] @ self.up[expert]) * top_k_weights[token, k, None]
            output = output.index_add(0, token, added)
        return output


def shared_norm(find_unused_parameters: bool) -> list[tuple[bool, bool, bool]]:
    """Which of the experts, their norm and the router have a gradient behind steps with, without and with tokens."""
    model = nn.ModuleDict({"router": nn.Linear(WIDTH, 4), "experts": NormedExperts(), "dense": nn.Linear(1, 1)})

    def forward(hidden: Tensor) -> Tensor:
        weights, index = model["router"](hidden).softmax(-1).topk(2)
        return model["experts"](hidden, index, weights).sum() + model["dense"](torch.ones(1)).sum()

    model.forward = forward  # type: ignore[method-assign]
    parallelize_experts(model)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["experts.up"])
    ddp = DistributedDataParallel(model, find_unused_parameters=find_unused_parameters)
    has_gradients = []
    for tokens in (5, 0, 3):
        model.zero_grad()
        ddp(torch.ones(tokens, WIDTH)).backward()
        grads = (model.get_parameter(name).grad for name in ("experts.up", "experts.norm.weight", "router.weight"))
        has_gradients.append(tuple(grad is not None for grad in grads))
    return has_gradients  # type: ignore[return-value]


@pytest.mark.parametrize("find_unused_parameters", [False, True])
def test_shared_parameter_without_tokens_on_any_rank_gets_zeros_under_ddp(
    find_unused_parameters: bool, workers: Workers
) -> None:
    """Plain DDP raises an error there; where it looks for unused parameters, it leaves them without a gradient."""
    waits = not find_unused_parameters
    expected = [(True, True, True), (False, waits, waits), (True, True, True)]
    assert workers.run(2, shared_norm, find_unused_parameters) == [expected, expected]


def gradients_without_tokens(ids: int) -> tuple[list[bool], bool]:
    """Which parameters of a layer have a gradient behind a batch in which all ids are behind the last expert."""
    model = SometimesExperts("eager")
    parallelize_experts(model)
    hidden = torch.ones(ids, WIDTH, dtype=torch.float64, requires_grad=True)
    index = torch.full((ids, 2), 8)
    output = model.experts(hidden, index, torch.ones(ids, 2, dtype=torch.float64))
    return [parameter.grad is not None for parameter in model.experts.parameters()], output.requires_grad


@pytest.mark.parametrize("ids", [0, 3])
def test_experts_with_invalid_ids_on_all_ranks_get_no_gradient(ids: int, workers: Workers) -> None:
    assert workers.run(2, gradients_without_tokens, ids) == [([False, False], False)] * 2
