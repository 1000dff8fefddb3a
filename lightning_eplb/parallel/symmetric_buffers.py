"""Buffers in the memory of all ranks of an EP group, which direct dispatch writes into.

One set of two regions a group and device serves all layers of all models, forward and backward. Trips take turns: trip
``i`` writes into region ``i % 2`` of other ranks, then all pass a barrier, then each reads its own. So a rank that
writes in trip ``i + 2`` has passed the barrier of trip ``i + 1``, and every rank enters that one, on the same stream,
after it has read in trip ``i``. No trip needs a second barrier, whatever it carries and whatever comes next.

Shape suffixes: ``R`` ranks.
"""

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from lightning_eplb import _compat
from lightning_eplb.parallel.groups import CPU_GROUP_TIMEOUT, ExpertGroups
from lightning_eplb.parallel.packing import to_device
from lightning_eplb.parallel.row_exchange import all_gather_single

TIMEOUT = CPU_GROUP_TIMEOUT
"""Time after which a rank that waits for the others raises. The same as that of other groups."""

TRAP_AFTER = timedelta(seconds=60)
"""Further time after which the barrier's kernel ends with a CUDA error, where no host waits that could raise."""

CAPACITY_STEP = 128
"""Tokens that capacities are multiples of, so that slightly longer batches fit."""

GROWTH = 1.25
"""Factor by which a capacity grows at least, so that batches that get longer step by step seldom need new buffers."""

ALIGNMENT = 256
"""Bytes that areas are multiples of, at least the 16 of a vector instruction."""


HEADER_WORDS = 8
"""Words of 8 bytes of a header: tag, sequence number, tokens, payload; the others are not used."""

ERROR_WORDS = 8
"""Words of 8 bytes of the first mismatch of headers: 1 if there is one, tag and sequence number of this rank, the other
rank, its tag and sequence number."""

KINDS = ("dispatch", "combine", "backward pass of combine", "backward pass of dispatch")
"""Kinds of trips. A tag is the layer's number times their number, plus the kind."""


class Region(NamedTuple):
    """Regions of one trip in the memory of all ranks, and this rank's place among them.

    Attributes:
        addresses: Address of the region on each rank, ``[R]`` int64 on the device.
        rank: Rank of this process.
        capacity: Tokens of a rank that a region has room for.
        slots: Offset of slots, ``[R, capacity, K]`` int32, in bytes.
        weights: Offset of weights, ``[R, capacity, K]`` float32 or float64.
        rows: Offset of rows, ``[R, capacity, D]`` in any dtype. All offsets are multiples of 16.
    """

    addresses: Tensor
    rank: int
    capacity: int
    slots: int
    weights: int
    rows: int

    @property
    def num_ranks(self) -> int:
        """Number of ranks, ``R``."""
        return len(self.addresses)


class Header(NamedTuple):
    """Identity of a trip, which all ranks must share, and numbers that may differ.

    Attributes:
        tag: Number of the layer and of the kind of trip.
        sequence: Number of the trip.
        tokens: Tokens of this rank.
        payload: Number for the other ranks.
    """

    tag: int
    sequence: int
    tokens: int = 0
    payload: int = 0


class PeerMemory(Protocol):
    """Memory that all ranks of a group can write to.

    Attributes:
        local: This rank's memory, ``[bytes]`` uint8.
        addresses: Address of every rank's memory, as this rank sees it.
    """

    local: Tensor
    addresses: list[int]

    def barrier(self, timeout: timedelta) -> None:
        """Wait on the device, on the current stream, until all ranks have come here. Their writes are visible then."""
        ...


