"""Triton kernels that combine outputs and return gradients: ranks send sums over their rows, and add received ones.

See :mod:`~lightning_eplb.parallel.direct_exchange`, which launches them, and
:mod:`~lightning_eplb.parallel.direct_kernels` for what is not specialised.
"""

# pyright: reportMissingImports=false, reportArgumentType=false, reportIndexIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false

import triton
import triton.language as tl

from lightning_eplb.parallel.direct_kernels import area, check_headers, write_header


@triton.jit(
    do_not_specialize=[
        *("tag", "sequence", "header_tokens", "payload", "num_served", "num_own"),
        *("stride", "capacity", "weights_offset", "rows_offset"),
    ],
    do_not_specialize_on_alignment=["own_grads", "other_grads", "place", "weights", "ends"],
)
def send_sums_kernel(
    own,
    others,
    own_grads,
    other_grads,
    place,
    weights,
    ends,
    addresses,
    tag,
    sequence,
    header_tokens,
    payload,
    num_served,
    num_own,
    stride,
    capacity,
    weights_offset,
    rows_offset,
    WIDTH: tl.constexpr,
    TOP_K: tl.constexpr,
    ME: tl.constexpr,
    RANKS: tl.constexpr,
    IS_WEIGHTED: tl.constexpr,
    HAS_GRADS: tl.constexpr,
    HAS_OTHERS: tl.constexpr,
    FACTOR: tl.constexpr,
    SUM_DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token, rank = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if (token == 0) & (rank == 0):
        write_header(addresses, tag, sequence, header_tokens, payload, ME, RANKS)
    if token < tl.load(ends + num_served + rank):
        pair = (rank * stride + token) * TOP_K
        there = rank * capacity + token
        for start in range(0, WIDTH, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            is_inside = columns < WIDTH
            total = tl.zeros((BLOCK,), dtype=SUM_DTYPE)
            is_any = 0
            for k in tl.static_range(TOP_K):
                m = tl.load(place + pair + k).to(tl.int64)
                if m >= 0:
                    if HAS_OTHERS:
                        source = tl.where(m < num_own, own + m * WIDTH, others + (m - num_own) * WIDTH)
                    else:
                        source = own + m * WIDTH
                    row = tl.load(source + columns, mask=is_inside, other=0).to(SUM_DTYPE)
                    if IS_WEIGHTED:
                        row *= tl.load(weights + m).to(SUM_DTYPE)
                    total += row
                    is_any += 1
            if is_any > 0:
                here = ME * capacity + token
                rows = area(addresses, rank, rows_offset, own.dtype.element_ty)
                total *= FACTOR
                tl.store(rows + here * WIDTH + columns, total.to(own.dtype.element_ty), mask=is_inside)
        if HAS_GRADS:
            grads = area(addresses, rank, weights_offset, own_grads.dtype.element_ty)
            for k in tl.static_range(TOP_K):
                m = tl.load(place + pair + k).to(tl.int64)
                if m >= 0:
                    if HAS_OTHERS:
                        grad = tl.load(tl.where(m < num_own, own_grads + m, other_grads + m - num_own))
                    else:
                        grad = tl.load(own_grads + m)
                    tl.store(grads + there * TOP_K + k, grad * FACTOR)


@triton.jit(
    do_not_specialize=["tag", "sequence", "tokens", "capacity", "weights_offset", "rows_offset"],
    do_not_specialize_on_alignment=["slots", "grad_weights", "errors"],
)
def receive_sums_kernel(
    out,
    grad_weights,
    slots,
    errors,
    addresses,
    tag,
    sequence,
    tokens,
    capacity,
    weights_offset,
    rows_offset,
    SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_K_BLOCK: tl.constexpr,
    ME: tl.constexpr,
    RANKS: tl.constexpr,
    HAS_GRADS: tl.constexpr,
    SUM_DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    if token == 0:
        check_headers(addresses, errors, tag, sequence, ME, RANKS)
    if token < tokens:
        rows = area(addresses, ME, rows_offset, out.dtype.element_ty)
        for start in range(0, WIDTH, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            is_inside = columns < WIDTH
            total = tl.zeros((BLOCK,), dtype=SUM_DTYPE)
            for d in tl.static_range(RANKS):
                comes = 0
                for choice in tl.static_range(TOP_K):
                    comes += tl.where(tl.load(slots + token * TOP_K + choice) // SLOTS == d, 1, 0)
                if comes > 0:
                    there = d * capacity + token
                    total += tl.load(rows + there * WIDTH + columns, mask=is_inside, other=0).to(SUM_DTYPE)
            tl.store(out + token * WIDTH + columns, total.to(out.dtype.element_ty), mask=is_inside)
        if HAS_GRADS:
            k = tl.arange(0, TOP_K_BLOCK)
            has_expert = tl.load(slots + token * TOP_K + k, mask=k < TOP_K, other=RANKS * SLOTS) < RANKS * SLOTS
            grads = area(addresses, ME, weights_offset, SUM_DTYPE)
            grad = tl.load(grads + (ME * capacity + token) * TOP_K + k, mask=has_expert, other=0)
            tl.store(grad_weights + token * TOP_K + k, grad.to(grad_weights.dtype.element_ty), mask=k < TOP_K)
