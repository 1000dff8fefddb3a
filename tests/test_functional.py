import numpy as np
import pytest
import torch

from lightning_eplb.functional import balancedness, hottest_share, load_entropy, rank_tokens
from lightning_eplb.placement import ExpertPlacement

PLACEMENT = ExpertPlacement([[0, 1, 2, 2, 3, -1], [3, 0, 2, 1, 2, 0]], num_logical_experts=4, num_ranks=2)


@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_rank_tokens_of_replicas_splits_evenly(kind):
    tokens_YR = rank_tokens(kind([[10, 0, 3, 4], [5, 7, 2, 1]]), PLACEMENT)
    assert tokens_YR.dtype == np.float64
    assert tokens_YR.tolist() == [[11.5, 5.5], [1 + 2.5 + 1, 7 + 1 + 2.5]]


def test_rank_tokens_of_any_load_counts_every_token_once():
    load_YL = np.random.default_rng(0).integers(0, 1000, (2, 4))
    assert rank_tokens(load_YL, PLACEMENT).sum(axis=1) == pytest.approx(load_YL.sum(axis=1))


@pytest.mark.parametrize("shape", [(2, 3), (1, 4), (4,), (2, 4, 1)])
def test_rank_tokens_of_other_shape_raises(shape):
    with pytest.raises(ValueError, match=r"load_YL has shape .* must be \[2, 4\]"):
        rank_tokens(np.zeros(shape), PLACEMENT)


@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_balancedness_of_layers_is_summed_mean_over_max(kind):
    assert balancedness(kind([[30, 10], [20, 20]])) == (20 + 20) / (30 + 20)
    assert balancedness(kind([3, 1])) == 2 / 3
    assert balancedness(kind([[2, 0]])) == 0.5  # a twofold skew is not 1.0


def test_balancedness_of_bfloat16_with_gradient_is_exact():
    assert balancedness(torch.tensor([[3.0, 1.0]], dtype=torch.bfloat16, requires_grad=True)) == 2 / 3


@pytest.mark.parametrize("tokens", [np.zeros((2, 3)), np.zeros((0, 3)), torch.zeros(4, dtype=torch.int64)])
def test_balancedness_without_tokens_is_one(tokens):
    assert balancedness(tokens) == 1.0


def test_balancedness_of_array_leaves_it_unchanged():
    tokens = np.array([[3.0, 1.0]])
    balancedness(tokens)
    assert tokens.tolist() == [[3.0, 1.0]]


@pytest.mark.parametrize("shape", [(), (2, 2, 2)])
def test_balancedness_of_other_dimensions_raises(shape):
    with pytest.raises(ValueError, match="tokens_YR has shape"):
        balancedness(np.ones(shape))


@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_hottest_share_and_entropy_of_layers_match_hand_calculation(kind):
    load_YL = kind([[4, 4, 4, 4], [0, 0, 0, 0], [10, 10, 0, 0]])
    assert hottest_share(load_YL) == 2.0
    assert load_entropy(load_YL) == pytest.approx((1 + 0.5) / 2)  # the layer without tokens is none


def test_hottest_share_and_entropy_without_tokens_are_one():
    assert (hottest_share(np.zeros((2, 4))), load_entropy(np.zeros((2, 4)))) == (1.0, 1.0)
    assert (hottest_share([[7], [1]]), load_entropy([[7], [1]])) == (1.0, 1.0)
    assert (hottest_share([[0, 9, 0]]), load_entropy([[0, 9, 0]])) == (3.0, 0.0)
