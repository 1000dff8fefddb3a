"""Checkpoint when a scheduler takes ranks away: SIGTERM, and SLURM's signal before it requeues a job."""

import logging
import os
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import distributed as dist
from typing_extensions import override

from lightning_eplb import _compat

log = logging.getLogger(__name__)

SIGTERM, REQUEUE = 1, 2
"""Signals as ranks tell each other. The larger one counts."""
EXIT_CODE = 128 + signal.SIGTERM
"""That of a process that SIGTERM ended. Without one, Lightning's exception is a successful end to ``torchrun``."""


class PreemptionCheckpoint(ModelCheckpoint):
    """Saves as ``ModelCheckpoint`` does, and once more when any rank is told to end.

    A scheduler sends SIGTERM to the processes of a node and kills them after a grace period. Others may get no signal,
    but a checkpoint needs all ranks. This callback lets all ranks know. Within two optimizer steps they save
    ``last.ckpt`` in ``dirpath``, after the same step, and raise Lightning's ``SIGTERMException``. Processes then end
    with code 143, so that ``torchrun`` starts the remaining nodes again. ``ckpt_path="last"`` resumes from the newest
    checkpoint.

    On SLURM it also acts on ``SLURMEnvironment.requeue_signal`` (SIGUSR1), unless ``auto_requeue=False``: all ranks
    save, and rank 0 calls ``scontrol requeue``. Lightning's own handlers of both signals call collectives wherever a
    rank happens to be, which hangs with several ranks. The handlers of this callback replace them during training.

    Example::

        checkpoint = PreemptionCheckpoint("checkpoints", "last", every_n_train_steps=100, enable_version_counter=False)
        trainer = Trainer(strategy="ddp", callbacks=[EPLBCallback(), checkpoint], num_nodes=...)
        trainer.fit(model, ckpt_path="last")  # the first run finds none, and starts from the beginning

    Args:
        dirpath: Folder that all nodes share. Defaults to Lightning's, which differs in each run.
        filename: As in ``ModelCheckpoint``. ``"last"`` with ``enable_version_counter=False`` keeps one checkpoint.
        kwargs: Further arguments of ``ModelCheckpoint``.

    Raises:
        ValueError: Before the first step, on all ranks: ``last.ckpt`` is there, and the run starts from the beginning.

    Note:
        Signals during validation count after the next optimizer step. With gradient accumulation a step has several
        batches. Give ``torchrun`` or SLURM a grace period of two steps and the time to save.
    """

    def __init__(self, dirpath: str | Path | None = None, filename: str | None = None, **kwargs: Any) -> None:
        super().__init__(dirpath, filename, **kwargs)
        self._received = 0
        self._agreed: torch.Tensor | None = None
        self._work: dist.Work | None = None
        self._group: dist.ProcessGroup | None = None
        self._global_step = 0

    @override
    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        super().on_train_start(trainer, pl_module)
        is_new = trainer.ckpt_path is None and trainer.global_step == 0
        if is_new and trainer.strategy.broadcast(os.path.exists(self._path)):
            raise ValueError(
                f"{self._path} is the checkpoint of an earlier run, which this run would replace. Resume with"
                " ckpt_path='last', or remove it."
            )
        self._received, self._global_step = 0, trainer.global_step
        if trainer.world_size > 1:
            group = dist.new_group(backend="gloo")
            assert isinstance(group, dist.ProcessGroup)
            self._group = group
            self._tell_others()
        if threading.current_thread() is not threading.main_thread():
            return  # only the main thread gets signals
        signal.signal(signal.SIGTERM, lambda *_: self._receive(SIGTERM))  # the trainer restores its own at the end
        environment = _compat.cluster_environment(trainer)
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue and environment.requeue_signal:
            signal.signal(environment.requeue_signal, lambda *_: self._receive(REQUEUE))

    @override
    def on_train_batch_end(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if trainer.global_step == self._global_step:
            return  # accumulated gradients are in no checkpoint
        self._global_step = trainer.global_step
        signal_number = self._agree()
        if not signal_number:
            return
        trainer.save_checkpoint(self._path)
        if trainer.is_global_zero:
            rank_zero_info(f"Saved {self._path} after optimizer step {trainer.global_step}: a rank was told to end.")
            if signal_number == REQUEUE:
                _requeue()
        raise SIGTERMException(EXIT_CODE)

    @override
    def on_train_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        super().on_train_end(trainer, pl_module)
        if self._work is not None:
            self._work.wait()
            self._work = None
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None

    @property
    def _path(self) -> str:
        """Path of the checkpoint that is saved on a signal."""
        return os.path.join(str(self.dirpath), self.CHECKPOINT_NAME_LAST + self.FILE_EXTENSION)

    def _receive(self, signal_number: int) -> None:
        """Remember a signal. Handlers run between any two instructions, so this does nothing else."""
        self._received = max(self._received, signal_number)

    def _agree(self) -> int:
        """Return the signal that a rank had received at the end of the previous step, the same on all ranks."""
        if self._work is None:
            return self._received
        assert self._agreed is not None
        self._work.wait()
        signal_number = int(self._agreed)
        self._tell_others()
        return signal_number

    def _tell_others(self) -> None:
        """Start to exchange the signals received. It ends while the next step computes."""
        self._agreed = torch.tensor(self._received)
        self._work = dist.all_reduce(self._agreed, dist.ReduceOp.MAX, group=self._group, async_op=True)


def _requeue() -> None:
    """Ask SLURM to put this job back into its queue."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    command = ["scontrol", "requeue", f"{array}_{task}" if array else os.environ["SLURM_JOB_ID"]]
    try:
        failure = None if subprocess.run(command).returncode == 0 else "failed"
    except OSError as error:
        failure = f"failed ({error})"
    if failure:
        log.warning(f"`{' '.join(command)}` {failure}. The checkpoint is saved: submit the job again yourself.")
