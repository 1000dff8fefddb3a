"""The Triton kernels against tensor operations: on a GPU, or in Triton's interpreter on the CPU."""

import os

import pytest
import torch
from torch import Tensor

from lightning_eplb.parallel.kernels import copy_segments, scatter_rows, sum_pairs, sum_pairs_backward
from lightning_eplb.parallel.packing import AddressTablePacker

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.bfloat16, torch.float16, torch.float32)}


def pairs(tokens: int, top_k: int, width: int, dtype: torch.dtype, without: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of all pairs but the last ``without``, in a random order, the place of each pair, and weights."""
    generator = torch.Generator().manual_seed(tokens + top_k + width)
    number = tokens * top_k
    order = torch.randperm(number, generator=generator)[: number - without]
    place = torch.full((number,), -1)
    place[order] = torch.arange(len(order))
    rows = torch.randn(len(order), width, generator=generator, dtype=torch.float64).to(dtype)
    weights = torch.rand(tokens, top_k, generator=generator, dtype=torch.float64).to(dtype)
    return rows.to(DEVICE), place.view(tokens, top_k).to(DEVICE), weights.to(DEVICE)


def expected(rows: Tensor, place: Tensor, weights: Tensor | None) -> Tensor:
    padded = torch.cat((rows, rows.new_zeros(1, rows.shape[1])))[place]  # place -1 is the zeros
    return (padded if weights is None else padded * weights.unsqueeze(-1)).sum(dim=1)


@pytest.mark.parametrize(
    ("tokens", "top_k", "width", "without"), [(5, 2, 16, 0), (7, 3, 24, 4), (3, 8, 2050, 1), (4, 1, 4100, 0)]
)
def test_sum_pairs_in_float64_equals_tensor_operations(tokens: int, top_k: int, width: int, without: int):
    rows, place, weights = pairs(tokens, top_k, width, torch.float64, without)
    torch.testing.assert_close(sum_pairs(rows, place, None), expected(rows, place, None), rtol=1e-13, atol=1e-13)
    rows.requires_grad_()
    weights.requires_grad_()
    output = expected(rows, place, weights)
    torch.testing.assert_close(sum_pairs(rows.detach(), place, weights.detach()), output, rtol=1e-13, atol=1e-13)
    grad = torch.randn_like(output)
    found = sum_pairs_backward(grad, rows.detach(), weights.detach(), place)
    for ours, theirs in zip(found, torch.autograd.grad(output, (rows, weights), grad), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sum_pairs_in_lower_precision_sums_in_float32(dtype: torch.dtype):
    rows, place, weights = pairs(9, 8, 64, dtype, 0)
    exact = expected(rows.double(), place, weights.double())
    found = sum_pairs(rows, place, weights)
    assert found.dtype == dtype
    torch.testing.assert_close(found, exact.to(dtype), rtol=2 * EPS[dtype], atol=8 * EPS[dtype])
    grad = torch.ones_like(found)
    grad_rows, grad_weights = sum_pairs_backward(grad, rows, weights, place)
    assert grad_rows.dtype == grad_weights.dtype == dtype
    by_pair = rows.double()[place].sum(dim=-1).to(dtype)
    torch.testing.assert_close(grad_weights, by_pair, rtol=2 * EPS[dtype], atol=64 * EPS[dtype])


def test_sum_pairs_of_no_token_is_empty():
    rows, place = torch.empty(0, 8, device=DEVICE), torch.empty(0, 2, dtype=torch.int64, device=DEVICE)
    assert sum_pairs(rows, place, None).shape == (0, 8)


@pytest.mark.parametrize(("number", "width"), [(0, 4), (5, 24), (3, 2050)])
def test_scatter_rows_to_places_equals_index_copy(number: int, width: int):
    rows = torch.randn(number, width, device=DEVICE)
    places = torch.randperm(2 * number, generator=torch.Generator().manual_seed(0))[:number].to(DEVICE)
    target = torch.zeros(2 * number, width, device=DEVICE)
    scatter_rows(rows, places, target)
    assert torch.equal(target, torch.zeros_like(target).index_copy_(0, places, rows))


@pytest.mark.parametrize("word", [torch.uint8, torch.int32, torch.int64])
@pytest.mark.parametrize("into_buffer", [True, False])
@pytest.mark.parametrize("uses_all_sms", [True, False])
def test_copy_segments_by_table_copies_nothing_else(word: torch.dtype, into_buffer: bool, uses_all_sms: bool):
    widths, gap = [7, 5000, 1, 4096], 3
    outside, inside = (torch.randint(0, 200, (sum(widths) + gap * 5,), device=DEVICE).to(word) for _ in range(2))
    starts = [gap + sum(widths[:i]) + gap * i for i in range(4)]
    places = [sum(widths[:i]) for i in (3, 1, 2, 0)]
    addresses = [outside.data_ptr() + start * word.itemsize for start in starts]
    table = torch.tensor([addresses, places, widths], dtype=torch.int64, device=DEVICE)
    source, target = (outside, inside.clone()) if into_buffer else (inside, outside.clone())
    expected = target.clone()
    for i in (1, 2):
        one, other = slice(starts[i], starts[i] + widths[i]), slice(places[i], places[i] + widths[i])
        to, of = (other, one) if into_buffer else (one, other)
        expected[to] = source[of]
    whole = (target if into_buffer else inside), (target if not into_buffer else outside)
    table[0] += whole[1].data_ptr() - outside.data_ptr()
    copy_segments(table, slice(1, 3), 5000, whole[0], into_buffer, uses_all_sms)
    assert torch.equal(target, expected)


def test_address_table_packer_of_stacks_packs_and_unpacks():
    stacks = [
        [torch.arange(i, i + 6.0, device=DEVICE).view(3, 2).to(dtype) for i in (0, 10)]
        for dtype in (torch.float64, torch.float32)
    ]
    stacks[1][1] = stacks[1][1].t().contiguous().t()
    rows, chunks = torch.tensor([4, 0]), [[(0, 0, 2)], [(1, 0, 1)]]
    packer = AddressTablePacker(stacks, rows, chunks, 8)
    buffers = [packer.pack(chunk, uses_all_sms=chunk > 0) for chunk in range(2)]
    assert buffers[0].view(torch.float64).tolist() == [[12.0, 13.0], [0.0, 1.0]]
    assert buffers[1].view(torch.float32).tolist() == [[12.0, 13.0], [0.0, 1.0]]
    for chunk, buffer in enumerate(buffers):
        packer.unpack(buffer.flip(0), chunk, uses_all_sms=chunk > 0)
    packer.finish()
    for stack in stacks:
        assert [tensor.tolist() for tensor in stack] == [[[12, 13], [2, 3], [4, 5]], [[10, 11], [0, 1], [14, 15]]]
