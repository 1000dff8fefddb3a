"""How even the work of the ranks is, as pure functions of counted tokens.

Shape suffixes: ``Y`` MoE layers, ``L`` logical experts, ``R`` ranks.
"""

from typing import Any

import numpy as np
import torch

from lightning_eplb._compiled import compiled
from lightning_eplb.placement import ExpertPlacement


def rank_tokens(load_YL: Any, placement: ExpertPlacement) -> np.ndarray:
    """Tokens that each rank serves when every copy of an expert serves an equal part of them.

    Args:
        load_YL: Tokens of each logical expert, ``[Y, L]``: a numpy array or a torch tensor on any device.
        placement: Where the experts are.

    Returns:
        float64 ``[Y, R]``. Fractions are kept: an expert of 3 tokens and 2 copies is 1.5 tokens on each.

    Raises:
        ValueError: The load has another number of layers or experts than the placement.

    Example:
        >>> placement = ExpertPlacement([[0, 1, 2, 2, 3, -1]], num_logical_experts=4, num_ranks=2)
        >>> rank_tokens(np.array([[10, 0, 3, 4]]), placement)
        array([[11.5,  5.5]])
    """
    load = _to_float64(load_YL)
    if load.shape != placement.replica_count.shape:
        raise ValueError(
            f"load_YL has shape {list(load.shape)}; this placement has {placement.num_layers} layers of"
            f" {placement.num_logical_experts} logical experts, so it must be {list(placement.replica_count.shape)}"
        )
    tokens_YR = np.zeros(placement.by_rank.shape[:2])
    _add_shares(load / placement.replica_count, placement.by_rank, tokens_YR)
    return tokens_YR


def slot_tokens(load_YL: Any, placement: ExpertPlacement) -> np.ndarray:
    """Tokens that each slot serves when every copy of an expert serves an equal part of them.

    Args:
        load_YL: Tokens of each logical expert, ``[Y, L]``: a numpy array or a torch tensor on any device.
        placement: Where the experts are.

    Returns:
        float64 ``[Y, P]``, 0 for an empty slot.

    Example:
        >>> placement = ExpertPlacement([[0, 1, 2, 2, 3, -1]], num_logical_experts=4, num_ranks=2)
        >>> slot_tokens(np.array([[10, 0, 3, 4]]), placement)
        array([[10. ,  0. ,  1.5,  1.5,  4. ,  0. ]])
    """
    share_YL = _to_float64(load_YL) / placement.replica_count
    slots_YP = placement.physical_to_logical
    return np.where(slots_YP < 0, 0.0, np.take_along_axis(share_YL, np.maximum(slots_YP, 0), axis=1))


def balancedness(tokens_YR: Any) -> float:
    """How level the ranks are: ``sum over layers of mean rank tokens / sum over layers of max rank tokens``.

    1 is perfect, ``1 / R`` is all work on one rank. In each layer the ranks wait for the fullest one, and layers come
    one after the other: so this is the part of the expert time in which an average rank has something to do.

    Args:
        tokens_YR: Tokens that each rank serves in each layer, ``[Y, R]``, or ``[R]`` for one layer: a numpy array or
            a torch tensor on any device.

    Returns:
        The ratio, in ``[1 / R, 1]``; 1.0 when there are no tokens at all.

    Raises:
        ValueError: Not one or two dimensions.

    Example:
        >>> balancedness(np.array([[30, 10], [20, 20]]))
        0.8
        >>> balancedness(torch.tensor([5, 5, 5, 5]))
        1.0
    """
    tokens = _to_float64(tokens_YR)
    if tokens.ndim not in (1, 2):
        raise ValueError(f"tokens_YR has shape {list(tokens.shape)}; it must be [layers, ranks] or [ranks]")
    return _balancedness(np.atleast_2d(tokens))


def hottest_share(load_YL: Any) -> float:
    """Tokens of the hottest expert over the mean of its layer's experts, in the layer where that is most.

    Args:
        load_YL: Tokens of each logical expert, ``[Y, L]``: a numpy array or a torch tensor on any device.

    Returns:
        The ratio, in ``[1, L]``; 1.0 when there are no tokens at all.

    Example:
        >>> hottest_share([[3, 3, 3, 3], [6, 1, 1, 0]])
        3.0
    """
    load = _to_float64(load_YL)
    mean_Y = load.mean(axis=1)
    return float((load.max(axis=1)[mean_Y > 0] / mean_Y[mean_Y > 0]).max(initial=1.0))


def load_entropy(load_YL: Any) -> float:
    """How evenly tokens are spread over experts: entropy of the experts' shares over that of even ones.

    Args:
        load_YL: Tokens of each logical expert, ``[Y, L]``: a numpy array or a torch tensor on any device.

    Returns:
        ``-sum(p log p) / log L``, the mean over the layers that have tokens: 1 is even, 0 is all tokens to one expert
        of each layer; 1.0 when there are no tokens at all, or only one expert.

    Example:
        >>> load_entropy([[3, 3, 3, 3], [8, 0, 0, 0]])
        0.5
    """
    load = _to_float64(load_YL)
    load = load[load.sum(axis=1) > 0]
    if not len(load) or load.shape[1] == 1:
        return 1.0
    share_YL = load / load.sum(axis=1, keepdims=True)
    summands_YL = share_YL * np.log(share_YL, out=np.zeros_like(share_YL), where=share_YL > 0)
    return float((-summands_YL.sum(axis=1) / np.log(load.shape[1])).mean())


@compiled
def _add_shares(share_YL, slots_YRS, tokens_YR):
    for layer, rank, slot in np.ndindex(slots_YRS.shape):
        expert = slots_YRS[layer, rank, slot]
        if expert >= 0:
            tokens_YR[layer, rank] += share_YL[layer, expert]


@compiled
def _balancedness(tokens_YR):
    """One addition after the other, so that all machines get the same bits: ranks decide by it."""
    layers, ranks = tokens_YR.shape
    total = fullest = 0.0
    for layer in range(layers):
        most = 0.0
        for rank in range(ranks):
            total += tokens_YR[layer, rank]
            most = max(most, tokens_YR[layer, rank])
        fullest += most
    return total / ranks / fullest if fullest > 0.0 else 1.0


def _to_float64(values: Any) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = values.detach().to(device="cpu", dtype=torch.float64).numpy()
    return np.asarray(values, dtype=np.float64)
