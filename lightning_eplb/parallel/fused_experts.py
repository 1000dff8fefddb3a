"""Experts of a known form as one autograd function: grouped products, and one kernel for each activation and gradient.

Routing weights multiply the activation before the second product, ``(w a) @ down``. So the outputs need not be saved
for the gradient of the weights: it is the product of the activation and its gradient without the weight. Saved are the
rows and the first product. The second activation is computed again beside its gradient, in the same kernel.

Shape suffixes: ``T`` tokens, ``K`` top-k, ``M`` rows, ``D`` model width, ``H`` expert hidden width, ``S`` experts,
``A`` and ``B`` two widths.
"""

import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_eplb.parallel.fused_form import FusedForm

__all__ = ["FusedForm", "compute_tokens", "fused_experts", "warm_up"]

ALIGNMENT = 16
"""Bytes to which ``grouped_mm`` needs the rows of its operands aligned."""


def fused_experts(
    form: FusedForm, parameters: Sequence[Tensor], rows_MD: Tensor, ends_S: Tensor, weights_M: Tensor | None = None
) -> Tensor:
    """Compute rows that are sorted by expert, ``[M, D]`` in their dtype. Does not synchronize with the device.

    Products are in the dtype of the parameters, as in transformers' ``grouped_mm``, also under autocast. In dtypes that
    ``grouped_mm`` does not take, and on the CPU, they are a loop over experts, which synchronizes.

    Args:
        form: Form of the experts.
        parameters: Weights of the experts, ``[S, ...]`` each, in the order of ``form.names``.
        rows_MD: Hidden states.
        ends_S: End of each expert's rows, int32, on the device. Rows after the last end belong to no expert: they get
            no output and no gradient, but what is in memory, and nothing may use it. Their weights' gradient is 0.
        weights_M: Routing weight of each row, float32 (or float64), with a gradient. ``None`` for ones.

    Raises:
        RuntimeError: In ``backward(create_graph=True)``, as second derivatives are not supported.
    """
    dtype = parameters[0].dtype
    output_MD = _FusedExperts.apply(form, rows_MD.to(dtype), ends_S, weights_M, *parameters)
    return output_MD.to(rows_MD.dtype)


