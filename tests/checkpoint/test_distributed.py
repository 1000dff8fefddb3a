"""Checkpoints under Lightning's ``FSDPStrategy``, and shards that are loaded into others.

That a run goes on is in ``tests/test_resume.py``, for all strategies.
"""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh

from lightning_eplb import EPLBCallback, ExpertParallelStrategy
from lightning_eplb.parallel.dtensor import local_shard
from tests.checkpoint.test_checkpoint import (
    HALF,
    STEPS,
    batches,
    check_file,
    half_trained,
    largest_difference,
    mean_difference,
    uninterrupted,
)
from tests.fidelity import TOLERANCE, ShufflePolicy, trainer_for
from tests.fsdp1 import DoublePrecision, fsdp1, full_state, full_state_dicts
from tests.models import LanguageModel, ShardedLanguageModel, hugging_face_model
from tests.workers import Workers

SECONDS = 200
SHARDED = {"state_dict_type": "sharded"}


def trainer_of(ranks: int, steps: int, ep_size: int | None, callbacks: tuple[Any, ...] = (), **strategy: Any) -> Any:
    """With experts that are shuffled after every step; ``ep_size=None`` is Lightning without us."""
    if strategy.get("sharding_strategy") == "HYBRID_SHARD":
        strategy["device_mesh"] = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    if strategy.pop("wraps_experts", False):
        from transformers.models.mixtral.modeling_mixtral import MixtralDecoderLayer, MixtralExperts

        strategy["auto_wrap_policy"] = {MixtralDecoderLayer, MixtralExperts}
        strategy["activation_checkpointing_policy"] = {MixtralDecoderLayer}
    eplb = [] if ep_size is None else [EPLBCallback(ep_size, ep_size, ShufflePolicy(), window_size=4, step_interval=1)]
    return trainer_for(
        ranks,
        fsdp1(**strategy),
        plugins=[DoublePrecision()],
        max_steps=steps,
        callbacks=[*eplb, *callbacks],
        enable_checkpointing=bool(callbacks),
    )


def save_halfway(ranks: int, folder: str, settings: dict[str, Any], weights_only: bool = False) -> list[float]:
    checkpoint = ModelCheckpoint(
        folder, "half", every_n_train_steps=HALF, save_top_k=1, save_weights_only=weights_only, monitor=None
    )
    module = LanguageModel(hugging_face_model("mixtral"), "adamw")
    trainer_of(ranks, HALF, callbacks=(checkpoint,), **settings).fit(module, batches(ranks))
    return module.losses


def resume(ranks: int, path: str, settings: dict[str, Any]) -> tuple[list[float], dict[str, Tensor]]:
    module = LanguageModel(hugging_face_model("mixtral"), "adamw")
    trainer = trainer_of(ranks, STEPS, **settings)
    trainer.fit(module, batches(ranks), ckpt_path=path)
    return module.losses, full_state(trainer)[0]


@pytest.mark.parametrize("weights_only", [False, True])
def test_checkpoint_of_sharded_model_is_file_of_unmodified_model(
    weights_only: bool, workers: Workers, tmp_path: Path
) -> None:
    workers.run(2, save_halfway, 2, str(tmp_path), {"ep_size": 2}, weights_only, seconds=SECONDS)
    check_file(tmp_path / "half.ckpt", weights_only)


CHANGES: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "to unmodified": (2, {"ep_size": 2, **SHARDED}, {"ep_size": None}),
    "from unmodified": (2, {"ep_size": None, **SHARDED}, {"ep_size": 2}),
    "file to unmodified": (2, {"ep_size": 2}, {"ep_size": None}),
    "other wrappers": (2, {"ep_size": 2, "wraps_experts": True, **SHARDED}, {"ep_size": 2}),
    "to other wrappers": (2, {"ep_size": 2}, {"ep_size": 2, "wraps_experts": True}),
    "several groups": (4, {"ep_size": 2, **SHARDED}, {"ep_size": 4}),
    "flat experts": (4, {"ep_size": 4, **SHARDED}, {"ep_size": 1}),
    "nothing flat": (4, {"ep_size": 1, **SHARDED}, {"ep_size": 2, "sharding_strategy": "NO_SHARD"}),
    "replicas": (4, {"ep_size": 2, "sharding_strategy": "HYBRID_SHARD", **SHARDED}, {"ep_size": 4}),
    "to replicas": (4, {"ep_size": 4, **SHARDED}, {"ep_size": 2, "sharding_strategy": "HYBRID_SHARD"}),
}
"""Ranks, and how they save and resume."""


@pytest.mark.parametrize("change", CHANGES)
def test_checkpoint_resumed_with_other_sharding_trains_as_uninterrupted(
    change: str, workers: Workers, tmp_path: Path
) -> None:
    ranks, saves, resumes = CHANGES[change]
    losses, weights = uninterrupted()
    workers.run(ranks, save_halfway, ranks, str(tmp_path), saves, seconds=SECONDS)
    path = tmp_path / "half.ckpt"
    assert path.is_dir() == ("state_dict_type" in saves)
    resumed = workers.run(ranks, resume, ranks, str(path), resumes, seconds=SECONDS)
    assert mean_difference([losses_of_rank for losses_of_rank, _ in resumed], losses[HALF:]) < TOLERANCE
    for _, weights_of_rank in resumed:
        assert largest_difference(weights_of_rank, weights) < TOLERANCE


