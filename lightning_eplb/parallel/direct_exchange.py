"""Trips of direct dispatch: kernels that write tokens, partial sums and gradients into the memory of other ranks.

An exchange is a trip: a kernel writes into the regions of all ranks, a barrier follows, and kernels read this rank's
region. A region holds a header of each rank, then slots and weights of the pairs of all ranks, then rows:
:class:`Region`. Sums are in float32 (float64 for float64 rows), over ``K`` and then over ranks, both in order.

Shape suffixes: ``T`` tokens, ``K`` top-k, ``M`` rows that this rank computes, ``R`` ranks, ``S`` slots of a rank, ``P``
slots of all ranks, ``D`` width of a row.
"""

# pyright: reportMissingImports=false

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from lightning_eplb.parallel.direct_kernels import count_kernel, expand_kernel, place_kernel, send_kernel
from lightning_eplb.parallel.direct_sum_kernels import receive_sums_kernel, send_sums_kernel
from lightning_eplb.parallel.launch import launch, power_of_2
from lightning_eplb.parallel.symmetric_buffers import HEADER_WORDS, Header, Region

MAX_BLOCK_COLUMNS = 2048
"""Columns of a row that a program holds at a time."""

PROGRAMS = 128
"""Programs that count and place the pairs of all ranks, about as many as a GPU has multiprocessors. Measured on half of
an H200 with 262,144 pairs: placing takes 0.12 ms, and 0.28 with 256 programs of 8 warps."""

TILE = 8192
"""Numbers of a tile of pairs and slots, 64 a thread."""


class Placed(NamedTuple):
    """Rows that this rank computes, in the order of its experts, and their pairs.

    Attributes:
        pairs: Pair of each row, int32: ``(rank * stride + token) * K + k``. Longer than there are rows.
        weights: Routing weight of each row, float32 or float64. As long.
        place: Row of each pair, ``[R, stride, K]`` int32, -1 for those of other ranks.
        ends: End of each expert's rows, int32, then the tokens of each rank, ``[R]``.
        stride: Tokens between the pairs of two ranks.
    """

    pairs: Tensor
    weights: Tensor
    place: Tensor
    ends: Tensor
    stride: int


def send(
    hidden_TD: Tensor,
    index_TK: Tensor,
    weights_TK: Tensor | None,
    slot_of_expert: Tensor | None,
    slots_per_rank: int,
    region: Region,
    header: Header,
    counts: Tensor | None = None,
) -> Tensor:
    """Write the header to all ranks, and each token to the ranks that compute it, but not to this one.

    Args:
        hidden_TD: Rows of this rank's tokens, contiguous.
        index_TK: Logical experts with ``slot_of_expert``, else slots in int32, contiguous.
        weights_TK: Routing weights, contiguous: they and the slots of all pairs go to all ranks. ``None``: rows only.
        slot_of_expert: Routing table, ``[L + 1]`` int32.
        slots_per_rank: Slots of a rank.
        region: Regions of the trip.
        header: Header of the trip.
        counts: Tensor that is set to zeros, too, contiguous int64.

    Returns:
        Slots of the pairs, ``[T, K]`` int32.
    """
    (tokens, width), top_k = hidden_TD.shape, index_TK.shape[1]
    slots_TK = index_TK if slot_of_expert is None else torch.empty_like(index_TK, dtype=torch.int32)
    block = _block_of(width)
    launch(
        send_kernel,
        (max(tokens, 1), 1),
        (
            hidden_TD,
            index_TK,
            hidden_TD if weights_TK is None else weights_TK,
            index_TK if slot_of_expert is None else slot_of_expert,
            slots_TK,
            region.addresses if counts is None else counts,
            region.addresses,
        ),
        (
            *header,
            tokens,
            0 if counts is None else counts.numel(),
            region.capacity,
            region.slots,
            region.weights,
            region.rows,
            0 if slot_of_expert is None else len(slot_of_expert) - 1,
        ),
        (
            slots_per_rank,
            width,
            top_k,
            power_of_2(top_k),
            region.rank,
            region.num_ranks,
            slot_of_expert is not None,
            weights_TK is not None,
            sum_dtype(hidden_TD)[1],
            block,
        ),
    )
    return slots_TK


