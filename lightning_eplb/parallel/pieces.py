"""Rows that lie apart in memory, packed into buffers and put back: in few launches, without a wait for the device."""

import itertools
import math
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from lightning_eplb import _compat
from lightning_eplb.parallel.permute import has_kernels

MOST_VIEWS = 256
"""So many pieces of a buffer are copied one by one in a single call; more are gathered and scattered by index."""

MOST_ADDRESSES = 4096
"""So many rows of tensors go into a table of addresses: it must be there before the first of them is sent."""

WORDS = {8: torch.int64, 4: torch.int32, 1: torch.uint8}
"""What rows are copied as, by its bytes."""

Stack: TypeAlias = "Sequence[Tensor]"
"""Tensors ``[n, ...]`` that are alike, of one layer after another: their rows are counted on from one to the next."""

Window: TypeAlias = "list[tuple[int, int, int]]"
"""Columns that share a buffer: of each stack, which it is, its first column and the last + 1, in words."""


def most_rows_together(tensor: Tensor) -> int:
    """How many rows of tensors like this one, a rank's of all tensors together, should travel together at most."""
    return MOST_ADDRESSES if has_kernels(tensor) else MOST_VIEWS


def pieces_of(stacks: Sequence[Stack], rows: Tensor, windows: Sequence[Window], word: int) -> "Pieces":
    """The ``rows`` of ``stacks``, cut into pieces by ``windows``.

    Args:
        stacks: Of one device; the rows of each are a multiple of ``word`` bytes wide.
        rows: int64, on the CPU or, where each stack is one tensor, on its device.
        windows: Each has a buffer.
        word: Bytes of a column, of :data:`WORDS`.
    """
    if rows.is_cuda or (stacks and not has_kernels(stacks[0][0])):
        return Pieces(stacks, rows, windows, word)
    return AddressedPieces(stacks, rows, windows, word)


class Pieces:
    """Rows of stacks that can be packed into a buffer for each window, and put back. See :func:`pieces_of`.

    A tensor that is not contiguous, or not aligned, is replaced by a copy until :meth:`finish`.
    """

    def __init__(self, stacks: Sequence[Stack], rows: Tensor, windows: Sequence[Window], word: int) -> None:
        self._stacks, self._rows, self._windows, self._word = stacks, rows, windows, word
        self._words: dict[int, list[Tensor]] = {}

    def gather(self, window: int, is_alone: bool) -> Tensor:
        """The rows, side by side in a new buffer, ``[rows, columns of the window]`` in words.

        Args:
            window: Which.
            is_alone: No collective goes on meanwhile.
        """
        parts = self._parts(window)
        if self._goes_by_index(window):
            packed = [stack[0].index_select(0, self._rows_on(stack[0].device)) for stack in parts]
            return torch.cat(packed, dim=1) if len(packed) > 1 else packed[0]
        buffer = parts[0][0].new_empty(len(self._rows), sum(stack[0].shape[1] for stack in parts))
        _copy_views(self._views_of_buffer(buffer, window), self._views_of_stacks(parts))
        return buffer

    def scatter(self, buffer: Tensor, window: int, is_alone: bool) -> None:
        """The buffer's rows, in place of those of the stacks; for ``is_alone`` see :meth:`gather`."""
        parts = self._parts(window)
        if self._goes_by_index(window):
            rows = self._rows_on(buffer.device)
            for stack, (_, columns) in zip(parts, in_buffer(self._windows[window]), strict=True):
                stack[0].index_copy_(0, rows, buffer[:, columns])
        else:
            _copy_views(self._views_of_stacks(parts), self._views_of_buffer(buffer, window))

    def finish(self) -> None:
        """Have what was scattered in the tensors themselves."""
        for i, words in self._words.items():
            for written, tensor in zip(words, self._stacks[i], strict=True):
                if written.data_ptr() != tensor.data_ptr():
                    tensor.copy_(written.view(tensor.dtype).view(tensor.shape))

    def _parts(self, window: int) -> list[list[Tensor]]:
        for i, _, _ in self._windows[window]:
            if i not in self._words:
                self._words[i] = [as_words(tensor, self._word) for tensor in self._stacks[i]]
        return [[words[:, start:stop] for words in self._words[i]] for i, start, stop in self._windows[window]]

    def _goes_by_index(self, window: int) -> bool:
        if self._rows.is_cuda:
            return True
        is_many = len(self._rows) * len(self._windows[window]) > MOST_VIEWS
        return is_many and all(len(stack) == 1 for stack in self._stacks)

    def _rows_on(self, device: torch.device) -> Tensor:
        return self._rows if self._rows.device == device else to_device(self._rows.numpy(), device)

    def _views_of_stacks(self, parts: list[list[Tensor]]) -> list[Tensor]:
        chosen = self._rows.tolist()
        views = [[row for words in stack for row in words.unbind()] for stack in parts]
        return [of_stack[row] for of_stack in views for row in chosen]

    def _views_of_buffer(self, buffer: Tensor, window: int) -> list[Tensor]:
        return [row for _, columns in in_buffer(self._windows[window]) for row in buffer[:, columns].unbind()]