def test_sharded_checkpoint_on_each_rank_holds_its_own_part(workers: Workers) -> None:
    for held, total in workers.run(4, bytes_of_experts_in_a_checkpoint, seconds=SECONDS):
        assert 4 * held == total > 0


def bytes_of_experts_in_a_checkpoint() -> tuple[int, int]:
    """Of weights and optimizer state: what this rank holds, and the whole."""
    trainer = trainer_of(4, 2, 4, state_dict_type="sharded")
    trainer.fit(LanguageModel(hugging_face_model("mixtral"), "adamw"), batches(4))
    gathers = mock.patch("lightning_eplb.parallel.state_dict.gather_rows", side_effect=AssertionError("rows gathered"))
    with gathers:
        checkpoint = trainer._checkpoint_connector.dump_checkpoint()
    tensors = [tensor for name, tensor in checkpoint["state_dict"].items() if ".experts." in name]
    states = checkpoint["optimizer_states"][0]["state"]
    tensors += [value for name in states if ".experts." in name for key, value in states[name].items() if key != "step"]
    assert len(tensors) == 3 * 2 * 2  # weights and two moments, of two parameters in two layers
    everything = [*checkpoint["state_dict"].values(), *tensors]
    assert all(isinstance(t, ShardedTensor) or local_shard(t).numel() <= t.numel() // 4 for t in everything)
    return (
        sum(local_shard(tensor).numel() * tensor.element_size() for tensor in tensors),
        sum(tensor.numel() * tensor.element_size() for tensor in tensors),
    )


def test_sharded_checkpoint_of_weights_only_loads_and_cannot_resume(workers: Workers, tmp_path: Path) -> None:
    workers.run(2, save_halfway, 2, str(tmp_path), {"ep_size": 2, **SHARDED}, True, seconds=SECONDS)
    for weights, message in workers.run(2, use_weights_alone, str(tmp_path / "half.ckpt"), seconds=SECONDS):
        assert largest_difference(weights, half_trained()) < TOLERANCE
        assert "checkpoint contains only the model" in message


def use_weights_alone(path: str) -> tuple[dict[str, Tensor], str]:
    """Return what validation has, and what a run says that would go on from there."""
    module, trainer = LanguageModel(hugging_face_model("mixtral"), "adamw"), trainer_of(2, STEPS, 2)
    trainer.validate(module, batches(2), ckpt_path=path, verbose=False)
    with full_state_dicts(trainer.strategy.model, rank0_only=False):
        state = trainer.strategy.model.state_dict()
    with pytest.raises(KeyError) as raised:
        resume(2, path, {"ep_size": 2})
    return {name.removeprefix("model."): tensor.clone() for name, tensor in state.items()}, str(raised.value)


class WithMore(ShardedLanguageModel):
    """Another parameter, which no loss depends on: no optimizer keeps a state for it."""

    def __init__(self, name: str) -> None:
        super().__init__(hugging_face_model("mixtral"), "adamw")
        self.model.register_parameter(name, nn.Parameter(torch.ones(4, dtype=torch.float64)))


def fit_with_more(name: str, kind: str, steps: int, path: str | None, strict: bool = True) -> tuple[Any, Any]:
    strategy, plugins = ExpertParallelStrategy(), []
    if kind == "fsdp1":
        strategy, plugins = fsdp1(**SHARDED), [DoublePrecision()]
    eplb = EPLBCallback(policy=ShufflePolicy(), window_size=4, step_interval=1)
    trainer = trainer_for(2, strategy, plugins=plugins, max_steps=steps, callbacks=[eplb])
    module = WithMore(name)
    module.strict_loading = strict
    if kind == "fsdp1":
        module.configure_model = lambda: None
    trainer.fit(module, batches(2), ckpt_path=path)
    return module, trainer


def save_with_more(name: str, kind: str, path: str) -> None:
    _, trainer = fit_with_more(name, kind, HALF, None)
    trainer.save_checkpoint(path)


def resume_with_more(name: str, kind: str, path: str, strict: bool = True) -> list[float] | str:
    try:
        module, _ = fit_with_more(name, kind, STEPS, path, strict)
    except CheckpointException as error:
        return str(error)
    return module.losses


@pytest.mark.parametrize("kind", ["sharded", "fsdp1"])
def test_resume_with_parameter_that_was_not_saved_needs_strict_false(
    kind: str, workers: Workers, tmp_path: Path
) -> None:
    """The first resume has the same parameters, the others one that was not saved."""
    losses, path = uninterrupted()[0], str(tmp_path / "half.ckpt")
    workers.run(2, save_with_more, "unused", kind, path, seconds=SECONDS)
    for name, strict in [("unused", True), ("new", False)]:
        resumed = workers.run(2, resume_with_more, name, kind, path, strict, seconds=SECONDS)
        assert mean_difference(resumed, losses[HALF:]) < TOLERANCE
    for message in workers.run(2, resume_with_more, "new", kind, path, seconds=SECONDS):
        assert "Missing key in checkpoint state_dict" in message
        assert "model.new" in message
