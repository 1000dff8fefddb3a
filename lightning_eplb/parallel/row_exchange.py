"""Exchange of tensor rows between ranks: packed into buffers of bounded size, one collective a chunk."""

import itertools
import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_eplb.parallel.packing import (
    WORD_DTYPES,
    Chunk,
    Stack,
    as_words,
    buffer_columns,
    bytes_of_row,
    make_packer,
    to_device,
)

MAX_STAGING_BYTES = 256 * 2**20
"""Upper bound of the send buffers, and of the receive buffers, of a rank. A single row may need more."""

ALIGNMENT_BYTES = 512
"""The bytes of a row in a chunk are a multiple of this, so that NCCL reads wide words for each rank. Without it two
thirds of the bandwidth were measured (180 and 268 GB/s between four H200)."""

all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""All-gather of one tensor, by its new name if torch has it (2.13), where the old name warns."""

MIN_CHUNK_BYTES = 2 * 2**20
"""Lower bound of the outer chunks, which are cut smaller only to start the transfer earlier."""

MIN_OWN_CHUNK_BYTES = 256 * 2**10
"""Bytes of a tensor's rows on the fullest rank from which on the tensor can have chunks of its own."""


@dataclass(frozen=True, eq=False)
class Route:
    """Rows that one rank sends and receives. The routes of all ranks come from one plan.

    Attributes:
        send_rows: Local rows in the order of their destination ranks, int64.
        send_counts: Rows for each rank, ``[R]``.
        recv_rows: Local rows that the received rows are written to, in the order of their source ranks, int64.
        recv_counts: Rows from each rank, ``[R]``.
        max_rows: Most rows that any rank sends or receives. Every rank cuts its chunks by it.
    """

    send_rows: Tensor
    send_counts: list[int]
    recv_rows: Tensor
    recv_counts: list[int]
    max_rows: int

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
        """Create this rank's route from the moves of all ranks: four int64 arrays of equal length."""
        sent, received = np.flatnonzero(source_rank == rank), np.flatnonzero(target_rank == rank)
        by_target = sent[np.argsort(target_rank[sent], kind="stable")]
        by_source = received[np.argsort(source_rank[received], kind="stable")]
        out_counts, in_counts = (np.bincount(ranks, minlength=size) for ranks in (source_rank, target_rank))
        return cls(
            send_rows=torch.from_numpy(source_row[by_target]),
            send_counts=np.bincount(target_rank[sent], minlength=size).tolist(),
            recv_rows=torch.from_numpy(target_row[by_source]),
            recv_counts=np.bincount(source_rank[received], minlength=size).tolist(),
            max_rows=int(np.maximum(out_counts, in_counts).max()),
        )

    def to(self, device: torch.device) -> "Route":
        """Return the route with its row indices on ``device``, so that exchanges need not copy them."""
        send_rows, recv_rows = (to_device(rows.numpy(), device) for rows in (self.send_rows, self.recv_rows))
        return replace(self, send_rows=send_rows, recv_rows=recv_rows)

    @property
    def reverse(self) -> "Route":
        """Route of the same rows back to their sources."""
        return Route(self.recv_rows, self.recv_counts, self.send_rows, self.send_counts, self.max_rows)

    @property
    def arriving_in_order(self) -> "Route":
        """Route into a tensor that holds just the received rows, in the order in which they arrive."""
        order = torch.arange(len(self.recv_rows), device=self.recv_rows.device)
        return Route(self.send_rows, self.send_counts, order, self.recv_counts, self.max_rows)


