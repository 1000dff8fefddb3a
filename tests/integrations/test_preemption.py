"""SIGTERM and SLURM's signals: all ranks save after the same step, and end so that they are started again."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.environments import LightningEnvironment

from lightning_eplb import EPLBCallback, ExpertParallelStrategy, PreemptionCheckpoint
from tests.fidelity import ShufflePolicy, trainer_for
from tests.models import LanguageModel, ShardedLanguageModel, hugging_face_model, loader, token_batches
from tests.workers import Workers


class SignalAt(Callback):
    """Sends a signal to one rank in the forward pass of a batch."""

    def __init__(self, rank: int, batch: int, number: int) -> None:
        self.rank, self.batch, self.number = rank, batch, number

    def on_before_zero_grad(self, trainer: Any, module: Any, *_: Any) -> None:
        if trainer.global_rank == self.rank and trainer.fit_loop.epoch_loop.batch_idx == self.batch:
            os.kill(os.getpid(), self.number)


def fit(
    ranks: int,
    folder: str,
    signals: tuple[Callback, ...] = (),
    kind: str = "ddp",
    accumulation: int = 1,
    steps: int = 8,
    ckpt_path: str | None = None,
    environment: Any = None,
) -> tuple[int, int | None, Any]:
    """Optimizer steps done, exit code if there is one, and SIGTERM's handler afterwards."""
    module, strategy = LanguageModel(hugging_face_model("mixtral"), "adamw"), None
    if kind == "sharded":
        module = ShardedLanguageModel(hugging_face_model("mixtral"), "adamw")
        strategy = ExpertParallelStrategy()
    checkpoint = PreemptionCheckpoint(folder, "last", every_n_train_steps=100, enable_version_counter=False)
    trainer = trainer_for(
        ranks,
        strategy,
        max_steps=steps,
        accumulate_grad_batches=accumulation,
        callbacks=[EPLBCallback(policy=ShufflePolicy(), step_interval=1), checkpoint, *signals],
        enable_checkpointing=True,
        **({"plugins": [environment]} if environment is not None else {}),
    )
    code = None
    try:
        trainer.fit(module, loader(token_batches(64), 1), ckpt_path=ckpt_path)
    except SystemExit as error:
        code = error.code
    return trainer.global_step, code, signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize("kind", ["ddp", "sharded"])
@pytest.mark.parametrize("rank", [0, 2])
def test_sigterm_of_one_rank_saves_on_all_within_two_steps_and_resumes(
    rank: int, kind: str, workers: Workers, tmp_path: Path
) -> None:
    signals = (SignalAt(rank, 2, signal.SIGTERM),)
    results = workers.run(3 + 1, fit, 4, str(tmp_path), signals, kind)
    assert results == [(4, 143, True)] * 4
    assert (tmp_path / "last.ckpt").is_dir() == (kind == "sharded")
    assert workers.run(4, fit, 4, str(tmp_path), (), kind, 1, 8, "last") == [(8, None, True)] * 4


def test_sigterm_while_gradients_are_accumulated_saves_after_a_step(workers: Workers, tmp_path: Path) -> None:
    results = workers.run(2, fit, 2, str(tmp_path), (SignalAt(1, 3, signal.SIGTERM),), "ddp", 3)
    assert results == [(3, 143, True)] * 2
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 3


def test_sigterm_of_single_process_saves_after_the_step(tmp_path: Path) -> None:
    assert fit(1, str(tmp_path), (SignalAt(0, 2, signal.SIGTERM),))[:2] == (3, 143)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 3


def test_run_from_the_beginning_over_checkpoint_of_earlier_run_raises_on_all_ranks(
    workers: Workers, tmp_path: Path
) -> None:
    (tmp_path / "last.ckpt").write_bytes(b"earlier")
    for message in workers.run(2, start_anew, str(tmp_path)):
        assert "last.ckpt is the checkpoint of an earlier run, which this run would replace" in message
    assert (tmp_path / "last.ckpt").read_bytes() == b"earlier"


def start_anew(folder: str) -> str:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        fit(2, folder)
    return str(error.value)


def slurm(monkeypatch: pytest.MonkeyPatch, folder: Path, exit_code: int = 0, **variables: str) -> Path:
    """Set what ``srun`` sets for a job of one task, and put a ``scontrol`` on the path that notes its arguments."""
    (folder / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {folder}/calls\nexit {exit_code}\n')
    (folder / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    task = {"NTASKS": "1", "NTASKS_PER_NODE": "1", "NNODES": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    for name, value in (task | {"JOB_ID": "4711", "JOB_NAME": "train", "NODELIST": "127.0.0.1"} | variables).items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    return folder / "calls"


@pytest.mark.parametrize(
    ("variables", "job"), [({}, "4711"), ({"ARRAY_JOB_ID": "4700", "ARRAY_TASK_ID": "3"}, "4700_3")]
)
def test_slurm_requeue_signal_saves_and_requeues_job(
    variables: dict[str, str], job: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = slurm(monkeypatch, tmp_path, **variables)
    signals = (SignalAt(0, 2, signal.SIGUSR1),)
    assert fit(1, str(tmp_path / "run"), signals, environment=SLURMEnvironment())[:2] == (3, 143)
    assert calls.read_text() == f"requeue {job}\n"
    assert not list(tmp_path.glob("**/hpc_ckpt*"))  # there is one place to resume from
    assert fit(1, str(tmp_path / "run"), (), ckpt_path="last", environment=SLURMEnvironment())[:2] == (8, None)


def test_slurm_preemption_saves_and_leaves_requeuing_to_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = slurm(monkeypatch, tmp_path)
    signals = (SignalAt(0, 2, signal.SIGTERM),)
    assert fit(1, str(tmp_path / "run"), signals, environment=SLURMEnvironment())[:2] == (3, 143)
    assert not calls.exists()


def test_slurm_requeue_that_fails_warns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    slurm(monkeypatch, tmp_path, exit_code=1)
    signals = (SignalAt(0, 2, signal.SIGUSR1),)
    assert fit(1, str(tmp_path / "run"), signals, environment=SLURMEnvironment())[1] == 143
    assert "`scontrol requeue 4711` failed. The checkpoint is saved: submit the job again yourself." in caplog.text


def test_requeue_signal_without_slurm_or_auto_requeue_keeps_its_handler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    received: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: received.append(number))
    try:
        fit(1, str(tmp_path / "a"), (SignalAt(0, 2, signal.SIGUSR1),), environment=LightningEnvironment())
        slurm(monkeypatch, tmp_path)
        environment = SLURMEnvironment(auto_requeue=False)
        fit(1, str(tmp_path / "b"), (SignalAt(0, 2, signal.SIGUSR1),), environment=environment)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert received == [signal.SIGUSR1] * 2