class SymmetricMemory:
    """Memory of torch's symmetric memory on a CUDA device."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self.local = _compat.symmetric_empty(num_bytes, device)

    def connect(self, groups: ExpertGroups) -> None:
        """Map the memory of the other ranks. All ranks of the group call it."""
        self._handle = _compat.symmetric_rendezvous(self.local, groups.ep_group)
        pointers = list(self._handle.buffer_ptrs)
        offset = self.local.data_ptr() - pointers[groups.rank]
        self.addresses = [pointer + offset for pointer in pointers]

    def barrier(self, timeout: timedelta) -> None:
        self._handle.barrier(channel=0, timeout_ms=int(timeout.total_seconds() * 1000))


class Layout(NamedTuple):
    """Sizes of a region.

    Attributes:
        capacity: Tokens of a rank.
        top_k: Choices of a token.
        row_bytes: Bytes of a row.
    """

    capacity: int
    top_k: int
    row_bytes: int

    def holds(self, other: "Layout") -> bool:
        return all(mine >= theirs for mine, theirs in zip(self, other, strict=True))

    def union(self, other: "Layout") -> "Layout":
        return Layout(*map(max, zip(self, other, strict=True)))

    def offsets(self, num_ranks: int) -> tuple[int, int, int, int]:
        """Offsets of slots, weights and rows, and the bytes of a region."""
        pairs = num_ranks * self.capacity * self.top_k
        areas = (num_ranks * 64, 4 * pairs, 8 * pairs, num_ranks * self.capacity * self.row_bytes)
        ends = itertools.accumulate(-(-area // ALIGNMENT) * ALIGNMENT for area in areas)
        return tuple(ends)  # type: ignore[return-value]


@dataclass(eq=False)
class Report:
    """Headers and counts of all ranks, and the first mismatch of headers, which the host reads.

    Attributes:
        device: ``[R 8 + R P + 8]`` int64.
        host: The same, pinned.
        counts: Counts in ``device``, ``[R P]``.
        event: Event of the copy.
    """

    device: Tensor
    host: Tensor
    counts: Tensor
    event: Any

    @classmethod
    def create(cls, num_ranks: int, num_slots: int, device: torch.device) -> "Report":
        first, size = num_ranks * HEADER_WORDS, num_ranks * num_slots
        is_cuda = device.type == "cuda"
        with torch.inference_mode(False), torch.no_grad():
            report = torch.zeros(first + size + ERROR_WORDS, dtype=torch.int64, device=device)
            host = torch.zeros(len(report), dtype=torch.int64, pin_memory=is_cuda)
            return cls(report, host, report[first : first + size], torch.cuda.Event() if is_cuda else None)

    def copy_to_host(self) -> None:
        with torch.no_grad():
            self.host.copy_(self.device, non_blocking=True)
        if self.event is not None:
            self.event.record()


class SymmetricBuffers:
    """Two regions in the memory of each rank of an EP group. All ranks call its methods in the same order.

    Args:
        groups: Process groups of the experts.
        device: Device of the tokens.
        memory: Class of the memory.
    """

    def __init__(self, groups: ExpertGroups, device: torch.device, memory: Callable[..., Any]) -> None:
        self.groups, self.device = groups, device
        self.layout = Layout(0, 0, 0)
        self.names: dict[int, str] = {}
        """Names of layers by their numbers, which headers carry."""
        self.failure: str | None = None
        """Reason why there are no buffers."""
        self.sequence = 0
        self._make = memory
        self._memory: Any = None
        self.errors: Tensor
        """First mismatch of headers, ``[8]`` int64 on the device."""
        self._regions: list[Region]
        self._reports: dict[int, Report] = {}
        self._stream: Any = None

    def register(self, name: str) -> int:
        """Return a number for a layer. All ranks register the same layers in the same order."""
        self.names[number := len(self.names) + 1] = name
        return number

    def fit(self, layout: Layout) -> bool:
        """Make the regions large enough, if that is possible. All ranks call it with the same arguments.

        Ranks wait for the device, allocate, agree that all could, and map each other's memory. Then all have read what
        was in the old memory, which is freed.
        """
        if self.layout.holds(layout) or self.failure is not None:
            return self.failure is None
        wanted = self.layout.union(layout)
        if wanted.capacity > self.layout.capacity:
            capacity = max(wanted.capacity, int(self.layout.capacity * GROWTH))
            wanted = wanted._replace(capacity=-(-capacity // CAPACITY_STEP) * CAPACITY_STEP)
        num_bytes = wanted.offsets(self.groups.size)[-1]
        self._synchronize()
        memory, error = self._try(lambda: self._make(2 * num_bytes, self.device))
        if error is None:
            _, error = self._try(lambda: memory.connect(self.groups))
        if error is not None:
            self.failure = error
            return False
        with torch.inference_mode(False), torch.no_grad():
            table = np.array([[a + parity * num_bytes for a in memory.addresses] for parity in range(2)])
            slots, weights, rows, _ = wanted.offsets(self.groups.size)
            self._regions = [
                Region(addresses, self.groups.rank, wanted.capacity, slots, weights, rows)
                for addresses in to_device(table, self.device).unbind()
            ]
            self.errors = torch.zeros(ERROR_WORDS, dtype=torch.int64, device=self.device)
            memory.local.zero_()
        self._synchronize()
        self._agree(None)  # zeros are written before another rank's first header
        self._memory, self.layout = memory, wanted
        return True

    def start_trip(self, layer: int, kind: int, tokens: int = 0, payload: int = 0) -> tuple[Region, Header]:
        """Return the regions of the next trip, and its header."""
        self._follow_stream()
        tag, self.sequence = self.next_trip(layer, kind)
        return self._regions[self.sequence % 2], Header(tag, self.sequence, tokens, payload)

    def next_trip(self, layer: int, kind: int) -> tuple[int, int]:
        """Return tag and sequence number of the next trip, if it is of this kind."""
        return layer * len(KINDS) + kind, (self.sequence + 1) % 2**30

    def report(self, num_slots: int) -> "Report":
        """Return where the device reports headers and counts of ``num_slots`` slots, one for all trips."""
        if num_slots not in self._reports:
            self._reports[num_slots] = Report.create(self.groups.size, num_slots, self.device)
        return self._reports[num_slots]

    def barrier(self) -> None:
        """Let the device wait for all ranks."""
        self._memory.barrier(TIMEOUT + TRAP_AFTER)

    def wait(self, event: Any, layer: str) -> None:
        """Let the host wait for an event after the barrier of the last trip.

        Raises:
            RuntimeError: Other ranks did not start the trip within ``TIMEOUT``.
        """
        if event is None:
            return
        deadline = None
        while not event.query():
            if deadline is None:
                deadline = time.monotonic() + TIMEOUT.total_seconds()
            elif time.monotonic() > deadline:
                raise RuntimeError(
                    f"{layer}: EP ranks {self._missing()} did not take part in its exchange of tokens within"
                    f" {TIMEOUT.total_seconds():g} s. They failed, or call other layers."
                )
            time.sleep(0)  # lets other threads run

    def check(self, trips_R2: np.ndarray, error: np.ndarray) -> None:
        """Raise ``RuntimeError`` if ranks took part in different trips.

        Args:
            trips_R2: Tag and sequence number of each rank's trip, int64.
            error: First mismatch that a kernel found in an earlier one.
        """
        tag, sequence = trips_R2[self.groups.rank].tolist()
        others = np.flatnonzero((trips_R2 != trips_R2[self.groups.rank]).any(axis=1))
        if error[0]:
            tag, sequence, rank, their_tag, their_sequence = error[1:6].tolist()
        elif len(others):
            rank = int(others[0])
            their_tag, their_sequence = trips_R2[rank].tolist()
        else:
            return
        raise RuntimeError(
            f"EP ranks call different layers: exchange {sequence} of EP rank {self.groups.rank} is"
            f" {self._describe(tag)}, and exchange {their_sequence} of EP rank {rank} is {self._describe(their_tag)}."
            " All ranks must call the same layers in the same order, forward and backward."
        )

    def _describe(self, tag: int) -> str:
        name = self.names.get(tag // len(KINDS), "unknown")
        return f"the {KINDS[tag % len(KINDS)]} of {name}"

    def _missing(self) -> list[int]:
        """Return the ranks whose header of the last trip is missing, while the device waits in the barrier."""
        start = (self.sequence % 2) * self.layout.offsets(self.groups.size)[-1]
        header = self._memory.local[start : start + 64 * self.groups.size].view(torch.int64)
        if self.device.type == "cuda":
            with torch.cuda.stream(torch.cuda.Stream(self.device)):
                words = header.cpu()
        else:
            words = header
        sequences = words.view(self.groups.size, -1)[:, 1].tolist()
        return [rank for rank, sequence in enumerate(sequences) if sequence != self.sequence]

    def _follow_stream(self) -> None:
        """Let trips follow each other where the current stream has changed."""
        if self.device.type != "cuda":
            return
        stream = torch.cuda.current_stream(self.device)
        if self._stream is not None and stream != self._stream:
            stream.wait_stream(self._stream)
        self._stream = stream

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _try(self, act: Callable[[], Any]) -> tuple[Any, str | None]:
        """Return the result of ``act``, and why it failed on some rank. All ranks call it."""
        result, error = None, None
        try:
            with torch.inference_mode(False), torch.no_grad():
                result = act()
        except (RuntimeError, NotImplementedError, ValueError) as raised:
            error = str(raised).splitlines()[0][:200]
        failed = self._agree(error)
        if not failed:
            return result, None
        return None, f"EP ranks {failed} can't share memory" + (f": {error}" if error else "")

    def _agree(self, error: str | None) -> list[int]:
        return [rank for rank, failed in enumerate(self.gather(int(error is not None))) if failed]

    def gather(self, value: int) -> list[int]:
        """Gather a number of each rank. All ranks call it."""
        assert self.groups.ep_group is not None
        mine = torch.tensor([value], device=self.device)
        all_R = mine.new_empty(self.groups.size)
        all_gather_single(all_R, mine, group=self.groups.ep_group)
        return all_R.tolist()


def shared_buffers(groups: ExpertGroups, device: torch.device, memory: Callable[..., Any]) -> SymmetricBuffers:
    """Return the buffers of a group and device, which all layers share."""
    key = "symmetric buffers", device, memory
    if key not in groups.shared:
        groups.shared[key] = SymmetricBuffers(groups, device, memory)
    return groups.shared[key]
