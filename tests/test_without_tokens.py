"""A layer that gets no token on any rank in some steps: its experts are trained as in one process."""

from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_eplb import EPLBCallback, ExpertParallelStrategy, fully_shard_moe, parallelize_experts
from tests.fidelity import ShufflePolicy, trainer_for, whole
from tests.models import LanguageModel, hugging_face_model, loader, token_batches
from tests.workers import Workers

WIDTH, STEPS = 16, 6
HAS_TOKENS = [True, False, True, False, False, True]
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
) -> dict[str, float]:
    """The largest difference of the weights, of experts and of all else."""
    model = SometimesExperts(implementation, checkpointing)
    expected = reference(SometimesExperts(implementation, checkpointing), accumulation)
    callback = EPLBCallback(
        2, policy=ShufflePolicy(), step_interval=1, redundancy=redundancy, use_async=use_async, min_tokens_per_copy=None
    )
    if strategy == "ddp":
        module: Module = Module(model, "adamw")
        parallel: Any = DDPStrategy(
            cluster_environment=TorchElasticEnvironment(), process_group_backend="gloo", find_unused_parameters=True
        )
    else:
        module, parallel = ShardedModule(model, "adamw"), ExpertParallelStrategy()
    trainer = trainer_for(
        dist.get_world_size(), parallel, max_steps=STEPS, callbacks=[callback], accumulate_grad_batches=accumulation
    )
    trainer.fit(module, two_column_loader(*batches(accumulation)))
    trained = {name: whole(tensor) for name, tensor in module.model.state_dict().items()}
    differences = {name: float((trained[name] - tensor).abs().max()) for name, tensor in expected.items()}
    return {
        kind: max(v for k, v in differences.items() if ("experts" in k) == (kind == "experts"))
        for kind in ("experts", "others")
    }


def two_column_loader(tokens: Tensor, marked: Tensor) -> Any:
    made = loader(tokens, 2)
    made.dataset.tensors = (tokens, marked)  # type: ignore[attr-defined]
    return made


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"redundancy": "batch", "accumulation": 2},
        {"use_async": True},
        {"checkpointing": True},
        {"implementation": "grouped_mm"},
    ],
)
def test_experts_without_a_token_on_any_rank_train_as_in_one_process(
    strategy: str, options: dict[str, Any], workers: Workers
) -> None:
    if strategy == "fsdp2" and options.get("use_async"):
        pytest.skip("moves nothing")
    for difference in workers.run(2, lambda_free_train, strategy, options):
        assert difference["experts"] < 1e-10
        assert difference["others"] < 1e-10


def lambda_free_train(strategy: Any, options: dict[str, Any]) -> dict[str, float]:
    return train(strategy, **options)


def gradients_without_tokens(ids: int) -> tuple[list[bool], bool]:
    """Which parameters of a layer have a gradient behind a batch in which all ids are behind the last expert."""
    model = SometimesExperts("eager")
    parallelize_experts(model)
    hidden = torch.ones(ids, WIDTH, dtype=torch.float64, requires_grad=True)
    index = torch.full((ids, 2), 8)
    output = model.experts(hidden, index, torch.ones(ids, 2, dtype=torch.float64))
    return [parameter.grad is not None for parameter in model.experts.parameters()], output.requires_grad


@pytest.mark.parametrize("ids", [0, 3])
def test_ids_of_no_expert_on_any_rank_leave_no_gradient(ids: int, workers: Workers) -> None:
    assert workers.run(2, gradients_without_tokens, ids) == [([False, False], False)] * 2
