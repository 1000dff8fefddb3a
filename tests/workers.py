"""Worker processes that tests share: started once, each test's function runs on as many ranks as it asks for.

A call that takes too long makes every rank print its stack and die, so a deadlock shows where ranks differ.
"""

import contextlib
import faulthandler
import os
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.fsdp.sharded_grad_scaler  # keeps the default group that there is when it is imported: none
import torch.multiprocessing as mp
from torch.distributed.tensor import debug

SECONDS_A_CALL = 60


class Workers:
    """Up to ``most`` processes; ``run`` gives each its rank in a fresh gloo group of the size that it asks for."""

    def __init__(self, most: int = 4) -> None:
        self.most = most
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._world_size = 0
        self._store: dist.TCPStore | None = None

    def run(
        self, world_size: int, function: Callable[..., Any], *args: Any, seconds: int = SECONDS_A_CALL
    ) -> list[Any]:
        """``function(*args)`` on ranks ``0 ... world_size-1``, importable by name; what it returned, by rank.

        A rank's exception is raised here, with that rank's traceback; if several raised, the lowest rank's.
        """
        self._start(world_size)
        store = None
        if world_size != self._world_size:
            store = self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for rank, pipe in enumerate(self._pipes[:world_size]):
            pipe.send((function, args, rank, world_size, store.port if store else None, seconds))
        answers = [self._receive(rank, seconds) for rank in range(world_size)]
        self._world_size = world_size
        failures = [answer for answer in answers if isinstance(answer, WorkerError)]
        if failures:
            if any(failure.lost for failure in failures):
                self.stop()
            raise failures[0]
        return answers

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
        self._processes, self._pipes, self._world_size = [], [], 0

    def _start(self, world_size: int) -> None:
        assert world_size <= self.most, f"world_size={world_size} needs more than {self.most} workers"
        context = mp.get_context("spawn")
        while len(self._processes) < world_size:
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs,), daemon=True)
            process.start()
            self._processes.append(process)
            self._pipes.append(ours)

    def _receive(self, rank: int, seconds: int) -> Any:
        if not self._pipes[rank].poll(seconds + 10):
            return WorkerError(f"rank {rank} did not answer within {seconds} s", lost=True)
        try:
            result, error = self._pipes[rank].recv()
        except EOFError:
            return WorkerError(f"rank {rank} died; its stack is in the captured output", lost=True)
        return WorkerError(f"rank {rank}:\n{error}") if error is not None else result


class WorkerError(AssertionError):
    def __init__(self, message: str, lost: bool = False) -> None:
        super().__init__(message)
        self.lost = lost


def _work(pipe: Connection) -> None:
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            function, args, rank, world_size, port, seconds = pipe.recv()
            faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)
            try:
                if port is not None:
                    _join(rank, world_size, port)
                pipe.send((function(*args), None))
            except Exception:
                pipe.send((None, traceback.format_exc()))
            finally:
                faulthandler.cancel_dump_traceback_later()


def _forget_meshes() -> None:
    """Clear the caches of DTensor, which hold meshes of destroyed groups."""
    debug._clear_python_sharding_prop_cache()
    debug._clear_fast_path_sharding_prop_cache()


def _join(rank: int, world_size: int, port: int) -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
        _forget_meshes()
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "tests",
    }
    store = dist.TCPStore("127.0.0.1", port, world_size, is_master=False)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=SECONDS_A_CALL)
    )
