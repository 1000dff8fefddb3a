"""Triton kernels for the token-expert pairs of one rank: sort by expert, copies of tokens, sums of rows.

A program reads a token once and writes its ``K`` rows, or reads ``K`` rows and writes one token. Sums are in float32
(float64 for float64 rows), in the order of ``K``, so they are the same on every run. Nothing waits for the device:
there is memory for all pairs, and those of no expert have no row.

Shape suffixes: ``T`` tokens, ``K`` top-k, ``M`` rows, ``D`` model width, ``S`` experts, ``B`` blocks of pairs.
"""

# pyright: reportMissingImports=false, reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportOperatorIssue=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_eplb.parallel.launch import launch, num_blocks, power_of_2

MAX_BLOCK_COLUMNS = 2048
"""Columns of a row that a program holds at a time when it copies or adds rows. Measured on an H200, 131,072 rows of
2,048 bfloat16: copied in 171 µs, summed in 150; within 1 % for 1,024 to 4,096 columns and 2 to 8 warps."""

ONE_HOT_VALUES = 8192
"""Pairs times experts that a program of the sort compares at a time: 64 values for each of 128 threads."""


def place_pairs(index_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort pairs by expert, stable. Ids outside ``0 ... num_experts - 1`` belong to no expert and come nowhere.

    Args:
        index_TK: Expert of each pair, contiguous, in any integer dtype.
        num_experts: ``S``.

    Returns:
        Row of each pair, ``[T, K]`` int32, ``-1`` for none; ends of the experts' rows, ``[S]`` int32; pairs of each
        expert, ``[S]`` int64.
    """
    index_TK = index_TK.to(torch.int32) if index_TK.dtype == torch.uint8 else index_TK  # -1 stands for no pair
    experts = max(2, power_of_2(num_experts))
    block = max(16, ONE_HOT_VALUES // experts)
    pairs = index_TK.numel()
    blocks = max(1, num_blocks(pairs, block))
    place_TK = torch.empty(index_TK.shape, dtype=torch.int32, device=index_TK.device)
    counts_SB = torch.empty(num_experts, blocks, dtype=torch.int32, device=index_TK.device)
    ends_S = torch.empty(num_experts, dtype=torch.int32, device=index_TK.device)
    counts_S = torch.empty(num_experts, dtype=torch.int64, device=index_TK.device)
    numbers, constants = (pairs, blocks), (num_experts, experts, block)
    launch(_count_pairs, (blocks, 1), (index_TK, counts_SB), numbers, constants)
    sums_SB = torch.cumsum(counts_SB.view(-1), 0, dtype=torch.int32)
    launch(_place_pairs, (blocks, 1), (index_TK, sums_SB, place_TK, ends_S, counts_S), numbers, constants)
    return place_TK, ends_S, counts_S


def expand_tokens(
    tokens_TD: Tensor, place_TK: Tensor, weights_TK: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Copy each token to the rows of its pairs.

    Args:
        tokens_TD: Tokens, contiguous.
        place_TK: Row of each pair as of :func:`place_pairs`.
        weights_TK: Weights of the pairs, contiguous, in any floating dtype.

    Returns:
        Rows, ``[T K, D]``, and their weights, ``[T K]`` float32 (float64 for float64 tokens). Rows of no pair are left
        as the allocator gives them.
    """
    (tokens, top_k), width = place_TK.shape, tokens_TD.shape[1]
    rows_MD, rows_M = tokens_TD.new_empty(tokens * top_k, width), None
    if weights_TK is not None:
        rows_M = tokens_TD.new_empty(tokens * top_k, dtype=sum_dtype(tokens_TD))
    if tokens:
        block = min(power_of_2(width), MAX_BLOCK_COLUMNS)
        values = (tokens_TD, tokens_TD) if weights_TK is None else (weights_TK, rows_M)
        constants = width, top_k, weights_TK is not None, block
        launch(_expand, (tokens, 1), (tokens_TD, place_TK, rows_MD, *values), (), constants)
    return rows_MD, rows_M


def sum_rows(
    rows_MD: Tensor, place_TK: Tensor, values_M: Tensor | None = None, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor | None]:
    """Sum the rows of each token. It is the gradient of :func:`expand_tokens`, and the reverse.

    Args:
        rows_MD: Rows, contiguous.
        place_TK: Row of each pair as of :func:`place_pairs`.
        values_M: One number for each row.
        dtype: Dtype of the second result.

    Returns:
        ``[T, D]`` in the rows' dtype, zeros for a token of no expert; and the number of each pair, ``[T, K]``, 0 for
        pairs of no expert.
    """
    (tokens, top_k), width = place_TK.shape, rows_MD.shape[1]
    tokens_TD, values_TK = rows_MD.new_empty(tokens, width), None
    if values_M is not None:
        values_TK = values_M.new_empty(tokens, top_k, dtype=dtype)
    if tokens:
        block = min(power_of_2(width), MAX_BLOCK_COLUMNS)
        values = (rows_MD, rows_MD) if values_M is None else (values_M, values_TK)
        blocks = tl_dtype(rows_MD), power_of_2(top_k), block
        constants = width, top_k, values_M is not None, *blocks
        launch(_sum, (tokens, 1), (rows_MD, place_TK, tokens_TD, *values), (), constants)
    return tokens_TD, values_TK


def values_of_pairs(values_M: Tensor, place_TK: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the number of each pair, ``[T, K]``, 0 for pairs of no expert."""
    taken_TK = values_M.index_select(0, place_TK.view(-1).clamp(min=0)).view(place_TK.shape)
    return torch.where(place_TK >= 0, taken_TK, 0).to(dtype)


def sum_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype that sums over ``tensor`` have."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def tl_dtype(tensor: Tensor) -> tl.dtype:
    """Return Triton's name of :func:`sum_dtype`."""
    return tl.float64 if tensor.dtype == torch.float64 else tl.float32


_PAIRS = {"do_not_specialize": ["pairs", "blocks"], "do_not_specialize_on_alignment": ["index"]}


@triton.jit(**_PAIRS)
def _count_pairs(index, counts, pairs, blocks, EXPERTS: tl.constexpr, EXPERTS_BLOCK: tl.constexpr, BLOCK: tl.constexpr):
    block = tl.program_id(0)
    pair = block * BLOCK + tl.arange(0, BLOCK)
    experts = tl.arange(0, EXPERTS_BLOCK)
    expert = tl.load(index + pair, mask=pair < pairs, other=-1)
    hits = (expert[:, None] == experts[None, :]).to(tl.int32)
    tl.store(counts + experts * blocks + block, tl.sum(hits, axis=0), mask=experts < EXPERTS)


@triton.jit(**_PAIRS)
def _place_pairs(
    index, sums, places, ends, totals, pairs, blocks, EXPERTS: tl.constexpr, EXPERTS_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    pair = block * BLOCK + tl.arange(0, BLOCK)
    experts = tl.arange(0, EXPERTS_BLOCK)
    expert = tl.load(index + pair, mask=pair < pairs, other=-1)
    hits = (expert[:, None] == experts[None, :]).to(tl.int32)
    before = experts * blocks + block - 1
    first = tl.load(sums + before, mask=(before >= 0) & (experts < EXPERTS), other=0)
    row = tl.sum(hits * (tl.cumsum(hits, axis=0) + first[None, :]), axis=1) - 1
    is_expert = (expert >= 0) & (expert < EXPERTS)
    tl.store(places + pair, tl.where(is_expert, row, -1), mask=pair < pairs)
    if block == 0:
        end = tl.load(sums + experts * blocks + blocks - 1, mask=experts < EXPERTS, other=0)
        begin = tl.load(sums + experts * blocks - 1, mask=(experts > 0) & (experts < EXPERTS), other=0)
        tl.store(ends + experts, end, mask=experts < EXPERTS)
        tl.store(totals + experts, (end - begin).to(tl.int64), mask=experts < EXPERTS)


@triton.jit(do_not_specialize_on_alignment=["values", "row_values"])
def _expand(
    tokens, places, rows, values, row_values, WIDTH: tl.constexpr, TOP_K: tl.constexpr, HAS_VALUES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    for start in range(0, WIDTH, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        is_inside = columns < WIDTH
        row = tl.load(tokens + token * WIDTH + columns, mask=is_inside)
        for k in range(TOP_K):
            place = tl.load(places + token * TOP_K + k).to(tl.int64)
            tl.store(rows + place * WIDTH + columns, row, mask=columns < tl.where(place >= 0, WIDTH, 0))
    if HAS_VALUES:
        for k in range(TOP_K):
            place = tl.load(places + token * TOP_K + k).to(tl.int64)
            value = tl.load(values + token * TOP_K + k).to(row_values.dtype.element_ty)
            tl.store(row_values + place, value, mask=place >= 0)


@triton.jit(do_not_specialize_on_alignment=["values", "token_values"])
def _sum(
    rows, places, tokens, values, token_values, WIDTH: tl.constexpr, TOP_K: tl.constexpr, HAS_VALUES: tl.constexpr,
    DTYPE: tl.constexpr, TOP_K_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    for start in range(0, WIDTH, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        is_inside = columns < WIDTH
        total = tl.zeros((BLOCK,), DTYPE)
        for k in tl.static_range(TOP_K):  # unrolled and without branches, so that all loads are in flight at once
            place = tl.load(places + token * TOP_K + k).to(tl.int64)
            row = tl.load(rows + place * WIDTH + columns, mask=columns < tl.where(place >= 0, WIDTH, 0), other=0.0)
            total += row.to(DTYPE)
        tl.store(tokens + token * WIDTH + columns, total.to(tokens.dtype.element_ty), mask=is_inside)
    if HAS_VALUES:
        k = tl.arange(0, TOP_K_BLOCK)
        place = tl.load(places + token * TOP_K + k, mask=k < TOP_K, other=-1)
        value = tl.load(values + place, mask=place >= 0, other=0.0)
        tl.store(token_values + token * TOP_K + k, value.to(token_values.dtype.element_ty), mask=k < TOP_K)
