"""Experts of a known form as one autograd function: grouped products, and one kernel for each activation and gradient.

Routing weights multiply the activation before the second product, ``(w a) @ down``. So the outputs need not be saved
for the gradient of the weights: it is the product of the activation and its gradient without the weight. Saved are the
rows and the first product. The second activation is computed again beside its gradient, in the same kernel.

Shape suffixes: ``T`` tokens, ``K`` top-k, ``M`` rows, ``D`` model width, ``H`` expert hidden width, ``S`` experts,
``A`` and ``B`` two widths.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lightning_eplb.parallel.fused_form import FusedForm

__all__ = ["FusedForm", "compute_tokens", "fused_experts"]

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

    place_TK, ends_S, counts_S = place_pairs(index_TK.contiguous(), len(parameters[0]))
    rows_MD, weights_M = _Expand.apply(hidden_TD.to(parameters[0].dtype), weights_TK, place_TK)
    output_MD = _FusedExperts.apply(form, rows_MD, ends_S, weights_M, *parameters)
    return _Sum.apply(output_MD, place_TK).to(hidden_TD.dtype), counts_S


class _FusedExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, form: FusedForm, rows_MD: Tensor, ends_S: Tensor, weights_M: Tensor | None, *parameters: Tensor
    ) -> Tensor:
        from lightning_eplb.parallel.fused_kernels import Rows, activate, add_bias

        rows_MD, rows = rows_MD.contiguous(), Rows(ends_S, weights_M)
        up_SDH, down_SHD, up_bias, down_bias = form.parts(parameters)
        inner_MH = grouped_product(rows_MD, up_SDH, ends_S)
        activation_MH = activate(inner_MH, up_bias, rows, form.activation)
        output_MD = grouped_product(activation_MH, down_SHD, ends_S)
        if down_bias is not None:  # not in place: selective checkpointing may keep the product
            output_MD = add_bias(output_MD, down_bias, rows)
        ctx.form = form
        ctx.save_for_backward(rows_MD, ends_S, weights_M, inner_MH, *parameters)
        return output_MD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # once_differentiable lets gradients of constants pass, without a derivative
            raise RuntimeError(
                "fused experts have no second derivatives, so backward(create_graph=True) is not supported. Use"
                " parallelize_experts(fused_experts=False) or EPLBCallback(fused_experts=False)."
            )
        from lightning_eplb.parallel.fused_kernels import Rows, activate_backward, dot_bias, sum_by_expert, sum_dtype

        rows_MD, ends_S, weights_M, inner_MH, *parameters = ctx.saved_tensors
        _, needs_rows, _, needs_weights, *needs = ctx.needs_input_grad
        up_SDH, down_SHD, up_bias, down_bias = ctx.form.parts(parameters)
        needs_up, needs_down, needs_up_bias, needs_down_bias = ctx.form.parts_needed(needs)
        grad_MD, rows = grads[0].contiguous(), Rows(ends_S, weights_M)
        grad_weights_M = grad_rows_MD = None
        if needs_weights:
            if down_bias is None:
                grad_weights_M = torch.empty(len(rows_MD), dtype=sum_dtype(rows_MD), device=rows_MD.device)
            else:
                grad_weights_M = dot_bias(grad_MD, down_bias, rows)
        named: dict[str, Tensor | None] = dict.fromkeys(ctx.form.names)
        up_name, down_name = ctx.form.up_name, "down_proj"
        grad_MH = grouped_product(grad_MD, down_SHD.transpose(-2, -1), ends_S)
        grad_inner_MH, activation_MH = activate_backward(
            inner_MH, up_bias, rows, grad_MH, grad_weights_M, ctx.form.activation, down_bias is not None
        )
        del grad_MH
        if needs_down:
            named[down_name] = _weight_gradient(ctx.form, activation_MH, grad_MD, ends_S)
        if needs_down_bias:
            assert down_bias is not None
            named[f"{down_name}_bias"] = sum_by_expert(grad_MD, rows, down_bias.dtype)
        del activation_MH
        if needs_rows:
            grad_rows_MD = grouped_product(grad_inner_MH, up_SDH.transpose(-2, -1), ends_S)
        if needs_up:
            named[up_name] = _weight_gradient(ctx.form, rows_MD, grad_inner_MH, ends_S)
        if needs_up_bias:
            assert up_bias is not None
            named[f"{up_name}_bias"] = sum_by_expert(grad_inner_MH, Rows(ends_S, None), up_bias.dtype)
        return None, grad_rows_MD, None, grad_weights_M, *named.values()


class _Expand(torch.autograd.Function):
    """Copies of tokens, and of their weights, in the order of the experts."""

    @staticmethod
    def forward(ctx: Any, tokens_TD: Tensor, weights_TK: Tensor, place_TK: Tensor) -> tuple[Tensor, Tensor]:
        from lightning_eplb.parallel.pair_kernels import expand_tokens

        ctx.save_for_backward(place_TK)
        ctx.weights_dtype = weights_TK.dtype
        rows_MD, weights_M = expand_tokens(tokens_TD.contiguous(), place_TK, weights_TK.contiguous())
        assert weights_M is not None
        return rows_MD, weights_M

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from lightning_eplb.parallel.pair_kernels import sum_rows

        grad_MD, grad_weights_M = grads
        (place_TK,) = ctx.saved_tensors
        return *sum_rows(grad_MD.contiguous(), place_TK, grad_weights_M.contiguous(), ctx.weights_dtype), None


class _Sum(torch.autograd.Function):
    """Sum of the rows of each token."""

    @staticmethod
    def forward(ctx: Any, rows_MD: Tensor, place_TK: Tensor) -> Tensor:
        from lightning_eplb.parallel.pair_kernels import sum_rows

        ctx.save_for_backward(place_TK)
        return sum_rows(rows_MD, place_TK)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from lightning_eplb.parallel.pair_kernels import expand_tokens

        (place_TK,) = ctx.saved_tensors
        return expand_tokens(grads[0].contiguous(), place_TK)[0], None


def grouped_product(rows_MA: Tensor, weights_SAB: Tensor, ends_S: Tensor) -> Tensor:
    """Multiply each expert's rows by its weights, ``[M, B]``. Rows of no expert are undefined."""
    if _has_grouped_mm(rows_MA, weights_SAB):
        return nn.functional.grouped_mm(rows_MA, weights_SAB, offs=ends_S)
    with torch.autocast(rows_MA.device.type, enabled=False):
        *parts, rest_MA = _split(rows_MA, ends_S)
        products = [rows_A @ weights_SAB[expert] for expert, rows_A in enumerate(parts)]
        return torch.cat((*products, rest_MA.new_zeros(len(rest_MA), weights_SAB.shape[-1])))


