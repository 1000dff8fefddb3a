"""Rows in other orders, against indexing and PyTorch's own gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_eplb.parallel.permute import combine_pairs, copy_to_pairs, merge_rows, split_rows

WIDTH = 3


@st.composite
def pairs(draw: st.DrawFn) -> tuple[int, int, Tensor]:
    """Tokens, top-k, and some of the pairs in some order."""
    tokens, top_k = draw(st.integers(0, 6)), draw(st.integers(1, 4))
    order = draw(st.permutations(range(tokens * top_k)))
    return tokens, top_k, torch.tensor(order[: draw(st.integers(0, len(order)))], dtype=torch.int64)


def random(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)


@settings(max_examples=60)
@given(pairs())
def test_copy_and_combine_pairs_in_any_order_equal_indexing(drawn: tuple[int, int, Tensor]):
    tokens, top_k, order = drawn
    hidden, weights = random(tokens, WIDTH), random(tokens, top_k)
    copied = copy_to_pairs(hidden, order, top_k)
    assert torch.equal(copied, hidden[order // top_k])
    assert torch.autograd.gradcheck(lambda h: copy_to_pairs(h, order, top_k), (hidden,))

    rows = random(len(order), WIDTH)
    expected = torch.zeros(tokens, WIDTH, dtype=torch.float64)
    for row, pair in zip(rows, order.tolist(), strict=True):
        expected[pair // top_k] += row * weights[pair // top_k, pair % top_k]
    torch.testing.assert_close(combine_pairs(rows, weights, order), expected)
    assert torch.autograd.gradcheck(lambda r, w: combine_pairs(r, w, order), (rows, weights))


def test_combine_pairs_with_float32_weights_keeps_dtype_of_rows():
    rows, weights = torch.ones(4, WIDTH, dtype=torch.bfloat16), torch.full((2, 2), 1 / 3)
    combined = combine_pairs(rows, weights, torch.arange(4))
    assert combined.dtype == torch.bfloat16
    torch.testing.assert_close(combined, torch.full((2, WIDTH), 2 / 3).bfloat16())


@pytest.mark.parametrize("first", [0, 2, 5])
def test_merge_rows_after_split_rows_restores_order(first: int):
    order = torch.tensor([3, 0, 4, 1, 2])
    rows = random(5, WIDTH)
    apart = split_rows(rows, order[:first], order[first:])
    assert torch.equal(torch.cat(apart), rows[order])
    assert torch.equal(merge_rows(*apart, order[:first], order[first:]), rows)
    assert torch.autograd.gradcheck(lambda r: split_rows(r, order[:first], order[first:]), (rows,))
    halves = random(first, WIDTH), random(5 - first, WIDTH)
    assert torch.autograd.gradcheck(lambda a, b: merge_rows(a, b, order[:first], order[first:]), halves)
