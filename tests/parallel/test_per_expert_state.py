"""State that belongs to experts and is no parameter: the same training as in one process with the unmodified module."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypeAlias

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional

from lightning_eplb import EPLBCallback, ExpertParallelStrategy, fully_shard_moe
from tests.fidelity import TOLERANCE, ShufflePolicy, trainer_for, whole
from tests.fsdp1 import DoublePrecision, fsdp1, full_state
from tests.models import loader
from tests.workers import Workers

EXPERTS, WIDTH, TOP_K, STEPS, SEQUENCES, TOKENS = 8, 16, 2, 6, 4, 8


class Experts(nn.Module):
    """Follows the protocol; subclasses hold something beside the parameters."""

    def __init__(self, experts: int = EXPERTS, width: int = WIDTH) -> None:
        super().__init__()
        self.num_experts = experts
        self.up = nn.Parameter(torch.randn(experts, width, 12, dtype=torch.float64) / 4)
        self.down = nn.Parameter(torch.randn(experts, 12, width, dtype=torch.float64) / 4)

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        self.count(hidden, index)
        output = torch.zeros_like(hidden)
        for expert in index.unique():
            token, k = torch.where(index == expert)
            inner = self.change(int(expert), torch.tanh(hidden[token] @ self.up[expert]) @ self.down[expert])
            output = output.index_add(0, token, inner * weights[token, k, None])
        return output

    def count(self, hidden: Tensor, index: Tensor) -> None:
        pass

    def change(self, expert: int, rows: Tensor) -> Tensor:
        return rows


class Buffer(Experts):
    """A scale, a bias that is not saved, a mask and a table of integers, all buffers with a row for each expert."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.linspace(0.5, 2, EXPERTS, dtype=torch.float64))
        self.register_buffer("bias", torch.randn(EXPERTS, WIDTH, dtype=torch.float64), persistent=False)
        self.register_buffer("mask", torch.rand(EXPERTS, WIDTH) > 0.3)
        self.register_buffer("group", torch.arange(EXPERTS) // 2)
        self.register_buffer("of_group", torch.tensor([1.0, 3.0, 0.2, 0.5], dtype=torch.float64))

    def change(self, expert: int, rows: Tensor) -> Tensor:
        rows = rows * self.scale[expert] * self.of_group[self.group[expert]]
        return rows * self.mask[expert] + self.bias[expert]


class SharedBuffers(Experts):
    """As many experts as the width: one buffer is each expert's, one is all experts', one a matrix of both."""

    def __init__(self) -> None:
        super().__init__(width=EXPERTS)
        self.register_buffer("scale", torch.linspace(0.5, 2, EXPERTS, dtype=torch.float64))
        self.register_buffer("by_column", torch.linspace(2, 0.5, EXPERTS, dtype=torch.float64))
        self.register_buffer("matrix", torch.randn(EXPERTS, EXPERTS, dtype=torch.float64))

    def change(self, expert: int, rows: Tensor) -> Tensor:
        return rows * self.scale[expert] * self.by_column + self.matrix[expert]


class Counters(Experts):
    """Counts tokens by expert, in two ways, and sums a statistic of the inputs; reads one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("tokens", torch.zeros(EXPERTS, dtype=torch.int32))
        self.register_buffer("norms", torch.zeros(EXPERTS, WIDTH, dtype=torch.float64))
        self.calls = torch.zeros(EXPERTS, dtype=torch.int64)

    def count(self, hidden: Tensor, index: Tensor) -> None:
        counts = torch.bincount(index.flatten(), minlength=self.num_experts)
        self.tokens += counts.to(torch.int32)
        self.calls = self.calls + counts
        pairs = hidden.detach().repeat_interleave(index.shape[1], dim=0)
        self.norms.index_add_(0, index.flatten(), pairs.abs())


class Lists(Experts):
    """A norm and a vector for each expert that are trained, numbers, functions and tensors that are not."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH, dtype=torch.float64) for _ in range(EXPERTS))
        self.vectors = nn.ParameterList(torch.randn(WIDTH, dtype=torch.float64) for _ in range(EXPERTS))
        self.numbers = [0.5 + 0.1 * expert for expert in range(EXPERTS)]
        self.functions = tuple([torch.tanh, torch.sin, functional.relu, functional.silu] * 2)
        self.tensors = torch.rand(EXPERTS, dtype=torch.float64)
        self.gates = nn.ModuleDict({str(i): nn.Linear(WIDTH, 1, dtype=torch.float64) for i in range(EXPERTS)})

    def change(self, expert: int, rows: Tensor) -> Tensor:
        rows = rows * self.gates[str(expert)](rows).sigmoid()
        rows = self.functions[expert](self.norms[expert](rows)) * self.numbers[expert]
        return rows * self.tensors[expert] + self.vectors[expert]


class Outside(Experts):
    """Holds a bias of the router, by which the router chooses, and a counter that the router writes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("correction", torch.linspace(-0.5, 0.5, EXPERTS, dtype=torch.float64))


class Saved(Experts):
    """Counts in a buffer, which a checkpoint has."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("tokens", torch.zeros(EXPERTS, dtype=torch.int64))

    def count(self, hidden: Tensor, index: Tensor) -> None:
        self.tokens = self.tokens + torch.bincount(index.flatten(), minlength=self.num_experts)


SERVED: dict[str, type[Experts]] = {
    each.__name__: each for each in (Buffer, SharedBuffers, Counters, Lists, Outside, Saved)
}


class Model(pl.LightningModule):
    """Two layers of a router and experts, on sequences of tokens."""

    def __init__(self, name: str, num_redundant_experts: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.num_redundant_experts = num_redundant_experts
        self.model = Layers(name)
        self.losses: list[float] = []

    def training_step(self, batch: tuple[Tensor], batch_idx: int) -> Tensor:
        loss = self.model(batch[0])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # Without a token one process has no gradient for an element of a list, which momentum then leaves alone.
        momentum = 0.0 if isinstance(self.model.experts[0], Lists) else 0.9
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=momentum)


class Sharded(Model):
    def configure_model(self) -> None:
        if not isinstance(self.model, FSDPModule):
            assert self.device_mesh is not None
            fully_shard_moe(self.model, self.device_mesh, num_redundant_experts=self.num_redundant_experts)


class Layers(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.experts = nn.ModuleList(SERVED[name]() for _ in range(2))
        width = self.experts[0].up.shape[1]
        self.embedding = nn.Embedding(64, width, dtype=torch.float64)
        self.routers = nn.ModuleList(nn.Linear(width, EXPERTS, dtype=torch.float64) for _ in range(2))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens.flatten())
        target = hidden.detach().roll(1, 1)
        for router, experts in zip(self.routers, self.experts, strict=True):
            scores = router(hidden).softmax(-1)
            index = (scores + getattr(experts, "correction", 0)).topk(TOP_K).indices
            hidden = hidden + experts(hidden, index, scores.gather(1, index))
        return functional.mse_loss(hidden, target)


State: TypeAlias = "dict[str, Tensor]"


def tokens() -> Tensor:
    return torch.randint(64, (STEPS * SEQUENCES, TOKENS), generator=torch.Generator().manual_seed(1))


def in_one_process(name: str) -> tuple[list[float], State]:
    module = Model(name)
    optimizer = module.configure_optimizers()
    losses = []
    for batch in tokens().split(SEQUENCES):
        loss = module.model(batch)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses, module.model.state_dict() | unsaved(module)


def unsaved(module: Model) -> State:
    """The buffers that are not saved, and the tensors that are no buffers."""
    found = {}
    for i, experts in enumerate(module.model.experts):
        values = {key: value for key, value in vars(experts).items() if isinstance(value, Tensor)}
        values |= {key: experts.get_buffer(key) for key in experts._non_persistent_buffers_set}
        found |= {f"{i}.{key}": value for key, value in values.items()}
    return found


def run(
    name: str,
    kind: str,
    redundancy: Literal["window", "batch"] = "window",
    steps: int = STEPS,
    ckpt_path: str | None = None,
    callbacks: Sequence[pl.Callback] = (),
) -> tuple[list[float], State]:
    """Train with experts that are shuffled after every step."""
    ranks = dist.get_world_size()
    module, strategy, plugins = Model(name, ranks), None, []
    if kind == "fsdp1":
        strategy, plugins = fsdp1(auto_wrap_policy={Layers}), [DoublePrecision()]
    if kind == "sharded":
        module, strategy = Sharded(name, ranks), ExpertParallelStrategy(ep_size=2)
    eplb = EPLBCallback(
        ranks,
        2 if kind == "groups" else None,
        ShufflePolicy(),
        step_interval=1,
        redundancy=redundancy,
        min_tokens_per_copy=1 if redundancy == "batch" else None,
    )
    trainer = trainer_for(
        ranks,
        strategy,
        plugins=plugins,
        max_steps=steps,
        callbacks=[eplb, *callbacks],
        enable_checkpointing=bool(callbacks),
    )
    trainer.fit(module, loader(tokens(), SEQUENCES // ranks), ckpt_path=ckpt_path)
    assert eplb.balancer is not None
    assert eplb.balancer.num_rearrangements > 0
    if kind == "fsdp1":
        return module.losses, full_state(trainer)[0] | unsaved(module)
    return module.losses, {key: whole(value) for key, value in module.model.state_dict().items()} | unsaved(module)


def difference(expected: tuple[list[float], State], ranks: list[tuple[list[float], State]]) -> float:
    """Over the last losses, the mean over ranks, and over all tensors of every rank."""
    count = len(ranks[0][0])
    mean = [sum(losses) / len(ranks) for losses in zip(*(rank[0] for rank in ranks), strict=True)]
    found = [abs(ours - theirs) for ours, theirs in zip(mean, expected[0][-count:], strict=True)]
    for _, state in ranks:
        assert state.keys() == expected[1].keys()
        found += [float((state[key].double() - value.double()).abs().max()) for key, value in expected[1].items()]
    return max(found)


@pytest.mark.parametrize("redundancy", ["window", "batch"])
@pytest.mark.parametrize("name", SERVED)
def test_per_expert_state_under_ddp_trains_as_one_process(name: str, redundancy: str, workers: Workers) -> None:
    assert difference(in_one_process(name), workers.run(2, run, name, "ddp", redundancy)) < TOLERANCE


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("Counters", "groups"),
        ("Lists", "groups"),
        ("Buffer", "sharded"),
        ("Counters", "sharded"),
        ("Buffer", "fsdp1"),
        ("Counters", "fsdp1"),
        ("Lists", "fsdp1"),
    ],
)
def test_per_expert_state_under_other_strategy_trains_as_one_process(name: str, kind: str, workers: Workers) -> None:
    assert difference(in_one_process(name), workers.run(4, run, name, kind)) < TOLERANCE


def save_halfway(name: str, kind: str, folder: str) -> None:
    checkpoint = ModelCheckpoint(folder, "half", every_n_train_steps=STEPS // 2, save_top_k=1, monitor=None)
    run(name, kind, steps=STEPS // 2, callbacks=[checkpoint])


@pytest.mark.parametrize(("kind", "ranks", "later"), [("ddp", 2, 4), ("sharded", 4, 2)])
@pytest.mark.parametrize("name", ["SharedBuffers", "Saved"])
def test_per_expert_state_resumed_on_other_ranks_trains_as_one_process(
    name: str, kind: str, ranks: int, later: int, tmp_path: Path, workers: Workers
) -> None:
    workers.run(ranks, save_halfway, name, kind, str(tmp_path))
    found = workers.run(later, run, name, "ddp", "window", STEPS, str(tmp_path / "half.ckpt"))
    assert difference(in_one_process(name), found) < TOLERANCE
