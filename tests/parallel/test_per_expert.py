"""What belongs to experts and is no parameter: the same training as in one process with the unmodified module."""

from typing import Any, Literal

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_eplb import EPLBCallback
from tests.fidelity import ShufflePolicy, trainer_for
from tests.models import loader
from tests.workers import Workers

EXPERTS, WIDTH, TOP_K, STEPS, SEQUENCES, TOKENS = 8, 16, 2, 6, 2, 8
TOLERANCE = 1e-10


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


SERVED: dict[str, type[Experts]] = {each.__name__: each for each in (Buffer, SharedBuffers, Counters, Lists, Outside)}


class Model(pl.LightningModule):
    """Two layers of a router and experts, on sequences of tokens."""

    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList(SERVED[name]() for _ in range(2))
        width = self.experts[0].up.shape[1]
        self.embedding = nn.Embedding(64, width, dtype=torch.float64)
        self.routers = nn.ModuleList(nn.Linear(width, EXPERTS, dtype=torch.float64) for _ in range(2))
        self.losses: list[float] = []

    def loss(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens.flatten())
        target = hidden.detach().roll(1, 1)
        for router, experts in zip(self.routers, self.experts, strict=True):
            scores = router(hidden).softmax(-1)
            index = (scores + getattr(experts, "correction", 0)).topk(TOP_K).indices
            hidden = hidden + experts(hidden, index, scores.gather(1, index))
        return functional.mse_loss(hidden, target)

    def training_step(self, batch: tuple[Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch[0])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def tokens(ranks: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(64, (STEPS * SEQUENCES * ranks, TOKENS), generator=generator)


def in_one_process(name: str) -> tuple[list[float], dict[str, Tensor]]:
    model = Model(name)
    optimizer = model.configure_optimizers()
    losses = []
    for batch in tokens(2).split(SEQUENCES * 2):
        loss = model.loss(batch)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses, model.state_dict() | tensors_of(model)


def tensors_of(model: Model) -> dict[str, Tensor]:
    """The buffers that are not saved, and the tensors that are no buffers."""
    found = dict(model.named_buffers())
    for i, experts in enumerate(model.experts):
        found |= {f"{i}.{key}": value for key, value in vars(experts).items() if isinstance(value, Tensor)}
    return found


def trained(name: str, redundancy: Literal["window", "batch"], redundant: int) -> tuple[list[float], dict[str, Tensor]]:
    model = Model(name)
    callback = EPLBCallback(
        redundant, policy=ShufflePolicy(), step_interval=1, redundancy=redundancy, min_tokens_per_copy=1
    )
    trainer = trainer_for(2, max_steps=STEPS, callbacks=[callback])
    trainer.fit(model, loader(tokens(2), SEQUENCES))
    assert callback.balancer is not None
    assert callback.balancer.num_rearrangements >= STEPS
    return model.losses, model.state_dict() | tensors_of(model)


def difference(expected: tuple[list[float], dict[str, Tensor]], ranks: list[Any]) -> float:
    found = [
        abs(sum(losses) / len(losses) - loss)
        for loss, *losses in zip(expected[0], *(rank[0] for rank in ranks), strict=True)
    ]
    for _, state in ranks:
        assert list(state) == list(expected[1])
        found += [float((state[key].double() - value.double()).abs().max()) for key, value in expected[1].items()]
    return max(found)


@pytest.mark.parametrize("redundancy", ["window", "batch"])
@pytest.mark.parametrize("name", SERVED)
def test_training_is_that_of_one_process(name: str, redundancy: str, workers: Workers) -> None:
    assert difference(in_one_process(name), workers.run(2, trained, name, redundancy, 4)) < TOLERANCE