def grouped_gradient(left_MA: Tensor, right_MB: Tensor, ends_S: Tensor) -> Tensor:
    """Multiply each expert's rows of two tensors, ``[S, A, B]``, zeros for an expert without rows."""
    if _has_grouped_mm(left_MA, right_MB):
        return nn.functional.grouped_mm(left_MA.t(), right_MB, offs=ends_S)
    with torch.autocast(left_MA.device.type, enabled=False):
        pairs = zip(_split(left_MA, ends_S)[:-1], _split(right_MB, ends_S)[:-1], strict=True)
        return torch.stack([left_A.t() @ right_B for left_A, right_B in pairs])


def _split(rows: Tensor, ends_S: Tensor) -> list[Tensor]:
    """Return each expert's rows, then those of no expert."""
    ends = [0, *ends_S.tolist(), len(rows)]
    return [rows[start:end] for start, end in itertools.pairwise(ends)]


def _weight_gradient(form: FusedForm, inputs_MA: Tensor, grad_MB: Tensor, ends_S: Tensor) -> Tensor:
    """Return the gradient of a weight in the parameter's own layout, ``[S, in, out]`` or ``[S, out, in]``."""
    pair = (inputs_MA, grad_MB) if form.is_transposed else (grad_MB, inputs_MA)
    return grouped_gradient(*pair, ends_S)


def _has_grouped_mm(*operands: Tensor) -> bool:
    """Return ``True`` if ``grouped_mm`` takes these operands. Only in bfloat16 it does not wait for the device."""
    first = operands[0]
    if first.dtype == torch.float64 or not first.is_cuda or not _is_supported(first.device):
        return False
    return all(map(_is_aligned, operands)) and len(first) > 0


def _is_aligned(tensor: Tensor) -> bool:
    """Return ``True`` if the last two dimensions are one matrix in memory, in rows or columns, and rows are aligned."""
    size, (rows, columns) = tensor.element_size(), tensor.stride()[-2:]
    is_matrix = columns == 1 or rows == 1
    is_whole = all(stride * size % ALIGNMENT == 0 for stride in tensor.stride() if stride != 1)
    return is_matrix and is_whole and tensor.data_ptr() % ALIGNMENT == 0


@functools.cache
def _is_supported(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)