def count_pairs(
    slots_per_rank: int, top_k: int, region: Region, header: Header, report: Tensor, errors: Tensor
) -> Tensor:
    """Count the pairs of all ranks for each slot, and report the counts and the headers.

    Args:
        slots_per_rank: Slots of a rank.
        top_k: ``K``.
        region: Regions of the trip.
        header: Header of the trip.
        report: ``[R, 8]`` headers, then ``[R, P]`` pairs, which must be zeros, then ``errors``; int64.
        errors: ``[8]`` int64, the first mismatch of headers in earlier trips.

    Returns:
        Counts of chunks of pairs, for :func:`place_pairs`.
    """
    ranks, num_slots = region.num_ranks, region.num_ranks * slots_per_rank
    chunks = max(1, PROGRAMS // ranks)
    slots_block = max(16, power_of_2(num_slots + 1))
    counts = torch.empty(ranks * chunks, slots_block, dtype=torch.int32, device=report.device)
    launch(
        count_kernel,
        (ranks * chunks, 1),
        (counts, report, errors, region.addresses),
        (header.tag, header.sequence, region.capacity, region.slots),
        (top_k, num_slots, region.rank, ranks, chunks, max(16, TILE // slots_block), slots_block, HEADER_WORDS),
    )
    return counts


def place_pairs(
    slots_S: Tensor, slots_per_rank: int, top_k: int, dtype: torch.dtype, region: Region, counts: Tensor
) -> Placed:
    """Sort the pairs that this rank computes by expert, stable.

    Args:
        slots_S: Filled slots of this rank in the order in which they are computed, int32 on the device.
        slots_per_rank: Slots of a rank.
        top_k: ``K``.
        dtype: Dtype of the weights in the region.
        region: Regions of the trip.
        counts: Return value of :func:`count_pairs`.
    """
    (programs, slots_block), ranks, device = counts.shape, region.num_ranks, counts.device
    own_block = max(16, power_of_2(len(slots_S)))
    pairs, place = torch.empty(2, ranks * region.capacity * top_k, dtype=torch.int32, device=device).unbind()
    weights = torch.empty(len(pairs), dtype=dtype, device=device)
    ends = torch.empty(len(slots_S) + ranks, dtype=torch.int32, device=device)
    launch(
        place_kernel,
        (programs, 1),
        (counts, slots_S, pairs, weights, place, ends, region.addresses),
        (len(slots_S), region.capacity, region.slots, region.weights),
        (
            top_k,
            region.rank * slots_per_rank,
            region.rank,
            ranks,
            programs // ranks,
            power_of_2(programs),
            max(16, TILE // slots_block),
            max(16, TILE // own_block),
            slots_block,
            own_block,
            HEADER_WORDS,
        ),
    )
    return Placed(pairs, weights, place, ends, region.capacity)


def expand(
    hidden_TD: Tensor, first: int, num_rows: int, placed: Placed, top_k: int, region: Region, divisor: int = 1
) -> Tensor:
    """Gather the rows of this rank's experts, ``[num_rows, D]``, from ``hidden_TD`` and from the region.

    Args:
        hidden_TD: Rows of this rank's tokens, contiguous.
        first: First row to gather.
        num_rows: Number of rows.
        placed: Pairs of the rows.
        top_k: ``K``.
        region: Regions of the trip.
        divisor: Number that rows are divided by. Defaults to 1.
    """
    out_MD = hidden_TD.new_empty(num_rows, hidden_TD.shape[1])
    _launch_expand(hidden_TD, None, out_MD, None, first, placed, top_k, region, divisor)
    return out_MD


def expand_weighted(
    grad_TD: Tensor, output_MD: Tensor | None, first: int, num_rows: int, placed: Placed, top_k: int, region: Region
) -> tuple[Tensor, Tensor]:
    """Gather rows as :func:`expand`, times their weights.

    Returns:
        Weighted rows, ``[num_rows, D]``, and the gradients of their weights, ``[num_rows]``: products of gathered rows
        and ``output_MD``, or zeros if it is ``None``.
    """
    out_MD = grad_TD.new_empty(num_rows, grad_TD.shape[1])
    make = torch.zeros if output_MD is None else torch.empty
    grad_M = make(num_rows, dtype=placed.weights.dtype, device=grad_TD.device)
    _launch_expand(grad_TD, output_MD, out_MD, grad_M, first, placed, top_k, region)
    return out_MD, grad_M


def _launch_expand(
    hidden_TD: Tensor,
    old_MD: Tensor | None,
    out_MD: Tensor,
    grad_M: Tensor | None,
    first: int,
    placed: Placed,
    top_k: int,
    region: Region,
    divisor: int = 1,
) -> None:
    if not out_MD.numel():
        return
    launch(
        expand_kernel,
        (len(out_MD), 1),
        (
            hidden_TD,
            hidden_TD if old_MD is None else old_MD,
            out_MD,
            placed.weights if grad_M is None else grad_M,
            placed.pairs,
            placed.weights,
            region.addresses,
        ),
        (first, placed.stride, region.capacity, region.rows),
        (
            out_MD.shape[1],
            top_k,
            region.rank,
            grad_M is not None,
            old_MD is not None,
            divisor,
            sum_dtype(hidden_TD)[1],
            _block_of(out_MD.shape[1]),
        ),
    )


def send_sums(
    rows: tuple[Tensor, Tensor],
    grads: tuple[Tensor, Tensor] | None,
    is_weighted: bool,
    max_tokens: int,
    placed: Placed,
    top_k: int,
    region: Region,
    header: Header,
    factor: int = 1,
) -> None:
    """Sum the rows of each token that this rank computed, and write the sum to the token's rank, with the header.

    Args:
        rows: Rows of primaries and of redundant experts, contiguous.
        grads: Gradients of the rows' weights, ``[M]`` each, which go to the token's rank, too.
        is_weighted: Multiply rows by their weights.
        max_tokens: Most tokens of a rank.
        placed: Rows of the pairs.
        top_k: ``K``.
        region: Regions of the trip.
        header: Header of the trip.
        factor: Number that sums and gradients are multiplied by. Defaults to 1.
    """
    own_MD, others_MD = rows
    launch(
        send_sums_kernel,
        (max(max_tokens, 1), region.num_ranks),
        (
            own_MD,
            others_MD,
            *((placed.weights, placed.weights) if grads is None else grads),
            placed.place,
            placed.weights,
            placed.ends,
            region.addresses,
        ),
        (
            *header,
            len(placed.ends) - region.num_ranks,
            len(own_MD),
            placed.stride,
            region.capacity,
            region.weights,
            region.rows,
        ),
        (
            own_MD.shape[1],
            top_k,
            region.rank,
            region.num_ranks,
            is_weighted,
            grads is not None,
            len(others_MD) > 0,
            factor,
            sum_dtype(own_MD)[1],
            _block_of(own_MD.shape[1]),
        ),
    )


def receive_sums(
    slots_TK: Tensor,
    slots_per_rank: int,
    like_1D: Tensor,
    weights_dtype: torch.dtype | None,
    region: Region,
    header: Header,
    errors: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """Sum the sums of all ranks for each token, and take the gradients of its weights.

    Args:
        slots_TK: Slots of this rank's pairs, int32.
        slots_per_rank: Slots of a rank.
        like_1D: Tensor of the rows' width, dtype and device.
        weights_dtype: Dtype of the gradients of weights. ``None`` for none.
        region: Regions of the trip.
        header: Header of the trip.
        errors: ``[8]`` int64, the first mismatch of headers.

    Returns:
        ``[T, D]``, and ``[T, K]`` if ``weights_dtype`` is given.
    """
    tokens, top_k = slots_TK.shape
    out_TD = like_1D.new_empty(tokens, like_1D.shape[-1])
    grad_TK = None if weights_dtype is None else torch.empty_like(slots_TK, dtype=weights_dtype)
    launch(
        receive_sums_kernel,
        (max(tokens, 1), 1),
        (out_TD, out_TD if grad_TK is None else grad_TK, slots_TK, errors, region.addresses),
        (header.tag, header.sequence, tokens, region.capacity, region.weights, region.rows),
        (
            slots_per_rank,
            out_TD.shape[1],
            top_k,
            power_of_2(top_k),
            region.rank,
            region.num_ranks,
            grad_TK is not None,
            sum_dtype(out_TD)[1],
            _block_of(out_TD.shape[1]),
        ),
    )
    return out_TD, grad_TK


def sum_dtype(rows: Tensor) -> tuple[torch.dtype, tl.dtype]:
    """Return the dtype of sums, and of weights in a region."""
    return (torch.float64, tl.float64) if rows.dtype == torch.float64 else (torch.float32, tl.float32)


def _block_of(width: int) -> int:
    return min(power_of_2(width), MAX_BLOCK_COLUMNS)
