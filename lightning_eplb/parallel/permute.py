"""Permutation of token rows, forward and backward. Each pass reads and writes every row once.

PyTorch's own gradient of ``rows[index]`` sorts the index and sums rows. Here an index holds each row once, so the
gradient is a gather. The sums over a token's experts are Triton kernels (:mod:`~lightning_eplb.parallel.kernels`) on a
GPU, and tensor operations elsewhere.

Shape suffixes: ``T`` tokens, ``K`` top-k, ``N`` token-expert pairs, ``D`` model width.
"""

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor


def copy_to_pairs(hidden_TD: Tensor, pairs_N: Tensor, top_k: int) -> Tensor:
    """Copy the token of each pair, ``[N, D]``. The gradient of a token is the sum over its pairs.

    Args:
        hidden_TD: Hidden states of the tokens.
        pairs_N: Indices into ``[T, K]`` flattened, int64, each at most once.
        top_k: ``K``.
    """
    return _CopyToPairs.apply(hidden_TD, pairs_N, top_k)


def combine_pairs(rows_ND: Tensor, weights_TK: Tensor, pairs_N: Tensor) -> Tensor:
    """Sum the pairs of each token, weighted, in the common dtype of rows and weights, on a GPU in float32 at least.

    Args:
        rows_ND: One row for each of ``pairs_N``.
        weights_TK: Weights of all pairs. Pairs without a row are left out.
        pairs_N: Indices into ``[T, K]`` flattened, int64, each at most once.

    Returns:
        ``[T, D]`` in the rows' dtype.
    """
    if has_kernels(rows_ND):
        return _CombinePairs.apply(rows_ND, weights_TK, _row_of_pair(pairs_N, weights_TK.numel()))
    width = rows_ND.shape[-1]
    all_ND = _ScatterIntoZeros.apply(rows_ND, pairs_N, weights_TK.numel())
    weighted_TKD = all_ND.view(*weights_TK.shape, width) * weights_TK.unsqueeze(-1)
    return weighted_TKD.sum(dim=1).to(rows_ND.dtype)


def has_kernels(tensor: Tensor) -> bool:
    """Return ``True`` if the Triton kernels can run on the device of ``tensor``."""
    return tensor.is_cuda and _has_triton()


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _row_of_pair(pairs_N: Tensor, num_pairs: int) -> Tensor:
    """Return the index of each pair in ``pairs_N``, ``-1`` where it is missing, ``[T K]`` int64."""
    places = torch.arange(len(pairs_N), device=pairs_N.device)
    return pairs_N.new_full((num_pairs,), -1).scatter_(0, pairs_N, places)


def _scatter_into_zeros(rows_ND: Tensor, places_N: Tensor, num_rows: int) -> Tensor:
    return rows_ND.new_zeros(num_rows, *rows_ND.shape[1:]).index_copy_(0, places_N, rows_ND)


class _CopyToPairs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, pairs_N: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(pairs_N)
        ctx.tokens, ctx.top_k = len(hidden_TD), top_k
        return hidden_TD.index_select(0, torch.div(pairs_N, top_k, rounding_mode="floor"))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_ND,), (pairs_N,) = grads, ctx.saved_tensors
        if has_kernels(grad_ND):
            from lightning_eplb.parallel.kernels import sum_pairs

            place_TK = _row_of_pair(pairs_N, ctx.tokens * ctx.top_k).view(ctx.tokens, ctx.top_k)
            return sum_pairs(grad_ND.contiguous(), place_TK, None), None, None
        all_ND = _scatter_into_zeros(grad_ND, pairs_N, ctx.tokens * ctx.top_k)
        return all_ND.view(ctx.tokens, ctx.top_k, *grad_ND.shape[1:]).sum(dim=1), None, None


class _ScatterIntoZeros(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor, places_N: Tensor, num_rows: int) -> Tensor:
        ctx.save_for_backward(places_N)
        return _scatter_into_zeros(rows_ND, places_N, num_rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (places_N,) = grads, ctx.saved_tensors
        return grad.index_select(0, places_N), None, None


class _CombinePairs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor, weights_TK: Tensor, place_N: Tensor) -> Tensor:
        from lightning_eplb.parallel.kernels import sum_pairs

        rows_ND, weights_TK = rows_ND.contiguous(), weights_TK.contiguous()
        place_TK = place_N.view(weights_TK.shape)
        ctx.save_for_backward(rows_ND, weights_TK, place_TK)
        return sum_pairs(rows_ND, place_TK, weights_TK)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from lightning_eplb.parallel.kernels import sum_pairs_backward

        return *sum_pairs_backward(grads[0].contiguous(), *ctx.saved_tensors), None


def split_rows(rows: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Split rows into those at the indices ``first`` and ``second``, which together name each row once."""
    return _SplitRows.apply(rows, first, second)


def merge_rows(first_rows: Tensor, second_rows: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Undo :func:`split_rows`."""
    return _MergeRows.apply(first_rows, second_rows, first, second)


class _SplitRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(first, second)
        return rows.index_select(0, first), rows.index_select(0, second)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _interleave(*grads, *ctx.saved_tensors), None, None


class _MergeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, first_rows: Tensor, second_rows: Tensor, first: Tensor, second: Tensor) -> Tensor:
        ctx.save_for_backward(first, second)
        return _interleave(first_rows, second_rows, first, second)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (first, second) = grads, ctx.saved_tensors
        return grad.index_select(0, first), grad.index_select(0, second), None, None


def _interleave(first_rows: Tensor, second_rows: Tensor, first: Tensor, second: Tensor) -> Tensor:
    rows = first_rows.new_empty(len(first) + len(second), *first_rows.shape[1:])
    for part, places in ((first_rows, first), (second_rows, second)):
        if has_kernels(rows):
            from lightning_eplb.parallel.kernels import scatter_rows

            scatter_rows(part.contiguous(), places, rows)
        else:
            rows.index_copy_(0, places, part)
    return rows
