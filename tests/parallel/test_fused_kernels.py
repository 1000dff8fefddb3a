"""Kernels of fused experts against tensor operations: on a GPU, or in Triton's interpreter on the CPU."""

import os

import pytest
import torch
from torch import Tensor

from lightning_eplb.parallel.fused_form import (
    CONCATENATED,
    GELU,
    GELU_TANH,
    INTERLEAVED,
    PLAIN,
    RELU,
    RELU_SQUARED,
    SIGMOID,
    ActivationArguments,
    FusedForm,
)
from lightning_eplb.parallel.fused_kernels import (
    Rows,
    activate,
    activate_backward,
    add_bias,
    dot_bias,
    sum_by_expert,
)
from lightning_eplb.parallel.pair_kernels import expand_tokens, place_pairs, sum_rows

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
ENDS = [3, 3, 7]  # rows of experts 0 and 2, none of expert 1
EXPERT_OF_ROW = [0, 0, 0, 2, 2, 2, 2]
TAIL = 2
ROWS = len(EXPERT_OF_ROW) + TAIL
KINDS = [SIGMOID, GELU, GELU_TANH, RELU, RELU_SQUARED]
LAYOUTS = [PLAIN, CONCATENATED, INTERLEAVED]
GPT_OSS = ActivationArguments(SIGMOID, 1.702, 0.7, 1.0, INTERLEAVED)


def draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype).to(DEVICE)


def with_tail(rows: Tensor) -> Tensor:
    """Rows whose last ``TAIL`` belong to no expert and are NaN."""
    return torch.cat((rows, rows.new_full((TAIL, *rows.shape[1:]), float("nan"))))


def ends() -> Tensor:
    return torch.tensor(ENDS, dtype=torch.int32, device=DEVICE)


def used(rows: Tensor) -> Tensor:
    return rows[: len(EXPERT_OF_ROW)]


