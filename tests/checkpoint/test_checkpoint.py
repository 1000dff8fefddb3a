"""Checkpoints of ``Trainer`` are the unmodified model's, and resume on other ranks and redundancy."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_eplb import EPLBCallback, parallelize_experts
from lightning_eplb.parallel import barrier
from tests.fidelity import SEQUENCES, TOLERANCE, ShufflePolicy, trainer_for
from tests.models import LanguageModel, hugging_face_model, language_loss, loader, optimizer_of, token_batches
from tests.workers import WorkerError, Workers

STEPS, HALF = 10, 5
BATCH = 4 * SEQUENCES  # of all ranks together, so that 2 and 4 ranks train on the same


def batches(ranks: int) -> Any:
    return loader(token_batches(STEPS * BATCH), BATCH // ranks)


def callback(ranks: int, redundant: int) -> EPLBCallback:
    return EPLBCallback(redundant * ranks, policy=ShufflePolicy(), step_interval=1, window_size=4)


def save_halfway(ranks: int, redundant: int, folder: str, weights_only: bool = False) -> list[float]:
    module = LanguageModel(hugging_face_model("mixtral"), "adamw")
    checkpoint = ModelCheckpoint(
        folder, "half", every_n_train_steps=HALF, save_top_k=1, save_weights_only=weights_only, monitor=None
    )
    trainer = trainer_for(
        ranks, max_steps=HALF, callbacks=[callback(ranks, redundant), checkpoint], enable_checkpointing=True
    )
    trainer.fit(module, batches(ranks))
    return module.losses


def resume(ranks: int, redundant: int, path: str) -> tuple[list[float], dict[str, Tensor], int]:
    module = LanguageModel(hugging_face_model("mixtral"), "adamw")
    eplb = callback(ranks, redundant)
    trainer = trainer_for(ranks, max_steps=STEPS, callbacks=[eplb])
    trainer.fit(module, batches(ranks), ckpt_path=path)
    assert eplb.balancer is not None
    assert eplb.balancer.load.num_steps == 4
    return module.losses, module.model.state_dict(), eplb.balancer.num_steps


def uninterrupted() -> tuple[list[float], dict[str, Tensor]]:
    model = hugging_face_model("mixtral")
    optimizer = optimizer_of("adamw", model)
    losses = []
    for batch in token_batches(STEPS * BATCH).split(BATCH):
        optimizer.zero_grad()
        loss = language_loss(model, batch)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    return losses, model.state_dict()


def largest_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    assert list(ours) == list(theirs)
    return max(float((ours[name] - theirs[name]).abs().max()) for name in theirs)


def half_trained(steps: int = HALF) -> dict[str, Tensor]:
    model = hugging_face_model("mixtral")
    optimizer = optimizer_of("adamw", model)
    for batch in token_batches(STEPS * BATCH).split(BATCH)[:steps]:
        optimizer.zero_grad()
        language_loss(model, batch).backward()
        optimizer.step()
    return model.state_dict()


def check_file(path: Path, weights_only: bool) -> None:
    """Check that the state saved halfway is the unmodified model's, and its optimizer's."""
    checkpoint = torch.load(path, weights_only=True)
    unmodified = LanguageModel(hugging_face_model("mixtral"), "adamw")
    assert list(checkpoint["state_dict"]) == list(unmodified.state_dict())
    unmodified.load_state_dict(checkpoint["state_dict"], strict=True)
    assert largest_difference(unmodified.model.state_dict(), half_trained()) < TOLERANCE
    assert ("optimizer_states" in checkpoint) is not weights_only
    if not weights_only:
        optimizer = unmodified.configure_optimizers()
        optimizer.load_state_dict(checkpoint["optimizer_states"][0])
        for parameter, state in optimizer.state.items():
            assert state["exp_avg"].shape == parameter.shape


@pytest.mark.parametrize("weights_only", [False, True])
def test_checkpoint_of_two_ranks_is_file_of_unmodified_model(
    weights_only: bool, workers: Workers, tmp_path: Path
) -> None:
    workers.run(2, save_halfway, 2, 1, str(tmp_path), weights_only)
    check_file(tmp_path / "half.ckpt", weights_only)


@pytest.mark.parametrize(
    ("ranks", "redundant", "then_ranks", "then_redundant"), [(2, 0, 4, 0), (4, 1, 2, 0), (2, 1, 2, 0), (2, 0, 4, 1)]
)
def test_checkpoint_resumed_at_other_sizes_trains_as_uninterrupted(
    ranks: int, redundant: int, then_ranks: int, then_redundant: int, workers: Workers, tmp_path: Path
) -> None:
    losses, weights = uninterrupted()
    first = workers.run(ranks, save_halfway, ranks, redundant, str(tmp_path))
    assert mean_difference(first, losses[:HALF]) < TOLERANCE
    then = workers.run(then_ranks, resume, then_ranks, then_redundant, str(tmp_path / "half.ckpt"))
    assert mean_difference([losses_of_rank for losses_of_rank, _, _ in then], losses[HALF:]) < TOLERANCE
    for _, weights_of_rank, num_steps in then:
        assert largest_difference(weights_of_rank, weights) < TOLERANCE
        assert num_steps == STEPS


def mean_difference(losses_of_ranks: list[list[float]], expected: list[float]) -> float:
    mean = torch.tensor(losses_of_ranks, dtype=torch.float64).mean(dim=0)
    return float((mean - torch.tensor(expected, dtype=torch.float64)).abs().max())


def weights_resume(ranks: int, redundant: int, path: str) -> dict[str, Tensor]:
    module = LanguageModel(hugging_face_model("mixtral"), "adamw")
    trainer = trainer_for(ranks, callbacks=[callback(ranks, redundant)])
    trainer.validate(module, batches(ranks), ckpt_path=path, verbose=False)
    return module.model.state_dict()


def test_weights_only_checkpoint_at_other_sizes_loads_same_weights(workers: Workers, tmp_path: Path) -> None:
    workers.run(2, save_halfway, 2, 1, str(tmp_path), True)
    for weights in workers.run(4, weights_resume, 4, 0, str(tmp_path / "half.ckpt")):
        assert largest_difference(weights, half_trained()) < TOLERANCE


def only_rank_zero_calls_state_dict() -> str:
    model = parallelize_experts(hugging_face_model("mixtral"))
    if dist.get_rank() == 0:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(barrier, "CPU_GROUP_TIMEOUT", timedelta(seconds=1))
            with pytest.raises(RuntimeError) as raised:
                model.state_dict()
        return str(raised.value)
    return ""


def test_state_dict_on_one_rank_alone_raises(workers: Workers) -> None:
    message, _ = workers.run(2, only_rank_zero_calls_state_dict)
    assert "every rank must call it" in message


def load_rows_of_one_rank() -> None:
    model = parallelize_experts(hugging_face_model("mixtral"))
    model.load_state_dict({name: parameter.detach() for name, parameter in model.named_parameters()})


def test_load_state_dict_of_one_ranks_rows_raises(workers: Workers) -> None:
    with pytest.raises(WorkerError, match=r"gate_up_proj has shape \[4, 48, 16\]; loading takes all 8 experts"):
        workers.run(2, load_rows_of_one_rank)