def compute_tokens(
    form: FusedForm, parameters: Sequence[Tensor], hidden_TD: Tensor, index_TK: Tensor, weights_TK: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute a whole module whose experts are all on this rank, without a device synchronization.

    Args:
        form: Form of the experts.
        parameters: As for :func:`fused_experts`.
        hidden_TD: Hidden states.
        index_TK: Expert of each pair. Ids outside ``0 ... S-1`` add nothing, and their weights' gradient is 0.
        weights_TK: Routing weights in any floating dtype.

    Returns:
        ``[T, D]`` in the dtype of ``hidden_TD``, and the pairs of each expert, ``[S]`` int64.
    """
    from lightning_eplb.parallel.pair_kernels import place_pairs

    dtype = parameters[0].dtype
    place_TK, ends_S, counts_S = place_pairs(index_TK.contiguous(), parameters[0].shape[0])
    output_TD = _FusedTokens.apply(form, hidden_TD.to(dtype), place_TK, ends_S, weights_TK, *parameters)
    return output_TD.to(hidden_TD.dtype), counts_S


@torch.no_grad()
def warm_up(form: FusedForm, parameters: Sequence[Tensor], dtypes: Iterable[torch.dtype | None]) -> None:
    """Compile the kernels of :func:`fused_experts`, so that no rank does while others wait for it.

    Args:
        form: Form of the experts.
        parameters: As for :func:`fused_experts`.
        dtypes: Dtypes of the rows' weights to expect. ``None`` for rows without weights.
    """
    from lightning_eplb.parallel import fused_kernels as kernels

    up_SDH, _, up_bias, down_bias = form.parts(parameters)
    row_D = up_SDH.new_zeros(1, up_SDH.shape[1])
    inner_H = up_SDH.new_zeros(1, up_SDH.shape[2])
    ends_S = torch.ones(len(up_SDH), dtype=torch.int32, device=up_SDH.device)
    for dtype in dtypes:
        rows = kernels.Rows(ends_S, None if dtype is None else row_D.new_ones(1, dtype=dtype))
        activation_H = kernels.activate(inner_H, up_bias, rows, form.activation)
        for grad_weights in (None,) if dtype is None else (None, row_D.new_zeros(1, dtype=dtype)):
            adds = down_bias is not None
            kernels.activate_backward(inner_H, up_bias, rows, activation_H, grad_weights, form.activation, adds)
        if down_bias is not None:
            kernels.add_bias(row_D, down_bias, rows)
            kernels.dot_bias(row_D, down_bias, rows)
            kernels.sum_by_expert(row_D, rows, row_D.dtype)
            kernels.sum_by_expert(inner_H, kernels.Rows(ends_S, None), row_D.dtype)


class _FusedExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, form: FusedForm, rows_MD: Tensor, ends_S: Tensor, weights_M: Tensor | None, *parameters: Tensor
    ) -> Tensor:
        rows_MD = rows_MD.contiguous()
        weights_M = None if weights_M is None else weights_M.contiguous()
        output_MD, inner_MH = _compute(form, parameters, rows_MD, ends_S, weights_M)
        ctx.form = form
        ctx.save_for_backward(rows_MD, ends_S, weights_M, inner_MH, *parameters)
        return output_MD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        _check_first_order()
        rows_MD, ends_S, weights_M, inner_MH, *parameters = ctx.saved_tensors
        _, needs_rows, _, needs_weights, *needs = ctx.needs_input_grad
        saved = _Saved(ctx.form, parameters, rows_MD, ends_S, weights_M, [inner_MH])
        del inner_MH
        ctx.maybe_clear_saved_tensors()  # unless the graph is retained
        grad_rows_MD, grad_weights_M, named = _gradients(
            saved, [grads[0].contiguous()], _Needs(needs_rows, needs_weights, needs)
        )
        return None, grad_rows_MD, None, grad_weights_M, *named


class _FusedTokens(torch.autograd.Function):
    """Copies of tokens in the order of the experts, the experts, and the sum of each token's rows."""

    @staticmethod
    def forward(
        ctx: Any,
        form: FusedForm,
        tokens_TD: Tensor,
        place_TK: Tensor,
        ends_S: Tensor,
        weights_TK: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        from lightning_eplb.parallel.pair_kernels import expand_tokens, sum_rows

        rows_MD, weights_M = expand_tokens(tokens_TD.contiguous(), place_TK, weights_TK.contiguous())
        output_MD, inner_MH = _compute(form, parameters, rows_MD, ends_S, weights_M)
        ctx.form, ctx.weights_dtype = form, weights_TK.dtype
        ctx.save_for_backward(place_TK, rows_MD, ends_S, weights_M, inner_MH, *parameters)
        return sum_rows(output_MD, place_TK)[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        _check_first_order()
        from lightning_eplb.parallel.pair_kernels import expand_tokens, sum_rows, values_of_pairs

        place_TK, rows_MD, ends_S, weights_M, inner_MH, *parameters = ctx.saved_tensors
        _, needs_tokens, _, _, needs_weights, *needs = ctx.needs_input_grad
        saved = _Saved(ctx.form, parameters, rows_MD, ends_S, weights_M, [inner_MH])
        del inner_MH
        ctx.maybe_clear_saved_tensors()  # unless the graph is retained
        grad_MD = [expand_tokens(grads[0].contiguous(), place_TK)[0]]
        grad_rows_MD, grad_weights_M, named = _gradients(saved, grad_MD, _Needs(needs_tokens, needs_weights, needs))
        grad_tokens_TD = grad_weights_TK = None
        if grad_rows_MD is not None:
            grad_tokens_TD, grad_weights_TK = sum_rows(grad_rows_MD, place_TK, grad_weights_M, ctx.weights_dtype)
        elif grad_weights_M is not None:
            grad_weights_TK = values_of_pairs(grad_weights_M, place_TK, ctx.weights_dtype)
        return None, grad_tokens_TD, None, None, grad_weights_TK, *named


class _Saved(NamedTuple):
    """Tensors that the gradients are computed from. The last is emptied, so that its memory is free once it is used."""

    form: FusedForm
    parameters: Sequence[Tensor]
    rows_MD: Tensor
    ends_S: Tensor
    weights_M: Tensor | None
    inner_MH: list[Tensor]


class _Needs(NamedTuple):
    """Gradients that are needed. Those of parameters are in the order of ``form.names``."""

    rows: bool
    weights: bool
    parameters: Sequence[bool]


def _check_first_order() -> None:
    """Raise if the gradient is to be differentiated. ``once_differentiable`` lets gradients of constants pass."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "fused experts have no second derivatives, so backward(create_graph=True) is not supported. Use"
            " parallelize_experts(fused_experts=False) or EPLBCallback(fused_experts=False)."
        )


def _compute(
    form: FusedForm, parameters: Sequence[Tensor], rows_MD: Tensor, ends_S: Tensor, weights_M: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the output of each row, times its weight, and the first product."""
    from lightning_eplb.parallel.fused_kernels import Rows, activate, add_bias

    rows = Rows(ends_S, weights_M)
    up_SDH, down_SHD, up_bias, down_bias = form.parts(parameters)
    is_grouped = takes_grouped_mm(rows_MD, up_SDH, down_SHD)
    inner_MH = grouped_product(rows_MD, up_SDH, ends_S, is_grouped)
    activation_MH = activate(inner_MH, up_bias, rows, form.activation)
    output_MD = grouped_product(activation_MH, down_SHD, ends_S, is_grouped)
    if down_bias is not None:  # not in place: selective checkpointing may keep the product
        output_MD = add_bias(output_MD, down_bias, rows)
    return output_MD, inner_MH


def _gradients(
    saved: _Saved, grad_MD: list[Tensor], needs: _Needs
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
    """Return the gradients of rows, of their weights, and of the parameters in the order of ``form.names``.

    Args:
        saved: Saved tensors.
        grad_MD: Gradient of the output, in a list that is emptied, so that its memory is free once it is used.
        needs: Gradients that are needed.
    """
    from lightning_eplb.parallel.fused_kernels import Rows, activate_backward, dot_bias, sum_by_expert, sum_dtype

    form, parameters, rows_MD, ends_S, weights_M, inner = saved
    rows, incoming_MD = Rows(ends_S, weights_M), grad_MD.pop()
    up_SDH, down_SHD, up_bias, down_bias = form.parts(parameters)
    needs_up, needs_down, needs_up_bias, needs_down_bias = form.parts_needed(needs.parameters)
    named: dict[str, Tensor | None] = dict.fromkeys(form.names)
    grad_rows_MD = grad_weights_M = None
    if needs.weights and down_bias is None:
        grad_weights_M = torch.empty(rows_MD.shape[0], dtype=sum_dtype(rows_MD), device=rows_MD.device)
    elif needs.weights and down_bias is not None:
        grad_weights_M = dot_bias(incoming_MD, down_bias, rows)
    if needs_down_bias:
        named["down_proj_bias"] = sum_by_expert(incoming_MD, rows, incoming_MD.dtype)
    is_grouped = takes_grouped_mm(incoming_MD, up_SDH, down_SHD)
    grad_MH = grouped_product(incoming_MD, down_SHD.transpose(-2, -1), ends_S, is_grouped)
    grad_inner_MH, activation_MH = activate_backward(
        inner.pop(), up_bias, rows, grad_MH, grad_weights_M, form.activation, down_bias is not None
    )
    del grad_MH
    if needs_down:
        named["down_proj"] = _weight_gradient(form, activation_MH, incoming_MD, ends_S, is_grouped)
    del activation_MH, incoming_MD
    if needs.rows:
        grad_rows_MD = grouped_product(grad_inner_MH, up_SDH.transpose(-2, -1), ends_S, is_grouped)
    if needs_up:
        named[form.up_name] = _weight_gradient(form, rows_MD, grad_inner_MH, ends_S, is_grouped)
    if needs_up_bias:
        named[f"{form.up_name}_bias"] = sum_by_expert(grad_inner_MH, Rows(ends_S, None), rows_MD.dtype)
    return grad_rows_MD, grad_weights_M, list(named.values())


def grouped_product(rows_MA: Tensor, weights_SAB: Tensor, ends_S: Tensor, is_grouped: bool) -> Tensor:
    """Multiply each expert's rows by its weights, ``[M, B]``. Rows of no expert are undefined.

    Args:
        rows_MA: Rows.
        weights_SAB: Weights.
        ends_S: End of each expert's rows.
        is_grouped: :func:`takes_grouped_mm`. Else a loop over experts waits for the device.
    """
    if is_grouped:
        return nn.functional.grouped_mm(rows_MA, weights_SAB, offs=ends_S)
    with torch.autocast(rows_MA.device.type, enabled=False):
        *parts, rest_MA = _split(rows_MA, ends_S)
        products = [rows_A @ weights_SAB[expert] for expert, rows_A in enumerate(parts)]
        return torch.cat((*products, rest_MA.new_zeros(len(rest_MA), weights_SAB.shape[-1])))


def grouped_gradient(left_MA: Tensor, right_MB: Tensor, ends_S: Tensor, is_grouped: bool) -> Tensor:
    """Multiply each expert's rows of two tensors, ``[S, A, B]``, zeros for an expert without rows."""
    if is_grouped:
        return nn.functional.grouped_mm(left_MA.t(), right_MB, offs=ends_S)
    with torch.autocast(left_MA.device.type, enabled=False):
        pairs = zip(_split(left_MA, ends_S)[:-1], _split(right_MB, ends_S)[:-1], strict=True)
        return torch.stack([left_A.t() @ right_B for left_A, right_B in pairs])


def takes_grouped_mm(rows_MD: Tensor, up_SDH: Tensor, down_SHD: Tensor) -> bool:
    """Return ``True`` if ``grouped_mm`` takes all products of these tensors. Only in bfloat16 it does not wait.

    Args:
        rows_MD: Contiguous rows, or their gradient.
        up_SDH: Weights of the first product, in any layout.
        down_SHD: Weights of the second product, in any layout.
    """
    if (
        rows_MD.dtype == torch.float64
        or not rows_MD.is_cuda
        or not rows_MD.shape[0]
        or not _is_supported(rows_MD.device)
    ):
        return False
    size = rows_MD.element_size()
    widths_are_aligned = not any(width * size % ALIGNMENT for width in down_SHD.shape[1:])
    return widths_are_aligned and all(map(_is_aligned, (rows_MD, up_SDH, down_SHD)))


def _is_aligned(tensor: Tensor) -> bool:
    """Return ``True`` if the last two dimensions are one matrix in memory, in rows or columns, and rows are aligned."""
    size, (rows, columns) = tensor.element_size(), tensor.stride()[-2:]
    is_matrix = columns == 1 or rows == 1
    is_whole = all(stride * size % ALIGNMENT == 0 for stride in tensor.stride() if stride != 1)
    return is_matrix and is_whole and tensor.data_ptr() % ALIGNMENT == 0


@functools.cache
def _is_supported(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _split(rows: Tensor, ends_S: Tensor) -> list[Tensor]:
    """Return each expert's rows, then those of no expert."""
    ends = [0, *ends_S.tolist(), len(rows)]
    return [rows[start:end] for start, end in itertools.pairwise(ends)]


def _weight_gradient(form: FusedForm, inputs_MA: Tensor, grad_MB: Tensor, ends_S: Tensor, is_grouped: bool) -> Tensor:
    """Return the gradient of a weight in the parameter's own layout, ``[S, in, out]`` or ``[S, out, in]``."""
    pair = (inputs_MA, grad_MB) if form.is_transposed else (grad_MB, inputs_MA)
    return grouped_gradient(*pair, ends_S, is_grouped)
