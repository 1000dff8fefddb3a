"""Triton kernels of fused experts: activations with their gradients, and biases.

Rows are sorted by expert, and ``ends_S`` holds the end of each expert's rows. Rows from ``ends_S[-1]`` on belong to no
expert: no kernel reads them, and they are written only where the text says so. Each kernel reads and writes a row once.
Sums are in float32 (float64 for float64 rows), in a fixed order, so they are the same on every run. Numbers of rows and
experts are never specialized: a rank that compiled a kernel anew would keep its peers waiting.

Shape suffixes: ``M`` rows, ``D`` model width, ``H`` expert hidden width, ``S`` experts.
"""

# pyright: reportMissingImports=false, reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_eplb.parallel.fused_form import PLAIN, ActivationArguments
from lightning_eplb.parallel.launch import launch, num_blocks, power_of_2
from lightning_eplb.parallel.pair_kernels import MAX_BLOCK_COLUMNS, sum_dtype, tl_dtype

MAX_BLOCK_ACTIVATIONS = 1024
"""Columns of an activation that a program holds at a time. Measured on an H200, 131,072 rows of 768 bfloat16: 143 µs,
and 290 for the gradient, within 2 % for 1 to 4 rows and 2 to 8 warps; 256 and 512 columns are slower."""

MIN_EXPERTS = 128
"""Experts among which a row's is looked up at least, so that few kernels are compiled for few redundant experts."""

SUM_BLOCK = (32, 128)
"""Rows and columns that a program adds up at a time. Estimated, not measured: 128 bytes of a row are one access."""


class Rows(NamedTuple):
    """Sorted rows of all experts.

    Attributes:
        ends: End of each expert's rows, ``[S]`` int32.
        weights: Routing weight of each row, ``[M]`` float32 or float64. ``None`` for ones.
    """

    ends: Tensor
    weights: Tensor | None


def activate(inner_MH: Tensor, bias_SH: Tensor | None, rows: Rows, constants: ActivationArguments) -> Tensor:
    """Return the activation of each row times its weight, ``[M, H]`` in the dtype of ``inner_MH``.

    Args:
        inner_MH: First product, ``[M, 2 H]`` with a gate, else ``[M, H]``, contiguous.
        bias_SH: Bias of the first product, as wide as it, contiguous.
        rows: Rows.
        constants: Activation.
    """
    width = inner_MH.shape[1] // (1 if constants.layout == PLAIN else 2)
    output_MH = inner_MH.new_empty(inner_MH.shape[0], width)
    if output_MH.numel():
        bias, weights = _or_other(bias_SH, inner_MH), _or_other(rows.weights, inner_MH)
        grid, numbers, experts, block = _sizes(inner_MH, rows, width, MAX_BLOCK_ACTIVATIONS)
        flags = bias_SH is not None, rows.weights is not None
        tensors = inner_MH, bias, weights, rows.ends, output_MH
        launch(_activate, grid, tensors, numbers, (width, experts if flags[0] else 1, *constants, *flags, *block))
    return output_MH