class RowExchange:
    """Asynchronous exchange of rows. All ranks of ``group`` create it and call its methods in the same order.

    Call :meth:`send`, then once :meth:`write` or :meth:`take`. Wide rows travel in chunks of columns. Several stacks
    share a chunk.

    Args:
        sources: Stacks of equal length. The route numbers the rows of a stack through its tensors. All ranks have the
            same number of stacks, with the same shapes and dtypes. They must not change until the rows have arrived.
        route: Rows that this rank sends and receives.
        group: Process group of the route's ranks.
        max_bytes: Upper bound of the send buffers and of the receive buffers. A chunk has half of it, since no more
            than two are in flight.
        is_taken: The rows will be requested by :meth:`take`. Wide rows then have chunks of their own, and the receive
            buffer is returned without a copy.
        overlaps_training: All chunks are in flight at once, since training goes on meanwhile. The buffers hold all
            rows.
    """

    def __init__(
        self,
        sources: "Sequence[Stack]",
        route: Route,
        group: dist.ProcessGroup,
        max_bytes: int = MAX_STAGING_BYTES,
        *,
        is_taken: bool = False,
        overlaps_training: bool = False,
    ) -> None:
        self._sources = [[_detached(tensor) for tensor in stack] for stack in sources]
        self._route, self._group, self._overlaps_training = route, group, overlaps_training
        row_bytes = [bytes_of_row(stack[:1]) for stack in self._sources]
        self._word = next(size for size in WORD_DTYPES if all(width % size == 0 for width in row_bytes))
        self._widths = [width // self._word for width in row_bytes]
        self._chunks: list[Chunk] = []
        if route.max_rows and any(row_bytes):
            most, own_chunk, least = (
                max(1, size // self._word // route.max_rows)
                for size in (max_bytes // 2, MIN_OWN_CHUNK_BYTES, MIN_CHUNK_BYTES)
            )
            alignment = ALIGNMENT_BYTES // self._word
            most -= most % alignment if most > alignment else 0
            widths = itertools.repeat(most)
            if not is_taken and not overlaps_training:
                widths = iter(_chunk_widths(sum(self._widths), most, least, alignment))
            self._chunks = _cut_columns(self._widths, widths, own_chunk if is_taken else max(self._widths) + 1)
            self._send_packer = make_packer(self._sources, route.send_rows, self._chunks, self._word)
        self._num_sent = 0
        self._in_flight: deque[_ChunkInFlight] = deque()

    def send(self) -> "RowExchange":
        """Send the first chunks, or all of them where training goes on meanwhile."""
        for _ in range(len(self._chunks) if self._overlaps_training else 2):
            self._send_next()
        return self

    def discard(self) -> None:
        """Wait for the chunks in flight and drop them."""
        self._num_sent = len(self._chunks)
        while self._in_flight:
            self._in_flight.popleft().work.wait()

    def drain(self) -> None:
        """Exchange all rows and drop them."""
        for _ in self._arrivals():
            pass

    def prepare_write(self, targets: "Sequence[Stack]") -> "RowExchange":
        """Set the targets of :meth:`write`, and prepare on the host what needs no rows yet.

        Args:
            targets: A stack for each of the sources, with rows of the same shape and dtype, which the route's
                ``recv_rows`` number. They may be the sources.
        """
        if self._chunks:
            targets = [[_detached(tensor) for tensor in stack] for stack in targets]
            self._recv_packer = make_packer(targets, self._route.recv_rows, self._chunks, self._word)
        return self

    def write(self) -> None:
        """Wait for the rows and write them into the targets, in place.

        Within a chunk every row is read before one is written, so rows can be permuted without a copy of the tensors.
        """
        if self._chunks:
            for arrived in self._arrivals():
                uses_all_sms = self._overlaps_training or not self._in_flight
                self._recv_packer.unpack(arrived.received, arrived.chunk, uses_all_sms)
            self._recv_packer.finish()

    def take(self) -> list[Tensor]:
        """Wait for the rows and return those of each stack, in the order in which they arrived."""
        rows = len(self._route.recv_rows)
        likes = [stack[0] for stack in self._sources]
        taken = [like.new_empty(0) for like in likes]
        for arrived in self._arrivals():
            for (i, start, stop), in_buffer in buffer_columns(self._chunks[arrived.chunk]):
                like, columns = likes[i], arrived.received[:, in_buffer]
                is_whole = stop - start == self._widths[i]
                if is_whole and 0 < columns.nbytes == columns.untyped_storage().nbytes():  # the buffer itself
                    taken[i] = columns.view(like.dtype).view(rows, *like.shape[1:])
                    continue
                if start == 0:
                    taken[i] = like.new_empty(rows, *like.shape[1:])
                as_words(taken[i], self._word)[:, start:stop] = columns
        return [
            tensor if tensor.ndim == like.ndim else like.new_empty(rows, *like.shape[1:])
            for tensor, like in zip(taken, likes, strict=True)
        ]

    def _send_next(self) -> None:
        if self._num_sent == len(self._chunks):
            return
        sent = self._send_packer.pack(self._num_sent, uses_all_sms=self._overlaps_training or not self._in_flight)
        received = sent.new_empty(len(self._route.recv_rows), sent.shape[1])
        work = dist.all_to_all_single(
            received, sent, self._route.recv_counts, self._route.send_counts, group=self._group, async_op=True
        )
        assert work is not None
        self._in_flight.append(_ChunkInFlight(self._num_sent, sent, received, work))
        self._num_sent += 1

    def _arrivals(self) -> "Iterator[_ChunkInFlight]":
        while self._in_flight:
            chunk = self._in_flight.popleft()
            chunk.work.wait()
            self._send_next()
            yield chunk


@dataclass(frozen=True, eq=False)
class _ChunkInFlight:
    """Collective in flight with its buffers, which must live until it is done."""

    chunk: int
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

    For the arguments see :class:`RowExchange`. ``targets`` may be ``sources``.
    """
    exchange = RowExchange([[source] for source in sources], route, group, max_bytes).send()
    exchange.prepare_write([[target] for target in targets]).write()


def gather_rows(rows: Tensor, order: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Gather the rows of all ranks in the order of logical experts, on the CPU. Every rank of ``group`` calls it.

    Args:
        rows: Rows of this rank, ``[n, ...]``.
        order: Logical expert of every row, ranks in order, ``[L]`` int64, each expert once.
        group: Process group of the ranks.

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


def _detached(tensor: Tensor) -> Tensor:
    return tensor.detach() if tensor.requires_grad else tensor


def _chunk_widths(total: int, most: int, least: int, alignment: int) -> list[int]:
    """Cut ``total`` columns, or a few more, into chunks of at most ``most``, the outer ones of about half the width.

    The first chunk is packed before anything travels, and the last one unpacked when all has arrived, so both are
    waited for. Outer chunks narrower than ``least`` are not worth it. All widths are multiples of ``alignment`` if
    ``most`` is one.
    """
    end = min(most // 2, total // 4)
    end -= end % alignment
    if end < max(least, 1):
        return [most] * math.ceil(total / most)
    between = total - 2 * end
    number = math.ceil(between / most)
    middle = min(most, math.ceil(between / number / alignment) * alignment)
    return [end, *[middle] * number, end]


def _cut_columns(widths: Sequence[int], chunk_widths: Iterator[int], own_chunk: int) -> list[Chunk]:
    """Cut the columns of tensors side by side into chunks. A tensor at least ``own_chunk`` wide shares none."""
    chunks: list[Chunk] = []
    room = 0
    for i, width in enumerate(widths):
        start = 0
        if width >= own_chunk:
            room = 0
        while start < width:
            if room == 0:
                chunks.append([])
                room = next(chunk_widths)
            stop = min(width, start + room)
            chunks[-1].append((i, start, stop))
            room -= stop - start
            start = stop
        if width >= own_chunk:
            room = 0
    return chunks
