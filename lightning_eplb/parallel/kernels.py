"""Triton kernels: the weighted sum of a token's rows and its gradient, scatter of rows, copy of memory segments.

The sum has one program a token, which reads the token's ``K`` rows and writes one. Sums are in float32 (float64 for
float64 rows) and in the order of ``K``, so they are the same on every run. Rows have a scatter kernel because
``index_copy_`` takes three times as long as reading and writing them (0.67 and 0.20 ms for 32,768 rows of 1,536
bfloat16, on a quarter of an H100). Memory segments are copied by a table of their addresses because a list of views
takes the host longer to create than the device to copy.

Shape suffixes: ``T`` tokens, ``K`` top-k, ``N`` rows, ``D`` model width.
"""

# pyright: reportMissingImports=false, reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_BLOCK_COLUMNS = 2048
"""Columns of a row that a program holds at a time."""

BLOCK_WORDS = 4096
"""Words of a memory segment that a program copies at a time."""

SMS_PER_PROGRAM = 5
"""Multiprocessors for each program that copies segments while a collective is in flight. With more programs they take
all of the memory's bandwidth and the collective waits. Measured between quarters of an H100: rows travelled at 0.80 of
the bandwidth, and at 0.74 with a program on every multiprocessor."""


def sum_pairs(rows_ND: Tensor, place_TK: Tensor, weights_TK: Tensor | None) -> Tensor:
    """Sum the rows of each token, times ``weights_TK`` if given, ``[T, D]`` in the rows' dtype.

    Args:
        rows_ND: Rows, contiguous.
        place_TK: Row of each pair, int64, contiguous, ``-1`` for none.
        weights_TK: Weights, contiguous, in any floating dtype.
    """
    (tokens, top_k), width = place_TK.shape, rows_ND.shape[-1]
    summed = rows_ND.new_empty(tokens, width)
    if summed.numel():
        block = min(triton.next_power_of_2(width), MAX_BLOCK_COLUMNS)
        weights = rows_ND if weights_TK is None else weights_TK
        _sum[(tokens, triton.cdiv(width, block))](
            rows_ND, place_TK, weights, summed, width, top_k, weights_TK is not None, _sum_dtype(rows_ND), block
        )
    return summed


