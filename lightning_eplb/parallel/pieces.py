"""Rows that lie apart in memory, packed into a buffer, and back: in few launches, and without a wait for the device."""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from lightning_eplb.parallel.permute import has_kernels

MOST_VIEWS = 256
"""So many pieces of a buffer are copied one by one in a single call; more are gathered and scattered by index."""

Stack: TypeAlias = "Sequence[Tensor]"
"""Tensors ``[n, ...]`` that are alike, of one layer after another: their rows are counted on from one to the next."""

Part: TypeAlias = "tuple[Stack, int, int]"
"""Of a stack of words, ``[n, words of a row]`` contiguous: itself, the first column and the last + 1."""


def gather(parts: Sequence[Part], rows: Tensor) -> Tensor:
    """The ``rows`` of all parts, side by side in a new buffer, ``[rows, columns of all parts]``.

    Args:
        parts: Of one device and dtype, and of as many rows.
        rows: int64, on the CPU or, where each stack is one tensor, on its device.
    """
    if _goes_by_index(parts, rows):
        rows = to_device(rows.numpy(), parts[0][0][0].device) if not rows.is_cuda else rows
        packed = [stack[0][:, start:stop].index_select(0, rows) for stack, start, stop in parts]
        return torch.cat(packed, dim=1) if len(packed) > 1 else packed[0]
    like = parts[0][0][0]
    buffer = like.new_empty(len(rows), sum(stop - start for _, start, stop in parts))
    if has_kernels(like):
        _copy_by_address(parts, rows, buffer, into_buffer=True)
    else:
        _copy_views([*_views_of_buffer(parts, buffer)], [*_views_of_stacks(parts, rows)])
    return buffer


def scatter(buffer: Tensor, parts: Sequence[Part], rows: Tensor) -> None:
    """Undo :func:`gather`: the columns of ``buffer`` become the ``rows`` of the parts, in place."""
    if _goes_by_index(parts, rows):
        rows = to_device(rows.numpy(), buffer.device) if not rows.is_cuda else rows
        pieces = buffer.split([stop - start for _, start, stop in parts], dim=1)
        for (stack, start, stop), piece in zip(parts, pieces, strict=True):
            stack[0][:, start:stop].index_copy_(0, rows, piece)
    elif has_kernels(buffer):
        _copy_by_address(parts, rows, buffer, into_buffer=False)
    else:
        _copy_views([*_views_of_stacks(parts, rows)], [*_views_of_buffer(parts, buffer)])


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """A copy of ``array`` on ``device``, without waiting for it: through pinned memory where it is a GPU."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _goes_by_index(parts: Sequence[Part], rows: Tensor) -> bool:
    if rows.is_cuda or has_kernels(parts[0][0][0]):
        return rows.is_cuda
    return len(rows) * len(parts) > MOST_VIEWS and all(len(stack) == 1 for stack, _, _ in parts)


def _copy_by_address(parts: Sequence[Part], rows: Tensor, buffer: Tensor, into_buffer: bool) -> None:
    from lightning_eplb.parallel.kernels import copy_pieces

    word, chosen = buffer.element_size(), rows.numpy()
    row_in_buffer = buffer.data_ptr() + np.arange(len(chosen)) * (buffer.shape[1] * word)
    places, places_in_buffer, widths, column = [], [], [], 0
    for stack, start, stop in parts:
        num_rows, width = stack[0].shape
        addresses = np.array([tensor.data_ptr() for tensor in stack])
        places.append(addresses[chosen // num_rows] + (chosen % num_rows * width + start) * word)
        places_in_buffer.append(row_in_buffer + column * word)
        widths.append(np.full(len(chosen), stop - start))
        column += stop - start
    theirs, ours = np.concatenate(places), np.concatenate(places_in_buffer)
    source, target = (theirs, ours) if into_buffer else (ours, theirs)
    copy_pieces(source, target, np.concatenate(widths), buffer.dtype, buffer)


def _views_of_stacks(parts: Sequence[Part], rows: Tensor) -> list[Tensor]:
    chosen = rows.tolist()
    views = [[row for tensor in stack for row in tensor[:, start:stop].unbind()] for stack, start, stop in parts]
    return [of_part[row] for of_part in views for row in chosen]


def _views_of_buffer(parts: Sequence[Part], buffer: Tensor) -> list[Tensor]:
    pieces = buffer.split([stop - start for _, start, stop in parts], dim=1)
    return [row for piece in pieces for row in piece.unbind()]


def _copy_views(targets: list[Tensor], sources: list[Tensor]) -> None:
    if targets:
        torch.ops.aten._foreach_copy_(targets, sources)
