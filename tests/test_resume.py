"""A run goes on elsewhere: from DDP or sharded, to DDP or sharded, on other ranks and with other redundancy."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_eplb import ExpertParallelStrategy, materialize, parallelize_experts
from lightning_eplb.parallel.dtensor import local_shard
from tests.checkpoint.test_checkpoint import (
    HALF,
    STEPS,
    batches,
    callback,
    largest_difference,
    mean_difference,
    uninterrupted,
)
from tests.fidelity import TOLERANCE, trainer_for, whole
from tests.fsdp1 import DoublePrecision, fsdp1, full_state
from tests.models import LanguageModel, ShardedLanguageModel, hugging_face_model
from tests.workers import Workers

SECONDS = 200
ON_META = pytest.mark.parametrize("half", ["ddp", "sharded"], indirect=True)
"""A file and a folder: what becomes of a model on the meta device is no matter of who saved."""
KINDS = ["ddp", "sharded", "fsdp1"]
SAVED_BY = ["ddp", "sharded", "sharded into one file", "fsdp1", "fsdp1 into one file"]


def run(
    kind: str,
    ranks: int,
    redundant: int,
    steps: int,
    ckpt_path: str | None = None,
    save_distributed: bool = True,
    callbacks: tuple[Any, ...] = (),
    weights_only: bool | None = None,
) -> tuple[LanguageModel, Any]:
    """Train with experts that are shuffled after every step; sharded over pairs of EP ranks."""
    model, plugins = hugging_face_model("mixtral"), []
    module, strategy = LanguageModel(model, "adamw"), None
    eplb = callback(ranks, redundant)
    if kind == "fsdp1":
        strategy, plugins = fsdp1(state_dict_type="sharded" if save_distributed else "full"), [DoublePrecision()]
    if kind == "sharded":
        eplb.num_redundant_experts = 2 * redundant
        module = ShardedLanguageModel(model, "adamw", 2 * redundant)
        strategy = ExpertParallelStrategy(ep_size=2, save_distributed_checkpoint=save_distributed)
    trainer = trainer_for(
        ranks,
        strategy,
        plugins=plugins,
        max_steps=steps,
        callbacks=[eplb, *callbacks],
        enable_checkpointing=bool(callbacks),
    )
    trainer.fit(module, batches(ranks), ckpt_path=ckpt_path, weights_only=weights_only)
    return module, trainer


def save_halfway(kind: str, ranks: int, redundant: int, folder: str, save_distributed: bool = True) -> list[float]:
    checkpoint = ModelCheckpoint(folder, "half", every_n_train_steps=HALF, save_top_k=1, monitor=None)
    module, _ = run(kind, ranks, redundant, HALF, None, save_distributed, (checkpoint,))
    return module.losses


def resume(kind: str, ranks: int, redundant: int, path: str) -> tuple[list[float], dict[str, Tensor]]:
    module, trainer = run(kind, ranks, redundant, STEPS, path)
    if kind == "fsdp1":
        weights, _ = full_state(trainer)
        return module.losses, weights
    return module.losses, {name: whole(tensor) for name, tensor in module.model.state_dict().items()}


TABLE = list(itertools.product(SAVED_BY, KINDS, (2, 4), (0, 1)))
"""Kind that saved, kind that resumes, its ranks, its redundant experts a rank. All of it: ``tests/soak``."""


def table() -> list[Any]:
    """Each pair once, on each of the ranks and redundancies in turn; the rest of DDP and FSDP2 is slow."""
    turns = itertools.cycle([(2, 1), (4, 0), (4, 1), (2, 0)])
    once = [(*pair, *turn) for pair, turn in zip(itertools.product(SAVED_BY, KINDS), turns, strict=False)]
    more = [case for case in TABLE if {*case[:2]} <= {"ddp", "sharded"} and case not in once]
    return sorted(once, key=TABLE.index) + [pytest.param(*case, marks=pytest.mark.slow) for case in more]


@pytest.fixture(scope="module", params=SAVED_BY)
def half(request: pytest.FixtureRequest, workers: Workers, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("half")
    kind, _, file = request.param.partition(" ")
    ranks = 2 if kind == "ddp" else 4
    losses = workers.run(ranks, save_halfway, kind, ranks, 1, str(folder), not file, seconds=SECONDS)
    assert mean_difference(losses, uninterrupted()[0][:HALF]) < TOLERANCE
    path = folder / "half.ckpt"
    assert path.is_dir() == (kind != "ddp" and not file)
    return path


@pytest.mark.parametrize(("half", "kind", "ranks", "redundant"), table(), indirect=["half"])
def test_resume_under_other_settings_trains_as_uninterrupted(
    half: Path, kind: str, ranks: int, redundant: int, workers: Workers
) -> None:
    losses, weights = uninterrupted()
    resumed = workers.run(ranks, resume, kind, ranks, redundant, str(half), seconds=SECONDS)
    assert mean_difference([losses_of_rank for losses_of_rank, _ in resumed], losses[HALF:]) < TOLERANCE
    for _, weights_of_rank in resumed:
        assert largest_difference(weights_of_rank, weights) < TOLERANCE


class BuiltOnMeta(ShardedLanguageModel):
    """Never has memory for more than this rank's shards."""

    def __init__(self) -> None:
        super().__init__(nn.Identity(), "adamw", 2)

    def configure_model(self) -> None:
        if isinstance(self.model, nn.Identity):
            with torch.device("meta"):
                self.model = hugging_face_model("mixtral")
            super().configure_model()
            assert all(parameter.is_meta for parameter in self.model.parameters())


