"""Rows of tensors from rank to rank: packed into one buffer, a bounded collective a chunk."""

import itertools
import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_eplb.parallel.packing import WORDS, Stack, Window, as_words, in_buffer, pieces_of, to_device

MAX_STAGING_BYTES = 256 * 2**20
"""What a rank's send buffer, and its receive buffer, hold at most while rows travel (a single row may need more)."""

ALIGNED_BYTES = 512
"""A row's part of a chunk is a multiple of this: what NCCL sends to each rank then begins where wide words do. Without,
two thirds of the bandwidth were seen (180 and 268 GB/s between four H200)."""

all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""The collective under its newer name, where torch has it (2.13); the older name warns there."""

LEAST_CHUNK_BYTES = 2 * 2**20
"""Of a chunk that is one of several only to be packed, or put in place, sooner than a larger one would be."""

LEAST_ALONE_BYTES = 256 * 2**10
"""Rows of a tensor that are so wide, those of the fullest rank together, can travel by themselves."""


@dataclass(frozen=True, eq=False)
class Route:
    """Which rows this rank sends to whom, and where it puts those it gets. All ranks' routes come from one plan.

    Attributes:
        send_rows: Local rows in the order of their destination ranks, int64.
        send_counts: Rows for each rank, ``[R]``.
        recv_rows: Local rows that the received ones are for, in the order of their source ranks, int64.
        recv_counts: Rows from each rank, ``[R]``.
        most_rows: The most rows that any rank sends or receives: every rank cuts its chunks by it.
    """

    send_rows: Tensor
    send_counts: list[int]
    recv_rows: Tensor
    recv_counts: list[int]
    most_rows: int

    @classmethod
    def of_moves(
        cls,
        source_rank: np.ndarray,
        source_row: np.ndarray,
        target_rank: np.ndarray,
        target_row: np.ndarray,
        rank: int,
        size: int,
    ) -> "Route":
        """This rank's route in a list of moves that all ranks share; four int64 arrays of equal length."""
        sent, received = np.flatnonzero(source_rank == rank), np.flatnonzero(target_rank == rank)
        by_target = sent[np.argsort(target_rank[sent], kind="stable")]
        by_source = received[np.argsort(source_rank[received], kind="stable")]
        out_counts, in_counts = (np.bincount(ranks, minlength=size) for ranks in (source_rank, target_rank))
        return cls(
            send_rows=torch.from_numpy(source_row[by_target]),
            send_counts=np.bincount(target_rank[sent], minlength=size).tolist(),
            recv_rows=torch.from_numpy(target_row[by_source]),
            recv_counts=np.bincount(source_rank[received], minlength=size).tolist(),
            most_rows=int(np.maximum(out_counts, in_counts).max()),
        )

    def to(self, device: torch.device) -> "Route":
        """The same route with its rows' indices on ``device``, so that no exchange has to bring them there."""
        send_rows, recv_rows = (to_device(rows.numpy(), device) for rows in (self.send_rows, self.recv_rows))
        return replace(self, send_rows=send_rows, recv_rows=recv_rows)

    @property
    def reverse(self) -> "Route":
        """The same rows on their way back."""
        return Route(self.recv_rows, self.recv_counts, self.send_rows, self.send_counts, self.most_rows)

    @property
    def arriving_in_order(self) -> "Route":
        """The same route into a tensor that holds just the received rows, in the order in which they arrive."""
        order = torch.arange(len(self.recv_rows), device=self.recv_rows.device)
        return Route(self.send_rows, self.send_counts, order, self.recv_counts, self.most_rows)


