"""Experts that the ranks do not divide: phantom experts fill up the ranks, and nothing else sees them."""

from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from lightning_eplb import (
    EPLBCallback,
    ExpertLoadBalancer,
    ExpertParallelStrategy,
    clip_grad_norm_,
    fully_shard_moe,
    leave_experts_out_of_ddp,
    load_weights,
    logical_parameters,
    materialize,
    parallelize_experts,
)
from lightning_eplb.parallel.dtensor import local_shard
from lightning_eplb.parallel.parallelize import expert_layers
from tests.fidelity import TOLERANCE, ShufflePolicy, named_state, trainer_for, whole
from tests.fsdp1 import DoublePrecision, fsdp1, full_state
from tests.models import loader
from tests.workers import Workers

EXPERTS, WIDTH, HIDDEN, LAYERS, TOP_K = 7, 6, 8, 2, 2
STEPS, HALF, TOKENS = 6, 3, 84
"""Tokens of all ranks in one batch: a multiple of 1, 2, 3, 4 and 7 ranks."""
CLIP = 0.02
SECONDS = 120


class Experts(nn.Module):
    """Experts whose weights are divided by their norms, which is NaN for a row of zeros."""

    strength: Tensor
    tokens: Tensor

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.up = nn.Parameter(torch.empty(num_experts, WIDTH, HIDDEN, dtype=torch.float64))
        self.down = nn.Parameter(torch.empty(num_experts, HIDDEN, WIDTH, dtype=torch.float64))
        self.register_buffer("strength", torch.linspace(0.5, 1.5, num_experts, dtype=torch.float64))
        self.register_buffer("tokens", torch.zeros(num_experts, dtype=torch.int64))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        with torch.no_grad():
            nn.init.normal_(self.up)
            nn.init.normal_(self.down)
            self.strength.copy_(torch.linspace(0.5, 1.5, len(self.strength), dtype=torch.float64))
            self.tokens.zero_()

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        up = self.up / self.up.norm(dim=(1, 2), keepdim=True)
        output = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            token, k = torch.where(top_k_index == expert)
            if len(token):
                self.tokens[expert] += len(token)
                hidden = torch.tanh(hidden_states[token] @ up[expert]) @ self.down[expert] * self.strength[expert]
                output = output.index_add(0, token, hidden * top_k_weights[token, k, None])
        return output


class Block(nn.Module):
    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, num_experts, dtype=torch.float64)
        self.experts = Experts(num_experts)

    def forward(self, hidden_TD: Tensor) -> Tensor:
        weights_TK, index_TK = self.router(hidden_TD).softmax(dim=-1).topk(TOP_K)
        # Ids of no expert, as routers emit them where a token is dropped.
        nobody_TK = torch.where(hidden_TD[:, :1] > 0, -1, self.router.out_features)
        index_TK = torch.where(weights_TK < 0.1, nobody_TK, index_TK)
        return hidden_TD + self.experts(hidden_TD, index_TK, weights_TK)


class Model(nn.Module):
    def __init__(self, num_experts: int = EXPERTS) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(num_experts) for _ in range(LAYERS)))

    def forward(self, tokens_TD: Tensor) -> Tensor:
        return self.blocks(tokens_TD)


def make_model(num_experts: int = EXPERTS) -> Model:
    torch.manual_seed(0)
    return Model(num_experts)


def data(accumulation: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(STEPS * accumulation * TOKENS, WIDTH, dtype=torch.float64, generator=generator)


def loss_of(model: nn.Module, tokens_TD: Tensor) -> Tensor:
    return (model(tokens_TD) - tokens_TD.roll(1, dims=1)).square().mean()


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1)


class Module(pl.LightningModule):
    def __init__(self, sharded: bool = False, redundant: int = 0) -> None:
        super().__init__()
        self.model: nn.Module = make_model()
        self.is_sharded, self.redundant = sharded, redundant
        self.losses: list[float] = []

    def configure_model(self) -> None:
        if self.is_sharded and not any(True for _ in expert_layers(self.model)):
            assert self.device_mesh is not None
            fully_shard_moe(self.model, self.device_mesh, num_redundant_experts=self.redundant)

    def training_step(self, batch: tuple[Tensor], batch_idx: int) -> Tensor:
        loss = loss_of(self.model, batch[0])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return optimizer_of(self.model)


