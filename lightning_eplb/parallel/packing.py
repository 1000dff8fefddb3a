"""Packing of scattered rows into contiguous buffers and back: few launches, no device synchronization."""

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from lightning_eplb import _compat
from lightning_eplb.parallel.permute import has_kernels

MAX_VIEWS = 256
"""Row segments that one call copies as a list of views. More are gathered and scattered by index."""

MAX_ADDRESSES = 4096
"""Row segments in an address table. The table must be complete before the first of them is sent."""

WORD_DTYPES = {8: torch.int64, 4: torch.int32, 1: torch.uint8}
"""Dtypes that rows are copied as, by bytes of a word."""

Stack: TypeAlias = "Sequence[Tensor]"
"""Tensors ``[n, ...]`` of one shape and dtype, one for each layer. Their rows are numbered through."""

Chunk: TypeAlias = "list[tuple[int, int, int]]"
"""Columns that share a buffer: the index of each stack, its first column and its last column + 1, in words."""


def bytes_of_row(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of one row, such as one expert, over all ``tensors``, ``[n, ...]`` each."""
    return sum(math.prod(tensor.shape[1:]) * tensor.element_size() for tensor in tensors)


def max_rows_together(tensor: Tensor) -> int:
    """Return how many row segments of tensors like this one should travel together at most, over all tensors."""
    return MAX_ADDRESSES if has_kernels(tensor) else MAX_VIEWS


def make_packer(stacks: Sequence[Stack], rows: Tensor, chunks: Sequence[Chunk], word: int) -> "RowPacker":
    """Create the packer for ``rows`` of ``stacks``, cut into ``chunks`` of columns.

    Args:
        stacks: Stacks on one device. The row bytes of each are a multiple of ``word``.
        rows: Row numbers, int64, on the CPU or, where each stack is one tensor, on its device.
        chunks: Chunks, each with a buffer of its own.
        word: Bytes of a column, a key of :data:`WORD_DTYPES`.
    """
    if rows.is_cuda or (stacks and not has_kernels(stacks[0][0])):
        return RowPacker(stacks, rows, chunks, word)
    return AddressTablePacker(stacks, rows, chunks, word)


class RowPacker:
    """Packer of rows of stacks into one buffer for each chunk of columns, and back. See :func:`make_packer`.

    A tensor that is not contiguous or not aligned is replaced by a copy until :meth:`finish`.
    """

    def __init__(self, stacks: Sequence[Stack], rows: Tensor, chunks: Sequence[Chunk], word: int) -> None:
        self._stacks, self._rows, self._chunks, self._word = stacks, rows, chunks, word
        self._words: dict[int, list[Tensor]] = {}

    def pack(self, chunk: int, uses_all_sms: bool) -> Tensor:
        """Copy the rows into a new buffer, ``[rows, columns of the chunk]`` in words.

        Args:
            chunk: Index of the chunk.
            uses_all_sms: The copy may use all multiprocessors, since no collective is in flight.
        """
        columns = self._columns_of(chunk)
        if self._copies_by_index(chunk):
            packed = [stack[0].index_select(0, self._rows_on(stack[0].device)) for stack in columns]
            return torch.cat(packed, dim=1) if len(packed) > 1 else packed[0]
        buffer = columns[0][0].new_empty(len(self._rows), sum(stack[0].shape[1] for stack in columns))
        _copy_views(self._views_of_buffer(buffer, chunk), self._views_of_stacks(columns))
        return buffer

    def unpack(self, buffer: Tensor, chunk: int, uses_all_sms: bool) -> None:
        """Copy the rows of a buffer into the stacks, in place. For the arguments see :meth:`pack`."""
        columns = self._columns_of(chunk)
        if self._copies_by_index(chunk):
            rows = self._rows_on(buffer.device)
            for stack, (_, in_buffer) in zip(columns, buffer_columns(self._chunks[chunk]), strict=True):
                stack[0].index_copy_(0, rows, buffer[:, in_buffer])
        else:
            _copy_views(self._views_of_stacks(columns), self._views_of_buffer(buffer, chunk))

    def finish(self) -> None:
        """Write what was unpacked into copies of tensors to the tensors themselves."""
        for i, words in self._words.items():
            for written, tensor in zip(words, self._stacks[i], strict=True):
                if written.data_ptr() != tensor.data_ptr():
                    tensor.copy_(written.view(tensor.dtype).view(tensor.shape))

    def _columns_of(self, chunk: int) -> list[list[Tensor]]:
        for i, _, _ in self._chunks[chunk]:
            if i not in self._words:
                self._words[i] = [as_words(tensor, self._word) for tensor in self._stacks[i]]
        return [[words[:, start:stop] for words in self._words[i]] for i, start, stop in self._chunks[chunk]]

    def _copies_by_index(self, chunk: int) -> bool:
        if self._rows.is_cuda:
            return True
        is_many = len(self._rows) * len(self._chunks[chunk]) > MAX_VIEWS
        return is_many and all(len(stack) == 1 for stack in self._stacks)

    def _rows_on(self, device: torch.device) -> Tensor:
        return self._rows if self._rows.device == device else to_device(self._rows.numpy(), device)

    def _views_of_stacks(self, columns: list[list[Tensor]]) -> list[Tensor]:
        chosen = self._rows.tolist()
        views = [[row for words in stack for row in words.unbind()] for stack in columns]
        return [of_stack[row] for of_stack in views for row in chosen]

    def _views_of_buffer(self, buffer: Tensor, chunk: int) -> list[Tensor]:
        return [row for _, in_buffer in buffer_columns(self._chunks[chunk]) for row in buffer[:, in_buffer].unbind()]


class AddressTablePacker(RowPacker):
    """Packer on a GPU with Triton, by a table of addresses.

    Creating a list of views takes the host longer than the device takes to copy.
    """

    def __init__(self, stacks: Sequence[Stack], rows: Tensor, chunks: Sequence[Chunk], word: int) -> None:
        super().__init__(stacks, rows, chunks, word)
        self._words = {i: [_aligned(tensor, word) for tensor in stack] for i, stack in enumerate(stacks)}
        self._widths = [sum(stop - start for _, start, stop in chunk) for chunk in chunks]
        self._max_widths = [max(stop - start for _, start, stop in chunk) for chunk in chunks]
        self._first_segment = [0, *itertools.accumulate(len(chunk) * len(rows) for chunk in chunks)]
        columns = [
            (*part, in_buffer.start, width)
            for chunk, width in zip(chunks, self._widths, strict=True)
            for part, in_buffer in buffer_columns(chunk)
        ]
        stack_Q, start_Q, stop_Q, place_Q, width_Q = np.array(columns, dtype=np.int64).reshape(-1, 5).T
        chosen_N = rows.numpy()
        tensor_N, row_N = np.divmod(chosen_N, len(stacks[0][0]))
        start_KY = np.array([[words.data_ptr() for words in of_stack] for of_stack in self._words.values()])
        row_bytes_K = np.array([bytes_of_row(stack[:1]) for stack in stacks])
        address_KN = start_KY[:, tensor_N] + row_N * row_bytes_K[:, None]
        table_3QN = np.empty((3, len(columns), len(chosen_N)), dtype=np.int64)
        table_3QN[0] = address_KN[stack_Q] + start_Q[:, None] * word
        table_3QN[1] = place_Q[:, None] + np.arange(len(chosen_N)) * width_Q[:, None]
        table_3QN[2] = (stop_Q - start_Q)[:, None]
        self._device = stacks[0][0].device
        self._table = to_device(table_3QN.reshape(3, -1), self._device)

    def pack(self, chunk: int, uses_all_sms: bool) -> Tensor:
        buffer = torch.empty(len(self._rows), self._widths[chunk], dtype=WORD_DTYPES[self._word], device=self._device)
        self._copy(buffer, chunk, True, uses_all_sms)
        return buffer

    def unpack(self, buffer: Tensor, chunk: int, uses_all_sms: bool) -> None:
        self._copy(buffer, chunk, False, uses_all_sms)

    def _copy(self, buffer: Tensor, chunk: int, into_buffer: bool, uses_all_sms: bool) -> None:
        from lightning_eplb.parallel.kernels import copy_segments

        segments = slice(self._first_segment[chunk], self._first_segment[chunk + 1])
        copy_segments(self._table, segments, self._max_widths[chunk], buffer, into_buffer, uses_all_sms)


def buffer_columns(chunk: Chunk) -> list[tuple[tuple[int, int, int], slice]]:
    """Return each part of the chunk with its columns in the buffer."""
    parts, column = [], 0
    for part in chunk:
        width = part[2] - part[1]
        parts.append((part, slice(column, column + width)))
        column += width
    return parts


def as_words(tensor: Tensor, word: int) -> Tensor:
    """View the tensor's memory as ``[rows, words of a row]``; copy it if it is not contiguous or not aligned."""
    flat = _aligned(tensor, word).reshape(tensor.shape[0], math.prod(tensor.shape[1:]))
    return flat.view(WORD_DTYPES[word])


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """Copy ``array`` to ``device`` without a device synchronization, through pinned memory for a GPU."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _aligned(tensor: Tensor, word: int) -> Tensor:
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.storage_offset() * tensor.element_size() % word else tensor


def _copy_views(targets: list[Tensor], sources: list[Tensor]) -> None:
    if targets:
        _compat.copy_all(targets, sources)