class AddressedPieces(Pieces):
    """The same on a GPU with Triton, by a table of addresses: a list of views takes the host longer than the copies."""

    def __init__(self, stacks: Sequence[Stack], rows: Tensor, windows: Sequence[Window], word: int) -> None:
        super().__init__(stacks, rows, windows, word)
        self._words = {i: [_aligned(tensor, word) for tensor in stack] for i, stack in enumerate(stacks)}
        self._widths = [sum(stop - start for _, start, stop in window) for window in windows]
        self._widest = [max(stop - start for _, start, stop in window) for window in windows]
        self._of_window = [0, *itertools.accumulate(len(window) * len(rows) for window in windows)]
        columns = [
            (*part, place.start, width)
            for window, width in zip(windows, self._widths, strict=True)
            for part, place in in_buffer(window)
        ]
        stack_Q, start_Q, stop_Q, place_Q, width_Q = np.array(columns, dtype=np.int64).reshape(-1, 5).T
        chosen_N = rows.numpy()
        tensor_N, row_N = np.divmod(chosen_N, len(stacks[0][0]))
        start_KY = np.array([[words.data_ptr() for words in of_stack] for of_stack in self._words.values()])
        row_bytes_K = np.array([_row_bytes(stack[0]) for stack in stacks])
        address_KN = start_KY[:, tensor_N] + row_N * row_bytes_K[:, None]
        table_3QN = np.empty((3, len(columns), len(chosen_N)), dtype=np.int64)
        table_3QN[0] = address_KN[stack_Q] + start_Q[:, None] * word
        table_3QN[1] = place_Q[:, None] + np.arange(len(chosen_N)) * width_Q[:, None]
        table_3QN[2] = (stop_Q - start_Q)[:, None]
        self._device = stacks[0][0].device
        self._table = to_device(table_3QN.reshape(3, -1), self._device)

    def gather(self, window: int, is_alone: bool) -> Tensor:
        buffer = torch.empty(len(self._rows), self._widths[window], dtype=WORDS[self._word], device=self._device)
        self._copy(buffer, window, True, is_alone)
        return buffer

    def scatter(self, buffer: Tensor, window: int, is_alone: bool) -> None:
        self._copy(buffer, window, False, is_alone)

    def _copy(self, buffer: Tensor, window: int, into_buffer: bool, is_alone: bool) -> None:
        from lightning_eplb.parallel.kernels import copy_pieces

        pieces = slice(self._of_window[window], self._of_window[window + 1])
        copy_pieces(self._table, pieces, self._widest[window], buffer, into_buffer, is_alone)


def in_buffer(window: Window) -> list[tuple[tuple[int, int, int], slice]]:
    """The window's parts, each with the columns of the buffer that it has."""
    parts, column = [], 0
    for part in window:
        width = part[2] - part[1]
        parts.append((part, slice(column, column + width)))
        column += width
    return parts


def as_words(tensor: Tensor, word: int) -> Tensor:
    """The tensor's memory as ``[rows, words of a row]``; a copy where the tensor is not contiguous or not aligned."""
    flat = _aligned(tensor, word).reshape(tensor.shape[0], math.prod(tensor.shape[1:]))
    return flat.view(WORDS[word])


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """A copy of ``array`` on ``device``, without waiting for it: through pinned memory where it is a GPU."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _aligned(tensor: Tensor, word: int) -> Tensor:
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.storage_offset() * tensor.element_size() % word else tensor


def _row_bytes(tensor: Tensor) -> int:
    return math.prod(tensor.shape[1:]) * tensor.element_size()


def _copy_views(targets: list[Tensor], sources: list[Tensor]) -> None:
    if targets:
        _compat.copy_all(targets, sources)