class Outcome:
    def __init__(self, losses: list[float], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.losses = losses
        self.weights = {name: whole(tensor) for name, tensor in model.state_dict().items()}
        self.state = named_state(model, optimizer)


def reference(accumulation: int = 1, clip: float = CLIP) -> Outcome:
    """One process, plain PyTorch, the unmodified model."""
    model = make_model()
    optimizer = optimizer_of(model)
    losses = []
    for i, batch in enumerate(data(accumulation).split(TOKENS)):
        loss = loss_of(model, batch)
        losses.append(loss.item())
        (loss / accumulation).backward()
        if (i + 1) % accumulation == 0:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
    return Outcome(losses, model, optimizer)


def largest_difference(expected: Outcome, ranks: list[Outcome], first_step: int = 0) -> float:
    losses = np.mean([outcome.losses for outcome in ranks], axis=0)
    differences = [float(np.abs(losses - np.array(expected.losses[first_step:])).max())]
    for outcome in ranks:
        assert list(outcome.weights) == list(expected.weights)
        for ours, theirs in ((outcome.weights, expected.weights), (outcome.state, expected.state)):
            assert sorted(ours) == sorted(theirs)
            for name, tensor in theirs.items():
                assert ours[name].shape == tensor.shape, name
                differences.append(float((ours[name].double() - tensor.double()).abs().max()))
    return max(differences)


def phantom_rows(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Every row of a phantom expert on this rank: weights, gradients, optimizer state."""
    found = []
    for layer, module in expert_layers(model):
        for parameter in module.parameters(recurse=False):
            state = [value for value in optimizer.state[parameter].values() if value.ndim]
            tensors = [parameter, *state, *([] if parameter.grad is None else [parameter.grad])]
            found += [local_shard(tensor)[layer.num_filled :] for tensor in tensors]
    return found


def own_loop(redundant: int, redundancy: Literal["window", "batch"], use_async: bool) -> tuple[Outcome, int]:
    """On every worker: DDP in a loop, two micro-batches a step, experts shuffled after every step."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model = parallelize_experts(make_model(), num_redundant_experts=redundant * ranks)
    leave_experts_out_of_ddp(model)
    wrapped = DistributedDataParallel(model)
    optimizer = optimizer_of(model)
    balancer = ExpertLoadBalancer(
        wrapped,
        [optimizer],
        policy=ShufflePolicy(),
        step_interval=1,
        redundancy=redundancy,
        min_tokens_per_copy=1 if redundancy == "batch" else None,
        use_async=use_async,
    )
    losses, rows = [], 0
    for i, batch in enumerate(data(2).split(TOKENS)):
        with wrapped.no_sync() if i % 2 == 0 else torch.enable_grad():
            loss = loss_of(wrapped, batch[rank::ranks])
            losses.append(loss.item())
            (loss / 2).backward()
        if i % 2 == 1:
            clip_grad_norm_(wrapped, CLIP)
            balancer.before_optimizer_step()
            optimizer.step()
            balancer.step()
            phantoms = phantom_rows(model, optimizer)
            assert not any(each.any() for each in phantoms)
            rows += sum(len(each) for each in phantoms)
            optimizer.zero_grad()
            assert balancer.last_step is not None
            assert balancer.last_step.load.shape == (LAYERS, EXPERTS)
    balancer.finish_rearrangement()
    assert balancer.num_rearrangements >= STEPS // 2
    n = balancer.placement.primaries_per_rank
    for result in (balancer.last_rearrangement,):
        assert result is not None
        assert 0 < result.num_rows <= LAYERS * EXPERTS
    assert (balancer.placement.by_rank[:, :, :n] == -1).sum() == LAYERS * (ranks * n - EXPERTS)
    for name, tensor in logical_parameters(wrapped).items():
        assert torch.equal(tensor, model.state_dict()[name])
    return Outcome(losses, model, optimizer), rows


@pytest.mark.parametrize(
    ("ranks", "redundant", "redundancy", "use_async"),
    [
        (2, 0, "window", False),
        (2, 1, "batch", True),
        (3, 1, "batch", False),
        pytest.param(3, 1, "window", True, marks=pytest.mark.slow),
        pytest.param(4, 0, "window", True, marks=pytest.mark.slow),
        pytest.param(4, 1, "window", False, marks=pytest.mark.slow),
    ],
)
def test_training_of_7_experts_in_own_loop_equals_one_process(
    ranks: int, redundant: int, redundancy: str, use_async: bool, workers: Workers
) -> None:
    results = workers.run(ranks, own_loop, redundant, redundancy, use_async, seconds=SECONDS)
    assert largest_difference(reference(2), [outcome for outcome, _ in results]) < TOLERANCE
    assert sum(rows for _, rows in results) > 0  # there were rows of phantom experts to look at


Kind = Literal["ddp", "sharded", "sharded into one file", "fsdp1", "fsdp1 into one file"]


def fit(kind: Kind, ranks: int, redundant: int, steps: int, **kwargs: Any) -> tuple[Module, pl.Trainer]:
    """On every worker: the Trainer, with experts that are shuffled after every step."""
    strategy, plugins = None, []
    if kind.startswith("fsdp1"):
        strategy, plugins = fsdp1(state_dict_type="full" if "file" in kind else "sharded"), [DoublePrecision()]
    elif kind.startswith("sharded"):
        strategy = ExpertParallelStrategy(save_distributed_checkpoint="file" not in kind)
    policy = ShufflePolicy(steps) if ranks > 1 else None
    eplb = EPLBCallback(redundant * ranks, policy=policy, step_interval=1)
    module = Module(kind.startswith("sharded"), redundant * ranks)
    callbacks = [eplb, *kwargs.pop("callbacks", [])]
    trainer = trainer_for(
        ranks,
        strategy,
        plugins=plugins,
        max_steps=steps,
        callbacks=callbacks,
        gradient_clip_val=CLIP,
        enable_checkpointing=len(callbacks) > 1,
    )
    trainer.fit(module, batches(ranks), **kwargs)
    return module, trainer


def batches(ranks: int) -> DataLoader:
    return loader(data(), TOKENS // ranks)


def save_halfway(kind: Kind, ranks: int, folder: str) -> list[float]:
    checkpoint = ModelCheckpoint(folder, "half", every_n_train_steps=HALF, save_top_k=1, monitor=None)
    module, trainer = fit(kind, ranks, 1, HALF, callbacks=[checkpoint])
    trainer.strategy.barrier()
    return module.losses


def resume(kind: Kind, ranks: int, redundant: int, path: str) -> Outcome:
    module, trainer = fit(kind, ranks, redundant, STEPS, ckpt_path=path)
    outcome = Outcome.__new__(Outcome)
    outcome.losses = module.losses
    if kind.startswith("fsdp1"):
        outcome.weights, outcome.state = full_state(trainer)
        return outcome
    return Outcome(module.losses, module.model, trainer.optimizers[0])


KINDS: list[Kind] = ["ddp", "sharded", "sharded into one file", "fsdp1", "fsdp1 into one file"]


@pytest.fixture(scope="module", params=KINDS)
def half(request: pytest.FixtureRequest, workers: Workers, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("half")
    losses = workers.run(2, save_halfway, request.param, 2, str(folder), seconds=SECONDS)
    assert np.abs(np.mean(losses, axis=0) - reference().losses[:HALF]).max() < TOLERANCE
    return folder / "half.ckpt"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "ranks", "redundant"), [("ddp", 1, 0), ("ddp", 3, 1), ("sharded", 4, 0), ("fsdp1", 3, 0)]
)
def test_checkpoint_of_7_experts_resumes_under_other_settings(
    half: Path, kind: Kind, ranks: int, redundant: int, workers: Workers
) -> None:
    resumed = workers.run(ranks, resume, kind, ranks, redundant, str(half), seconds=SECONDS)
    assert largest_difference(reference(), resumed, HALF) < TOLERANCE


@pytest.mark.slow
def test_checkpoint_of_7_experts_resumes_with_one_on_each_rank(half: Path) -> None:
    workers = Workers(7)
    try:
        resumed = workers.run(7, resume, "ddp", 7, 0, str(half), seconds=4 * SECONDS)
    finally:
        workers.stop()
    assert largest_difference(reference(), resumed, HALF) < TOLERANCE


def test_checkpoint_of_7_experts_loads_into_unmodified_model(half: Path) -> None:
    loaded = load_weights(make_model(), half)
    expected = half_trained()
    for name, tensor in loaded.state_dict().items():
        assert float((tensor.double() - expected[name].double()).abs().max()) < TOLERANCE
    if half.is_file():
        state = torch.load(half, weights_only=False)["state_dict"]
        Module().load_state_dict(state, strict=True)


def half_trained() -> dict[str, Tensor]:
    model = make_model()
    optimizer = optimizer_of(model)
    for batch in data().split(TOKENS)[:HALF]:
        loss_of(model, batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


def hooked() -> list[float]:
    """On every worker: a hook that scales by the norm of all experts' gradients, and what it was given."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    given = []

    def scale(grad: Tensor) -> Tensor:
        given.append(grad)
        return grad / grad.norm()

    model = parallelize_experts(make_model())
    ((layer, module), *_) = expert_layers(model)
    parameter = module.up
    assert isinstance(parameter, nn.Parameter)
    parameter.register_hook(scale)
    loss_of(model, data()[rank:TOKENS:ranks]).backward()

    expected = make_model()
    loss_of(expected, data()[:TOKENS]).backward()
    grad = expected.blocks[0].experts.up.grad
    assert given[0].shape == grad.shape
    own = grad[layer.local_experts] / grad.norm()
    assert parameter.grad is not None
    assert not parameter.grad[layer.num_filled :].any()
    return [float((given[0] - grad).abs().max()), float((parameter.grad[: layer.num_filled] - own).abs().max())]


def test_gradient_hook_of_7_experts_gets_rows_of_7(workers: Workers) -> None:
    for differences in workers.run(3, hooked):
        assert max(differences) < TOLERANCE


def on_meta(path: str) -> float:
    """On every worker: memory for this rank's part, random weights or those of a checkpoint."""
    worst = 0.0
    for loads in (False, True):
        with torch.device("meta"):
            model = Model()
        parallelize_experts(model)
        if loads:
            load_weights(model, path)
            weights, expected = logical_parameters(model), torch.load(path, weights_only=True)["state_dict"]
            worst = max(float((weights[name] - expected[f"model.{name}"]).abs().max()) for name in weights)
        else:
            materialize(model, "cpu")
            assert all(tensor.any() for tensor in logical_parameters(model).values())
        for layer, module in expert_layers(model):
            for parameter in module.parameters(recurse=False):
                assert len(parameter) == layer.num_primaries
                assert not parameter[layer.num_filled :].any()
    return worst


def test_model_of_7_experts_on_meta_device_has_phantom_experts_of_zeros(workers: Workers, tmp_path: Path) -> None:
    state = {f"model.{name}": tensor for name, tensor in make_model().state_dict().items()}
    torch.save({"state_dict": state, "pytorch-lightning_version": pl.__version__}, tmp_path / "saved.ckpt")
    assert workers.run(2, on_meta, str(tmp_path / "saved.ckpt")) == [0.0, 0.0]


def distill(num_experts: int) -> Outcome:
    """On every worker: a student learns from a frozen teacher of 7 experts, and experts of all of them move."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    pair = Pair(num_experts)
    parallelize_experts(pair, num_redundant_experts=ranks)
    leave_experts_out_of_ddp(pair)
    wrapped = DistributedDataParallel(pair)
    optimizer = optimizer_of(pair.student)
    balancer = ExpertLoadBalancer(wrapped, [optimizer], policy=ShufflePolicy(), step_interval=1)
    losses = []
    for batch in data().split(TOKENS):
        loss = wrapped(batch[rank::ranks])
        losses.append(loss.item())
        loss.backward()
        clip_grad_norm_(wrapped, CLIP)
        optimizer.step()
        balancer.step()
        optimizer.zero_grad()
    moved = {tuple(layer.row_order.tolist()) for layer, _ in expert_layers(pair)}
    assert len(moved) == 2 * LAYERS
    outcome = Outcome(losses, pair, torch.optim.SGD(pair.parameters()))
    outcome.state = named_state(pair.student, optimizer)
    return outcome


class Pair(nn.Module):
    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.teacher, self.student = make_model().requires_grad_(False), make_model(num_experts)

    def forward(self, tokens_TD: Tensor) -> Tensor:
        return (self.student(tokens_TD) - 2 * self.teacher(tokens_TD)).square().mean()


@pytest.mark.parametrize("num_experts", [7, 8])
def test_student_of_a_frozen_teacher_of_7_experts_trains_as_in_one_process(num_experts: int, workers: Workers) -> None:
    expected = Outcome.__new__(Outcome)
    pair = Pair(num_experts)
    optimizer = optimizer_of(pair.student)
    expected.losses = []
    for batch in data().split(TOKENS):
        loss = pair(batch)
        expected.losses.append(loss.item())
        loss.backward()
        nn.utils.clip_grad_norm_(pair.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
    expected.weights, expected.state = pair.state_dict(), named_state(pair.student, optimizer)
    assert largest_difference(expected, workers.run(2, distill, num_experts, seconds=SECONDS)) < TOLERANCE