def check_activation(constants: ActivationArguments, dtype: torch.dtype, tolerance: float, width: int = 6) -> None:
    form = FusedForm((), constants, False, False)
    inner_width = width * (1 if constants.layout == PLAIN else 2)
    inner, bias = draw(len(EXPERT_OF_ROW), inner_width, dtype=dtype), draw(3, inner_width, dtype=dtype, seed=1)
    weights = draw(len(EXPERT_OF_ROW), seed=2).abs().to(torch.float64 if dtype == torch.float64 else torch.float32)
    grad = draw(len(EXPERT_OF_ROW), width, dtype=dtype, seed=3)
    exact_inner = inner.double().requires_grad_()
    exact_weights = weights.double().requires_grad_()
    expected = form.activate(exact_inner + bias.double()[EXPERT_OF_ROW]) * exact_weights[:, None]
    expected_grads = torch.autograd.grad(expected, (exact_inner, exact_weights), grad.double())

    rows = Rows(ends(), with_tail(weights))
    found = activate(with_tail(inner), bias, rows, constants)
    grad_weights = torch.full((ROWS,), float("nan"), dtype=weights.dtype, device=DEVICE)
    grad_inner, again = activate_backward(with_tail(inner), bias, rows, with_tail(grad), grad_weights, constants)
    close = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(used(found).double(), expected.detach(), **close)
    assert torch.equal(used(again), used(found))
    torch.testing.assert_close(used(grad_inner).double(), expected_grads[0], **close)
    torch.testing.assert_close(used(grad_weights).double(), expected_grads[1], rtol=tolerance, atol=4 * tolerance)
    assert grad_weights[-TAIL:].tolist() == [0.0] * TAIL
    assert found.dtype == grad_inner.dtype == dtype


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("limit", "offset"), [(0.0, 0.0), (0.7, 1.0)])
def test_activation_of_any_layout_computes_as_tensor_operations(kind: int, layout: int, limit: float, offset: float):
    check_activation(ActivationArguments(kind, 1.3, limit, offset, layout), torch.float64, 1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_activation_in_lower_precision_rounds_once(dtype: torch.dtype, tolerance: float):
    check_activation(GPT_OSS, dtype, tolerance)


def test_activation_wider_than_a_block_computes_as_tensor_operations():
    check_activation(ActivationArguments(SIGMOID), torch.float64, 1e-12, width=1030)


@pytest.mark.parametrize("kind", [SIGMOID, RELU, RELU_SQUARED])
def test_activation_of_nan_returns_nan(kind: int):
    inner = torch.full((1, 4), float("nan"), device=DEVICE)
    rows = Rows(torch.tensor([1], dtype=torch.int32, device=DEVICE), None)
    assert activate(inner, None, rows, ActivationArguments(kind, 1.0, 0.5)).isnan().all()


def test_activation_without_weights_bias_or_rows_computes_as_tensor_operations():
    inner = draw(4, 12)
    rows = Rows(torch.tensor([4], dtype=torch.int32, device=DEVICE), None)
    constants = ActivationArguments(SIGMOID)
    expected = FusedForm((), constants, False, False).activate(inner)
    torch.testing.assert_close(activate(inner, None, rows, constants), expected)
    none = Rows(torch.zeros(1, dtype=torch.int32, device=DEVICE), None)
    assert activate(inner[:0], None, none, constants).shape == (0, 6)


def test_bias_of_experts_is_added_and_its_gradient_summed_by_expert():
    product, bias, weights = draw(len(EXPERT_OF_ROW), 5), draw(3, 5, seed=1), draw(len(EXPERT_OF_ROW), seed=2)
    rows = Rows(ends(), with_tail(weights))
    found = add_bias(with_tail(product), bias, rows)
    torch.testing.assert_close(used(found), product + weights[:, None] * bias[EXPERT_OF_ROW])
    dots = dot_bias(with_tail(product), bias, rows)
    torch.testing.assert_close(used(dots), (product * bias[EXPERT_OF_ROW]).sum(1))
    assert dots[-TAIL:].tolist() == [0.0] * TAIL
    weighted = product * weights[:, None]
    expected = torch.stack(
        (weighted[:3].sum(0), torch.zeros(5, dtype=torch.float64, device=DEVICE), weighted[3:].sum(0))
    )
    torch.testing.assert_close(sum_by_expert(with_tail(product), rows, torch.float64), expected)
    plain = sum_by_expert(with_tail(product), Rows(ends(), None), torch.float32)
    torch.testing.assert_close(plain[2], product[3:].sum(0).float())


def test_sum_by_expert_of_many_rows_equals_tensor_sum():
    product = draw(100, 130)
    rows = Rows(torch.tensor([1, 100], dtype=torch.int32, device=DEVICE), None)
    expected = torch.stack((product[0], product[1:].sum(0)))
    torch.testing.assert_close(sum_by_expert(product, rows, torch.float64), expected)


def test_place_pairs_of_small_batch_orders_by_expert_then_token():
    index = torch.tensor([[2, 0], [3, 2], [-1, 0], [2, 7]], device=DEVICE)
    place, ends_found, counts = place_pairs(index, 3)
    assert place.tolist() == [[2, 0], [-1, 3], [-1, 1], [4, -1]]
    assert ends_found.tolist() == [2, 2, 5]
    assert counts.tolist() == [2, 0, 3]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
@pytest.mark.parametrize(("pairs", "num_experts"), [(3000, 5), (700, 200), (40, 1), (9, 256)])
def test_place_pairs_of_several_blocks_equals_stable_sort(pairs: int, num_experts: int, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(pairs)
    high = min(num_experts + 3, 256) if dtype == torch.uint8 else num_experts + 3
    index = torch.randint(0, high, (pairs, 1), generator=generator).to(dtype).to(DEVICE)
    place, ends_found, counts = place_pairs(index, num_experts)
    flat = index.view(-1).long()
    order = torch.sort(flat, stable=True).indices
    expected = torch.full_like(flat, -1)
    expected[order] = torch.arange(pairs, device=DEVICE)
    expected[flat >= num_experts] = -1
    assert torch.equal(place.view(-1).long(), expected)
    expected_counts = torch.bincount(flat, minlength=num_experts)[:num_experts]
    assert torch.equal(counts, expected_counts)
    assert torch.equal(ends_found.long(), expected_counts.cumsum(0))


@pytest.mark.parametrize(("top_k", "width"), [(1, 16), (3, 24), (8, 2050)])
def test_expand_tokens_and_sum_rows_of_any_shape_equal_tensor_operations(top_k: int, width: int):
    index = torch.randint(-1, 6, (5, top_k), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    index[2] = 5  # a token of no expert
    place, ends_found, _ = place_pairs(index, 5)
    tokens, weights = draw(5, width, dtype=torch.float32), draw(5, top_k, dtype=torch.bfloat16, seed=1)
    rows, row_weights = expand_tokens(tokens, place, weights)
    assert row_weights is not None
    assert row_weights.dtype == torch.float32
    for token, k in (place >= 0).nonzero().tolist():
        assert torch.equal(rows[place[token, k]], tokens[token])
        assert row_weights[place[token, k]] == weights[token, k]
    rows[ends_found[-1] :], row_weights[ends_found[-1] :] = float("nan"), float("nan")
    summed, values = sum_rows(rows, place, row_weights, torch.bfloat16)
    counts = (place >= 0).sum(1, keepdim=True)
    torch.testing.assert_close(summed, tokens * counts)
    assert values is not None
    assert torch.equal(values, weights * (place >= 0))


def test_place_pairs_without_tokens_has_no_row():
    place, ends_found, counts = place_pairs(torch.empty(0, 2, dtype=torch.int64, device=DEVICE), 3)
    assert ends_found.tolist() == counts.tolist() == [0, 0, 0]
    rows, _ = expand_tokens(draw(0, 4), place)
    assert rows.shape == sum_rows(rows, place)[0].shape == (0, 4)