class RowsUnderway:
    """Rows on their way. All ranks of ``group`` make it and :meth:`send`; then they ask for the rows once, by a method.

    Wide rows travel in chunks of columns; stacks share one.

    Args:
        sources: Stacks: tensors of equal length and row shape one upon another, whose rows the route counts on from
            one to the next. All stacks have as many tensors and rows. On every rank they are as many, of the same
            shapes and dtypes. They must stay as they are until the rows have arrived.
        route: What goes where.
        group: The ranks of the route.
        max_bytes: Upper bound of the send buffers and of the receive buffers, half of it for a chunk, as no more than
            two are under way.
        is_taken: The rows will be asked for by :meth:`take`. Then wide ones travel alone: the buffer that they arrive
            in is what is returned.
        is_behind: Nobody waits for the rows soon. All chunks are under way at once: the buffers hold all rows.
    """

    def __init__(
        self,
        sources: "Sequence[Stack]",
        route: Route,
        group: dist.ProcessGroup,
        max_bytes: int = MAX_STAGING_BYTES,
        *,
        is_taken: bool = False,
        is_behind: bool = False,
    ) -> None:
        self._sources = [[_plain(tensor) for tensor in stack] for stack in sources]
        self._route, self._group, self._is_behind = route, group, is_behind
        row_bytes = [math.prod(stack[0].shape[1:]) * stack[0].element_size() for stack in self._sources]
        self._word = next(size for size in WORDS if all(width % size == 0 for width in row_bytes))
        self._widths = [width // self._word for width in row_bytes]
        self._windows: list[Window] = []
        if route.most_rows and any(row_bytes):
            most, alone, least = (
                max(1, size // self._word // route.most_rows)
                for size in (max_bytes // 2, LEAST_ALONE_BYTES, LEAST_CHUNK_BYTES)
            )
            aligned = ALIGNED_BYTES // self._word
            most -= most % aligned if most > aligned else 0
            chunks = itertools.repeat(most)
            if not is_taken and not is_behind:
                chunks = iter(_chunk_columns(sum(self._widths), most, least, aligned))
            self._windows = _column_windows(self._widths, chunks, alone if is_taken else max(self._widths) + 1)
            self._sent = pieces_of(self._sources, route.send_rows, self._windows, self._word)
        self._num_sent = 0
        self._chunks: deque[_Chunk] = deque()

    def send(self) -> "RowsUnderway":
        """Send the first rows off, or all of them behind training."""
        for _ in range(len(self._windows) if self._is_behind else 2):
            self._send_next()
        return self

    def discard(self) -> None:
        """Let what is under way arrive, and drop it."""
        self._num_sent = len(self._windows)
        while self._chunks:
            self._chunks.popleft().work.wait()

    def aim(self, targets: "Sequence[Stack]") -> "RowsUnderway":
        """Say where :meth:`write` puts the rows: the host prepares it here, and waits for nothing.

        Args:
            targets: A stack for each of the sources, its rows of the same shape and dtype; the route's ``recv_rows``
                count them. They may be the sources.
        """
        if self._windows:
            targets = [[_plain(tensor) for tensor in stack] for stack in targets]
            self._written = pieces_of(targets, self._route.recv_rows, self._windows, self._word)
        return self

    def write(self) -> None:
        """Wait for the rows and put each where the route and :meth:`aim` say, in place.

        Within a chunk every row is read before one is written: rows can change places without a second copy of the
        tensors.
        """
        if self._windows:
            for chunk in self._arrivals():
                self._written.scatter(chunk.received, chunk.window, is_alone=self._is_behind or not self._chunks)
            self._written.finish()

    def take(self) -> list[Tensor]:
        """Wait for the rows and return them, for each of the stacks, in the order in which they arrived."""
        rows = len(self._route.recv_rows)
        kinds = [stack[0] for stack in self._sources]
        taken = [kind.new_empty(0) for kind in kinds]
        for chunk in self._arrivals():
            for (i, start, stop), columns in in_buffer(self._windows[chunk.window]):
                kind, arrived = kinds[i], chunk.received[:, columns]
                is_whole = stop - start == self._widths[i]
                if is_whole and 0 < arrived.nbytes == arrived.untyped_storage().nbytes():  # the buffer itself
                    taken[i] = arrived.view(kind.dtype).view(rows, *kind.shape[1:])
                    continue
                if start == 0:
                    taken[i] = kind.new_empty(rows, *kind.shape[1:])
                as_words(taken[i], self._word)[:, start:stop] = arrived
        return [
            tensor if tensor.ndim == kind.ndim else kind.new_empty(rows, *kind.shape[1:])
            for tensor, kind in zip(taken, kinds, strict=True)
        ]

    def _send_next(self) -> None:
        if self._num_sent == len(self._windows):
            return
        sent = self._sent.gather(self._num_sent, is_alone=self._is_behind or not self._chunks)
        received = sent.new_empty(len(self._route.recv_rows), sent.shape[1])
        work = dist.all_to_all_single(
            received, sent, self._route.recv_counts, self._route.send_counts, group=self._group, async_op=True
        )
        assert work is not None
        self._chunks.append(_Chunk(self._num_sent, sent, received, work))
        self._num_sent += 1

    def _arrivals(self) -> "Iterator[_Chunk]":
        while self._chunks:
            chunk = self._chunks.popleft()
            chunk.work.wait()
            self._send_next()
            yield chunk


@dataclass(frozen=True, eq=False)
class _Chunk:
    """A collective that was started; its buffers are held until it is done."""

    window: int
    sent: Tensor
    received: Tensor
    work: dist.Work


def exchange_rows(
    sources: Sequence[Tensor],
    targets: Sequence[Tensor],
    route: Route,
    group: dist.ProcessGroup,
    max_bytes: int = MAX_STAGING_BYTES,
) -> None:
    """Write the rows that other ranks send along ``route`` into ``targets``, in place. All ranks of ``group`` call it.

    For the arguments see :class:`RowsUnderway` and its ``aim``; ``targets`` may be ``sources``.
    """
    underway = RowsUnderway([[source] for source in sources], route, group, max_bytes).send()
    underway.aim([[target] for target in targets]).write()


def gather_rows(rows: Tensor, order: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All ranks' rows in the order of logical experts, on the CPU. Every rank of ``group`` calls it.

    Args:
        rows: This rank's rows, ``[n, ...]``.
        order: The logical expert of every row, ranks in order, ``[L]`` int64: each expert once.

    Returns:
        ``[L, ...]`` on every rank.
    """
    device = torch.device("cpu" if dist.get_backend(group) == "gloo" else "cuda")
    mine = rows.detach().to(device).contiguous()
    words = mine.reshape(-1).view(torch.uint8)  # gloo does not know all dtypes
    size = dist.get_world_size(group)
    flat = words.new_empty(size * words.numel())
    all_gather_single(flat, words, group=group)
    gathered = flat.view(size * len(mine), -1).cpu()
    logical = torch.empty_like(gathered)
    logical[order] = gathered
    return logical.view(-1).view(mine.dtype).view(len(logical), *mine.shape[1:])


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach() if tensor.requires_grad else tensor


def _chunk_columns(total: int, most: int, least: int, aligned: int) -> list[int]:
    """Cut ``total`` columns, or a few more, into chunks of at most ``most``, the outer ones of about half the width.

    The first is packed before anything travels, and the last put in place when all has arrived: both are waited for.
    Outer chunks that would be narrower than ``least`` are not worth it. All are multiples of ``aligned`` where ``most``
    is one.
    """
    end = min(most // 2, total // 4)
    end -= end % aligned
    if end < max(least, 1):
        return [most] * math.ceil(total / most)
    between = total - 2 * end
    number = math.ceil(between / most)
    middle = min(most, math.ceil(between / number / aligned) * aligned)
    return [end, *[middle] * number, end]


def _column_windows(widths: Sequence[int], columns: Iterator[int], alone: int) -> list[Window]:
    """Cut tensors that lie side by side into windows of these ``columns``; one as wide as ``alone`` shares none."""
    windows: list[Window] = []
    room = 0
    for i, width in enumerate(widths):
        start = 0
        if width >= alone:
            room = 0
        while start < width:
            if room == 0:
                windows.append([])
                room = next(columns)
            stop = min(width, start + room)
            windows[-1].append((i, start, stop))
            room -= stop - start
            start = stop
        if width >= alone:
            room = 0
    return windows