def sum_pairs_backward(grad_TD: Tensor, rows_ND: Tensor, weights_TK: Tensor, place_TK: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of :func:`sum_pairs` for rows and weights. All tensors are contiguous."""
    (tokens, top_k), width = place_TK.shape, rows_ND.shape[-1]
    grad_rows_ND, grad_weights_TK = torch.empty_like(rows_ND), torch.empty_like(weights_TK)
    if grad_TD.numel():
        block = min(triton.next_power_of_2(width), MAX_BLOCK_COLUMNS)
        _sum_backward[(tokens, top_k)](
            grad_TD, rows_ND, weights_TK, place_TK, grad_rows_ND, grad_weights_TK, width, _sum_dtype(rows_ND), block
        )
    return grad_rows_ND, grad_weights_TK


def scatter_rows(rows_ND: Tensor, places_N: Tensor, target_MD: Tensor) -> None:
    """Set ``target_MD[places_N] = rows_ND`` in place. Indices are unique. Tensors are contiguous and of one dtype."""
    width = rows_ND.shape[-1]
    if rows_ND.numel():
        block = min(triton.next_power_of_2(width), MAX_BLOCK_COLUMNS)
        _put[(len(rows_ND), triton.cdiv(width, block))](rows_ND, places_N, target_MD, width, block)


def copy_segments(
    table: Tensor, segments: slice, max_words: int, buffer: Tensor, into_buffer: bool, uses_all_sms: bool
) -> None:
    """Copy memory segments into a buffer, or back, in one launch. Segments must not overlap.

    Args:
        table: All segments, ``[3, segments]`` int64 on the buffer's device, contiguous: address, first word in the
            buffer, and number of words of each.
        segments: Segments to copy.
        max_words: Words of the longest of them.
        buffer: Contiguous buffer, whose dtype is the word.
        into_buffer: Copy from the addresses into the buffer, else from the buffer to the addresses.
        uses_all_sms: Copy with the whole device, since no collective is in flight.
    """
    num_segments, blocks_per_segment = segments.stop - segments.start, triton.cdiv(max_words, BLOCK_WORDS)
    if buffer.numel() and num_segments:
        blocks = num_segments * blocks_per_segment
        _copy[(blocks if uses_all_sms else min(blocks, _num_programs_during_collective(buffer.device)),)](
            table,
            table.shape[1],
            segments.start,
            num_segments,
            blocks_per_segment,
            buffer,
            into_buffer,
            BLOCK_WORDS,
            num_warps=8,
        )


def _num_programs_during_collective(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return max(1, torch.cuda.get_device_properties(device).multi_processor_count // SMS_PER_PROGRAM)


def _sum_dtype(rows: Tensor) -> tl.dtype:
    return tl.float64 if rows.dtype == torch.float64 else tl.float32


@triton.jit
def _sum(
    rows,
    places,
    weights,
    summed,
    WIDTH: tl.constexpr,
    TOP_K: tl.constexpr,
    IS_WEIGHTED: tl.constexpr,
    SUM_DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_inside = columns < WIDTH
    total = tl.zeros((BLOCK,), dtype=SUM_DTYPE)
    for k in range(TOP_K):
        place = tl.load(places + token * TOP_K + k)
        if place >= 0:
            row = tl.load(rows + place * WIDTH + columns, mask=is_inside, other=0.0).to(SUM_DTYPE)
            if IS_WEIGHTED:
                row *= tl.load(weights + token * TOP_K + k).to(SUM_DTYPE)
            total += row
    tl.store(summed + token * WIDTH + columns, total.to(summed.dtype.element_ty), mask=is_inside)


@triton.jit
def _sum_backward(
    grad,
    rows,
    weights,
    places,
    grad_rows,
    grad_weights,
    WIDTH: tl.constexpr,
    SUM_DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token, k, top_k = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    pair = token * top_k + k
    place = tl.load(places + pair)
    products = tl.zeros((BLOCK,), dtype=SUM_DTYPE)
    if place >= 0:
        weight = tl.load(weights + pair).to(SUM_DTYPE)
        for start in range(0, WIDTH, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            is_inside = columns < WIDTH
            incoming = tl.load(grad + token * WIDTH + columns, mask=is_inside, other=0.0).to(SUM_DTYPE)
            row = tl.load(rows + place * WIDTH + columns, mask=is_inside, other=0.0).to(SUM_DTYPE)
            products += incoming * row
            outgoing = (incoming * weight).to(grad_rows.dtype.element_ty)
            tl.store(grad_rows + place * WIDTH + columns, outgoing, mask=is_inside)
    tl.store(grad_weights + pair, tl.sum(products, axis=0).to(grad_weights.dtype.element_ty))


@triton.jit
def _put(rows, places, target, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_inside = columns < WIDTH
    place = tl.load(places + row)
    moved = tl.load(rows + row * WIDTH + columns, mask=is_inside)
    tl.store(target + place * WIDTH + columns, moved, mask=is_inside)


@triton.jit(do_not_specialize=["all_segments", "first", "num_segments", "blocks_per_segment"])
def _copy(
    table,
    all_segments,
    first,
    num_segments,
    blocks_per_segment,
    buffer,
    INTO_BUFFER: tl.constexpr,
    WORDS: tl.constexpr,
):
    block = tl.program_id(0)
    while block < num_segments * blocks_per_segment:
        segment = first + block // blocks_per_segment
        outside = tl.load(table + segment).to(tl.pointer_type(buffer.dtype.element_ty))
        inside = buffer + tl.load(table + all_segments + segment)
        columns = (block % blocks_per_segment).to(tl.int64) * WORDS + tl.arange(0, WORDS)
        is_inside = columns < tl.load(table + 2 * all_segments + segment)
        if INTO_BUFFER:
            tl.store(inside + columns, tl.load(outside + columns, mask=is_inside), mask=is_inside)
        else:
            tl.store(outside + columns, tl.load(inside + columns, mask=is_inside), mask=is_inside)
        block += tl.num_programs(0)