def activate_backward(
    inner_MH: Tensor,
    bias_SH: Tensor | None,
    rows: Rows,
    grad_MH: Tensor,
    grad_weights_M: Tensor | None,
    constants: ActivationArguments,
    adds: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the gradient of ``inner_MH`` and the output of :func:`activate`, computed again.

    Args:
        inner_MH: As for :func:`activate`.
        bias_SH: As for :func:`activate`.
        rows: Rows.
        grad_MH: Gradient of the output of :func:`activate`, ``[M, H]``, contiguous.
        grad_weights_M: Gradient of the rows' weights, float32 or float64, written in place. Rows of no expert get 0.
            ``None`` if it is not needed.
        constants: Activation.
        adds: Add to ``grad_weights_M``, rather than overwrite it.
    """
    grad_inner_MH, output_MH = torch.empty_like(inner_MH), torch.empty_like(grad_MH)
    if output_MH.numel():
        width = output_MH.shape[1]
        bias, weights = _or_other(bias_SH, inner_MH), _or_other(rows.weights, inner_MH)
        grid, numbers, experts, block = _sizes(inner_MH, rows, width, MAX_BLOCK_ACTIVATIONS)
        flags = bias_SH is not None, rows.weights is not None, grad_weights_M is not None, adds
        outputs = grad_inner_MH, output_MH, _or_other(grad_weights_M, inner_MH)
        tensors = inner_MH, bias, weights, rows.ends, grad_MH, *outputs
        launch(
            _activate_backward, grid, tensors, numbers, (width, experts if flags[0] else 1, *constants, *flags, *block)
        )
    return grad_inner_MH, output_MH


def add_bias(rows_MD: Tensor, bias_SD: Tensor, rows: Rows) -> Tensor:
    """Return each row plus its expert's bias times its weight, ``[M, D]``."""
    output_MD = torch.empty_like(rows_MD)
    if output_MD.numel():
        width = rows_MD.shape[1]
        grid, numbers, experts, block = _sizes(rows_MD, rows, width, MAX_BLOCK_COLUMNS)
        tensors = rows_MD, bias_SD, _or_other(rows.weights, rows_MD), rows.ends, output_MD
        launch(_add_bias, grid, tensors, numbers, (width, experts, rows.weights is not None, *block))
    return output_MD


def dot_bias(grad_MD: Tensor, bias_SD: Tensor, rows: Rows) -> Tensor:
    """Return the product of each row and its expert's bias, ``[M]`` float32 (float64 for float64), 0 for no expert."""
    output_M = grad_MD.new_empty(grad_MD.shape[0], dtype=sum_dtype(grad_MD))
    if output_M.numel():
        width = grad_MD.shape[1]
        grid, numbers, experts, block = _sizes(grad_MD, rows, width, MAX_BLOCK_COLUMNS)
        launch(_dot_bias, grid, (grad_MD, bias_SD, rows.ends, output_M), numbers, (width, experts, *block))
    return output_M


def sum_by_expert(rows_MD: Tensor, rows: Rows, dtype: torch.dtype) -> Tensor:
    """Return the sum of each expert's rows, each times its weight, ``[S, D]`` in ``dtype``."""
    width, num_experts = rows_MD.shape[1], rows.ends.shape[0]
    output_SD = rows_MD.new_empty(num_experts, width, dtype=dtype)
    if output_SD.numel():
        columns = min(power_of_2(width), SUM_BLOCK[1])
        tensors = rows_MD, _or_other(rows.weights, rows_MD), rows.ends, output_SD
        constants = width, rows.weights is not None, tl_dtype(rows_MD), SUM_BLOCK[0], columns
        launch(_sum_by_expert, (num_experts, num_blocks(width, columns)), tensors, (), constants)
    return output_SD


def _or_other(tensor: Tensor | None, other: Tensor) -> Tensor:
    """Return a tensor for a parameter that the kernel does not use if ``tensor`` is ``None``."""
    return other if tensor is None else tensor


def _sizes(
    rows_MD: Tensor, rows: Rows, width: int, max_columns: int
) -> tuple[tuple[int, int], tuple[int, int], int, tuple]:
    """Return the grid, the numbers of rows and experts, experts that a block finds at a time, and a block's sizes."""
    num_rows, num_experts = rows_MD.shape[0], rows.ends.shape[0]
    columns = min(power_of_2(width), max_columns)
    row_block = max(1, min(16, max_columns // columns))
    experts = max(MIN_EXPERTS, power_of_2(num_experts))
    return (
        (num_blocks(num_rows, row_block), 1),
        (num_rows, num_experts),
        experts,
        (tl_dtype(rows_MD), row_block, columns),
    )


_ROWS = {
    "do_not_specialize": ["num_rows", "num_experts"],
    "do_not_specialize_on_alignment": ["weights", "ends", "grad_weights"],
}


@triton.jit
def _value_and_slope(x, KIND: tl.constexpr, ALPHA: tl.constexpr):
    """Return an activation and its derivative."""
    if KIND == 0:
        gate = tl.sigmoid(x * ALPHA)
        value = x * gate
        slope = gate + ALPHA * value * (1 - gate)
    elif KIND == 1:
        cumulative = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
        value = x * cumulative
        slope = cumulative + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    elif KIND == 2:
        inner = 1.5957691216057308 * (x + 0.044715 * x * x * x)  # 2 sqrt(2 / pi): tanh(z) is 2 sigmoid(2 z) - 1
        gate = tl.sigmoid(inner)
        value = x * gate
        slope = gate + value * (1 - gate) * 1.5957691216057308 * (1 + 0.134145 * x * x)
    elif KIND == 3:
        value = tl.where(x <= 0, 0.0, x)  # NaN stays NaN
        slope = tl.where(x <= 0, 0.0, 1.0).to(x.dtype)
    else:
        positive = tl.where(x <= 0, 0.0, x)
        value = positive * positive
        slope = 2 * positive
    return value, slope


@triton.jit
def _clamp(gate, up, LIMIT: tl.constexpr):
    """Limit the gate from above, and ``up`` on both sides. NaN stays NaN."""
    return tl.where(gate > LIMIT, LIMIT, gate), tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))


@triton.jit
def _experts_of(rows, ends, num_experts, EXPERTS_BLOCK: tl.constexpr):
    """Return the expert of each row, ``num_experts`` for none."""
    all_experts = tl.arange(0, EXPERTS_BLOCK)
    end = tl.load(ends + all_experts, mask=all_experts < num_experts, other=2147483647)
    return tl.sum((end[None, :] <= rows[:, None]).to(tl.int32), axis=1).to(tl.int64)


@triton.jit
def _gate_and_up(
    inner, bias, rows, experts, columns, is_inside, WIDTH: tl.constexpr, LAYOUT: tl.constexpr, HAS_BIAS: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Return both halves of the first product with its bias. ``up`` is the gate where there is no gate."""
    if LAYOUT == 0:
        first, second, total = columns, columns, WIDTH
    elif LAYOUT == 1:
        first, second, total = columns, columns + WIDTH, 2 * WIDTH
    else:
        first, second, total = 2 * columns, 2 * columns + 1, 2 * WIDTH
    gate = tl.load(inner + rows[:, None] * total + first[None, :], mask=is_inside, other=0.0).to(DTYPE)
    if HAS_BIAS:
        gate += tl.load(bias + experts[:, None] * total + first[None, :], mask=is_inside, other=0.0).to(DTYPE)
    up = gate
    if LAYOUT != 0:
        up = tl.load(inner + rows[:, None] * total + second[None, :], mask=is_inside, other=0.0).to(DTYPE)
        if HAS_BIAS:
            up += tl.load(bias + experts[:, None] * total + second[None, :], mask=is_inside, other=0.0).to(DTYPE)
    return gate, up, first, second


@triton.jit(**_ROWS)
def _activate(
    inner, bias, weights, ends, output, num_rows, num_experts, WIDTH: tl.constexpr,
    EXPERTS_BLOCK: tl.constexpr, KIND: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, OFFSET: tl.constexpr,
    LAYOUT: tl.constexpr, HAS_BIAS: tl.constexpr, IS_WEIGHTED: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    is_row = rows < tl.load(ends + num_experts - 1)
    experts = rows
    if HAS_BIAS:
        experts = _experts_of(rows, ends, num_experts, EXPERTS_BLOCK)
    for start in range(0, WIDTH, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        is_inside = is_row[:, None] & (columns < WIDTH)[None, :]
        gate, up, _, _ = _gate_and_up(inner, bias, rows, experts, columns, is_inside, WIDTH, LAYOUT, HAS_BIAS, DTYPE)
        if LIMIT > 0:
            gate, up = _clamp(gate, up, LIMIT)
        value, _ = _value_and_slope(gate, KIND, ALPHA)
        if LAYOUT != 0:
            value *= up + OFFSET
        if IS_WEIGHTED:
            value *= tl.load(weights + rows, mask=is_row, other=0.0).to(DTYPE)[:, None]
        tl.store(output + rows[:, None] * WIDTH + columns[None, :], value.to(output.dtype.element_ty), mask=is_inside)


@triton.jit(**_ROWS)
def _activate_backward(
    inner, bias, weights, ends, grad, grad_inner, output, grad_weights, num_rows, num_experts, WIDTH: tl.constexpr,
    EXPERTS_BLOCK: tl.constexpr, KIND: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr,
    OFFSET: tl.constexpr, LAYOUT: tl.constexpr, HAS_BIAS: tl.constexpr, IS_WEIGHTED: tl.constexpr,
    NEEDS_WEIGHTS: tl.constexpr, ADDS: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    is_row = rows < tl.load(ends + num_experts - 1)
    experts = rows
    if HAS_BIAS:
        experts = _experts_of(rows, ends, num_experts, EXPERTS_BLOCK)
    weight = tl.full((ROWS,), 1.0, DTYPE)
    if IS_WEIGHTED:
        weight = tl.load(weights + rows, mask=is_row, other=0.0).to(DTYPE)
    products = tl.zeros((ROWS,), DTYPE)
    for start in range(0, WIDTH, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        is_inside = is_row[:, None] & (columns < WIDTH)[None, :]
        at = rows[:, None] * WIDTH + columns[None, :]
        gate, up, first, second = _gate_and_up(
            inner, bias, rows, experts, columns, is_inside, WIDTH, LAYOUT, HAS_BIAS, DTYPE
        )
        incoming = tl.load(grad + at, mask=is_inside, other=0.0).to(DTYPE)
        outgoing = incoming * weight[:, None]
        is_gate_free, is_up_free = gate <= LIMIT, (up <= LIMIT) & (up >= -LIMIT)
        if LIMIT > 0:
            gate, up = _clamp(gate, up, LIMIT)
        value, slope = _value_and_slope(gate, KIND, ALPHA)
        total = WIDTH
        activation = value
        if LAYOUT != 0:
            total = 2 * WIDTH
            up += OFFSET
            activation = value * up
            slope *= up
            of_up = outgoing * value
            if LIMIT > 0:
                of_up = tl.where(is_up_free, of_up, 0.0)
            to = grad_inner + rows[:, None] * total + second[None, :]
            tl.store(to, of_up.to(grad_inner.dtype.element_ty), mask=is_inside)
        of_gate = outgoing * slope
        if LIMIT > 0:
            of_gate = tl.where(is_gate_free, of_gate, 0.0)
        to = grad_inner + rows[:, None] * total + first[None, :]
        tl.store(to, of_gate.to(grad_inner.dtype.element_ty), mask=is_inside)
        tl.store(output + at, (activation * weight[:, None]).to(output.dtype.element_ty), mask=is_inside)
        if NEEDS_WEIGHTS:
            products += tl.sum(incoming * activation, axis=1)
    if NEEDS_WEIGHTS:
        if ADDS:
            products += tl.load(grad_weights + rows, mask=is_row, other=0.0).to(DTYPE)
        tl.store(grad_weights + rows, tl.where(is_row, products, 0.0), mask=rows < num_rows)


@triton.jit(**_ROWS)
def _add_bias(
    inputs, bias, weights, ends, output, num_rows, num_experts, WIDTH: tl.constexpr,
    EXPERTS_BLOCK: tl.constexpr, IS_WEIGHTED: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    is_row = rows < tl.load(ends + num_experts - 1)
    experts = _experts_of(rows, ends, num_experts, EXPERTS_BLOCK)
    weight = tl.full((ROWS,), 1.0, DTYPE)
    if IS_WEIGHTED:
        weight = tl.load(weights + rows, mask=is_row, other=0.0).to(DTYPE)
    for start in range(0, WIDTH, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        is_inside = is_row[:, None] & (columns < WIDTH)[None, :]
        at = rows[:, None] * WIDTH + columns[None, :]
        row = tl.load(inputs + at, mask=is_inside, other=0.0).to(DTYPE)
        added = tl.load(bias + experts[:, None] * WIDTH + columns[None, :], mask=is_inside, other=0.0).to(DTYPE)
        tl.store(output + at, (row + added * weight[:, None]).to(output.dtype.element_ty), mask=is_inside)


@triton.jit(**_ROWS)
def _dot_bias(
    grad, bias, ends, grad_weights, num_rows, num_experts, WIDTH: tl.constexpr,
    EXPERTS_BLOCK: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    is_row = rows < tl.load(ends + num_experts - 1)
    experts = _experts_of(rows, ends, num_experts, EXPERTS_BLOCK)
    products = tl.zeros((ROWS,), DTYPE)
    for start in range(0, WIDTH, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        is_inside = is_row[:, None] & (columns < WIDTH)[None, :]
        row = tl.load(grad + rows[:, None] * WIDTH + columns[None, :], mask=is_inside, other=0.0).to(DTYPE)
        other = tl.load(bias + experts[:, None] * WIDTH + columns[None, :], mask=is_inside, other=0.0).to(DTYPE)
        products += tl.sum(row * other, axis=1)
    tl.store(grad_weights + rows, products, mask=rows < num_rows)


@triton.jit(do_not_specialize_on_alignment=["weights", "ends"])
def _sum_by_expert(
    inputs, weights, ends, output, WIDTH: tl.constexpr, IS_WEIGHTED: tl.constexpr, DTYPE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    start = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends + expert)
    total = tl.zeros((ROWS, COLUMNS), DTYPE)
    while start < end:  # Triton 3.6 can't interpret a range of loaded numbers
        rows = (start + tl.arange(0, ROWS)).to(tl.int64)
        is_inside = (rows < end)[:, None] & (columns < WIDTH)[None, :]
        row = tl.load(inputs + rows[:, None] * WIDTH + columns[None, :], mask=is_inside, other=0.0).to(DTYPE)
        if IS_WEIGHTED:
            row *= tl.load(weights + rows, mask=rows < end, other=0.0).to(DTYPE)[:, None]
        total += row
        start += ROWS
    summed = tl.sum(total, axis=0)
    tl.store(output + expert * WIDTH + columns, summed.to(output.dtype.element_ty), mask=columns < WIDTH)
