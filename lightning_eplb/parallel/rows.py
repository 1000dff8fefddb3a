"""Rows of tensors from rank to rank: packed into one buffer, a bounded collective a chunk."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

MAX_STAGING_BYTES = 64 * 2**20
"""What a rank's send buffer, and its receive buffer, hold at most while rows travel (a single row may need more)."""

all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""The collective under its newer name, where torch has it (2.13); the older name warns there."""

_WORDS = {8: torch.int64, 4: torch.int32, 1: torch.uint8}


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
        cls, source_rank: Tensor, source_row: Tensor, target_rank: Tensor, target_row: Tensor, rank: int, size: int
    ) -> "Route":
        """This rank's route in a list of moves that all ranks share; four int64 tensors of equal length."""
        sent, received = source_rank == rank, target_rank == rank
        by_target = torch.argsort(target_rank[sent], stable=True)
        by_source = torch.argsort(source_rank[received], stable=True)
        out_counts, in_counts = (torch.bincount(ranks, minlength=size) for ranks in (source_rank, target_rank))
        return cls(
            send_rows=source_row[sent][by_target],
            send_counts=torch.bincount(target_rank[sent], minlength=size).tolist(),
            recv_rows=target_row[received][by_source],
            recv_counts=torch.bincount(source_rank[received], minlength=size).tolist(),
            most_rows=int(torch.maximum(out_counts, in_counts).max()),
        )

    @property
    def reverse(self) -> "Route":
        """The same rows on their way back."""
        return Route(self.recv_rows, self.recv_counts, self.send_rows, self.send_counts, self.most_rows)

    @property
    def arriving_in_order(self) -> "Route":
        """The same route into a tensor that holds just the received rows, in the order in which they arrive."""
        order = torch.arange(len(self.recv_rows))
        return Route(self.send_rows, self.send_counts, order, self.recv_counts, self.most_rows)


def exchange_rows(
    sources: Sequence[Tensor],
    targets: Sequence[Tensor],
    route: Route,
    group: dist.ProcessGroup,
    max_bytes: int = MAX_STAGING_BYTES,
) -> None:
    """Write the rows that other ranks send along ``route`` into ``targets``, in place. All ranks of ``group`` call it.

    Wide rows travel a range of columns at a time. Within a range every row is read before one is written, so
    ``targets`` may be ``sources``: rows can change places without a second copy of the tensors.

    Args:
        sources: Tensors of one length in dimension 0; the same number, shapes beyond it and dtypes on every rank.
        targets: A tensor for each of ``sources``, its rows of the same shape and dtype; ``route.recv_rows`` index them.
        route: What goes where.
        group: The ranks of the route.
        max_bytes: Upper bound of the send buffer and of the receive buffer.
    """
    if route.most_rows == 0:
        return
    pairs = [(source.detach(), target.detach()) for source, target in zip(sources, targets, strict=True)]
    pairs = [(source, target) for source, target in pairs if math.prod(source.shape[1:])]
    if not pairs:
        return
    row_bytes = [math.prod(source.shape[1:]) * source.element_size() for source, _ in pairs]
    word = next(size for size in _WORDS if all(width % size == 0 for width in row_bytes))
    sides = [(_as_words(source, word), _as_words(target, word)) for source, target in pairs]
    columns = max(1, max_bytes // word // route.most_rows)
    device = pairs[0][0].device
    send_rows, recv_rows = route.send_rows.to(device), route.recv_rows.to(device)
    for window in _column_windows([width // word for width in row_bytes], columns):
        packed = [sides[i][0][:, start:stop].index_select(0, send_rows) for i, start, stop in window]
        sent = torch.cat(packed, dim=1) if len(packed) > 1 else packed[0]
        received = sent.new_empty(len(recv_rows), sent.shape[1])
        dist.all_to_all_single(received, sent, route.recv_counts, route.send_counts, group=group)
        column = 0
        for i, start, stop in window:
            sides[i][1][:, start:stop].index_copy_(0, recv_rows, received[:, column : column + stop - start])
            column += stop - start
    for (_, target), (_, words) in zip(pairs, sides, strict=True):
        if words.data_ptr() != target.data_ptr():
            target.copy_(words.view(target.dtype).view(target.shape))


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
    size = dist.get_world_size(group)
    flat = mine.new_empty(size * mine.numel())
    all_gather_single(flat, mine.reshape(-1), group=group)
    logical = torch.empty(size * len(mine), *mine.shape[1:], dtype=mine.dtype)
    logical[order] = flat.view(logical.shape).cpu()
    return logical


def _as_words(tensor: Tensor, word: int) -> Tensor:
    """The tensor's memory as ``[rows, words of a row]``; a copy where the tensor is not contiguous or not aligned."""
    flat = tensor.contiguous().reshape(tensor.shape[0], math.prod(tensor.shape[1:]))
    if flat.storage_offset() * flat.element_size() % word:
        flat = flat.clone()
    return flat.view(_WORDS[word])


def _column_windows(widths: Sequence[int], columns: int) -> list[list[tuple[int, int, int]]]:
    """Cut tensors that lie side by side into windows of ``columns``: ``(tensor, first column, last + 1)`` each."""
    windows: list[list[tuple[int, int, int]]] = []
    room = 0
    for i, width in enumerate(widths):
        start = 0
        while start < width:
            if room == 0:
                windows.append([])
                room = columns
            stop = min(width, start + room)
            windows[-1].append((i, start, stop))
            room -= stop - start
            start = stop
    return windows
