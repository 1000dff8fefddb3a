"""Memory that several processes on the CPU share, in place of torch's symmetric memory on GPUs."""

import os
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

if os.environ.get("CUDA_VISIBLE_DEVICES", "") == "" and not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported

import torch
import torch.distributed as dist

from lightning_eplb.parallel import direct_exchange
from lightning_eplb.parallel.direct_dispatch import DirectDispatcher
from lightning_eplb.parallel.dispatch import TokenBatch
from lightning_eplb.parallel.groups import ExpertGroups

direct_exchange.PROGRAMS = 4  # they are interpreted one after the other


class FileMemory:
    """Memory-mapped file of each rank, which the others map, too."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        assert device.type == "cpu"
        handle, self._name = tempfile.mkstemp()
        os.close(handle)
        self.local = self._map(self._name, num_bytes)

    def connect(self, groups: ExpertGroups) -> None:
        self._group = groups.ep_group
        names: list[Any] = [None] * groups.size
        dist.all_gather_object(names, self._name, group=self._group)
        self._mapped = [self.local if name == self._name else self._map(name, len(self.local)) for name in names]
        dist.barrier(group=self._group)
        os.unlink(self._name)
        self.addresses = [tensor.data_ptr() for tensor in self._mapped]

    def barrier(self, timeout: timedelta) -> None:
        dist.barrier(group=self._group)

    def _map(self, name: str, num_bytes: int) -> torch.Tensor:
        storage = torch.UntypedStorage.from_file(name, shared=True, nbytes=num_bytes)
        return torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[call-overload]


class CPUDirectDispatcher(DirectDispatcher):
    """Direct dispatch on the CPU: its kernels are interpreted."""

    memory = FileMemory

    def why_not(self, batch: TokenBatch) -> str | None:
        return None