def resume_on_meta(path: str) -> tuple[list[float], dict[str, Tensor]]:
    eplb = callback(4, 0)
    eplb.num_redundant_experts = 2
    trainer = trainer_for(4, ExpertParallelStrategy(ep_size=2), max_steps=STEPS, callbacks=[eplb])
    module = BuiltOnMeta()
    trainer.fit(module, batches(4), ckpt_path=path)
    return module.losses, {name: whole(tensor) for name, tensor in module.model.state_dict().items()}


@ON_META
def test_resume_on_meta_device_trains_as_uninterrupted(half: Path, workers: Workers) -> None:
    losses, weights = uninterrupted()
    resumed = workers.run(4, resume_on_meta, str(half), seconds=SECONDS)
    assert mean_difference([losses_of_rank for losses_of_rank, _ in resumed], losses[HALF:]) < TOLERANCE
    for _, weights_of_rank in resumed:
        assert largest_difference(weights_of_rank, weights) < TOLERANCE


class BuiltOnMetaUnderDDP(LanguageModel):
    """Each rank has memory for its experts and what all share."""

    def __init__(self, in_configure_model: bool) -> None:
        super().__init__(nn.Identity() if in_configure_model else self._build(), "adamw")

    def configure_model(self) -> None:
        if isinstance(self.model, nn.Identity):
            self.model = materialize(parallelize_experts(self._build(), num_redundant_experts=2))

    @staticmethod
    def _build() -> nn.Module:
        with torch.device("meta"):
            return hugging_face_model("mixtral")


def resume_on_meta_under_ddp(path: str, in_configure_model: bool) -> tuple[list[float], dict[str, Tensor]]:
    module = BuiltOnMetaUnderDDP(in_configure_model)
    trainer_for(2, max_steps=STEPS, callbacks=[callback(2, 1)]).fit(module, batches(2), ckpt_path=path)
    return module.losses, {name: whole(tensor) for name, tensor in module.model.state_dict().items()}


@ON_META
@pytest.mark.parametrize("in_configure_model", [True, False])
def test_resume_on_meta_device_under_ddp_trains_as_uninterrupted(
    half: Path, in_configure_model: bool, workers: Workers
) -> None:
    losses, weights = uninterrupted()
    resumed = workers.run(2, resume_on_meta_under_ddp, str(half), in_configure_model, seconds=SECONDS)
    assert mean_difference([losses_of_rank for losses_of_rank, _ in resumed], losses[HALF:]) < TOLERANCE
    for _, weights_of_rank in resumed:
        assert largest_difference(weights_of_rank, weights) < TOLERANCE


def test_saving_of_sharded_model_holds_shard_twice_at_most(workers: Workers, tmp_path: Path) -> None:
    for held, live, total in workers.run(4, bytes_while_saving, str(tmp_path / "saved"), seconds=SECONDS):
        assert live < held <= 2 * live
        assert live < 0.3 * total  # a quarter, beside counters and buffers


def bytes_while_saving(path: str) -> tuple[int, int, int]:
    """On this rank when a checkpoint is written: all that is held, what training holds anyway; and the whole."""
    module, trainer = run("sharded", 4, 1, 2)
    (optimizer,) = trainer.optimizers
    kept = [*module.parameters(), *(v for state in optimizer.state.values() for v in state.values())]
    live = storages(local_shard(tensor) for tensor in kept)
    checkpoint = trainer._checkpoint_connector.dump_checkpoint()
    written = storages(local_shard(tensor) for tensor in tensors_in(checkpoint))
    trainer.save_checkpoint(path)
    total = sum(tensor.numel() * tensor.element_size() for tensor in kept)
    return sum((live | written).values()), sum(live.values()), total


def storages(tensors: Any) -> dict[int, int]:
    """Bytes of each piece of memory once, by its address."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}


def tensors_in(tree: Any) -> list[Tensor]:
    if isinstance(tree, torch.Tensor):
        return [tree]
    parts = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else []
    return [tensor for part in parts for tensor in tensors_in(part)]


def test_resume_into_model_with_moved_experts_trains_as_uninterrupted(workers: Workers, tmp_path: Path) -> None:
    workers.run(2, save_halfway, "ddp", 2, 0, str(tmp_path), seconds=SECONDS)
    for difference in workers.run(2, load_twice, str(tmp_path / "half.ckpt"), seconds=SECONDS):
        assert difference < TOLERANCE


def load_twice(path: str) -> float:
    """The second time into the model of the first, which was shuffled meanwhile."""
    module, first = run("sharded", 2, 1, STEPS, path)
    (eplb, *_) = (c for c in first.callbacks if type(c).__name__ == "EPLBCallback")
    trainer = trainer_for(2, ExpertParallelStrategy(), max_steps=STEPS, callbacks=[eplb])
    module.losses.clear()
    trainer.fit(module, batches(2), ckpt_path=path)
    return largest_difference(
        {name: whole(tensor) for name, tensor in module.model.state_dict().items()}, uninterrupted()[1]
    )
