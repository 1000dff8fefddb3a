"""Join of ranks that call expert layers unequally often, in evaluation.

A rank with fewer batches, or shorter generated sequences, has no call left while other ranks go on. Their tokens need
the experts of that rank, so it joins their calls without tokens, as in ``torch.distributed.algorithms.Join``.

Shape suffixes: ``R`` ranks, ``L`` logical experts, ``C`` columns of the exchange: a call, then counts of experts.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from lightning_eplb.parallel.dispatch_plan import gather_counts
from lightning_eplb.parallel.extra_arguments import HAS_EXTRA_ARGUMENTS
from lightning_eplb.parallel.groups import ExpertGroups
from lightning_eplb.parallel.packing import to_device

_PAUSES, _IS_DONE = -1, -2
"""Values in place of a layer: this rank calls none until all ranks pause, or calls none anymore."""

_DTYPES = sorted((dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)), key=str)


class Call(NamedTuple):
    """Call of a layer by one rank, as other ranks must know it to join without tokens.

    Attributes:
        layer: Index among the layers. Negative if the rank calls none.
        width: Width of the hidden states.
        top_k: Number of choices of a token.
        hidden_dtype: Index of the hidden states' dtype.
        weights_dtype: Index of the routing weights' dtype.
        autocast_dtype: Index of the ``torch.autocast`` dtype, -1 without autocast.
        is_trained: 1 if a backward pass may follow.
        payload: Fingerprint of gradient hooks, and flag of extra arguments.
    """

    layer: int
    width: int = 0
    top_k: int = 0
    hidden_dtype: int = 0
    weights_dtype: int = 0
    autocast_dtype: int = -1
    is_trained: int = 0
    payload: int = 0

    @classmethod
    def of(cls, layer: int, hidden_TD: Tensor, weights_TK: Tensor, payload: int) -> "Call":
        device = hidden_TD.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return cls(
            layer,
            hidden_TD.shape[1],
            weights_TK.shape[1],
            _DTYPES.index(hidden_TD.dtype),
            _DTYPES.index(weights_TK.dtype),
            -1 if autocast is None else _DTYPES.index(autocast),
            int(torch.is_grad_enabled()),
            payload,
        )

    def autocast(self, device: torch.device) -> torch.autocast:
        """Return the autocast context of the call."""
        if self.autocast_dtype < 0:
            return torch.autocast(device.type, enabled=False)
        return torch.autocast(device.type, dtype=_DTYPES[self.autocast_dtype])

    def empty_inputs(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return hidden states ``[0, D]`` and routing weights ``[0, K]`` like those of the call."""
        hidden_TD = torch.empty(0, self.width, dtype=_DTYPES[self.hidden_dtype], device=device)
        return hidden_TD, torch.empty(0, self.top_k, dtype=_DTYPES[self.weights_dtype], device=device)


class JoinableExperts(Protocol):
    """Converted expert module, as :class:`ExpertJoin` uses it."""

    def compute_for_others(self, hidden_TD: Tensor, weights_TK: Tensor, counts_RL: np.ndarray) -> None:
        """Compute tokens of other ranks."""
        ...


class ExpertJoin:
    """Join of layer calls that the ranks of an EP group make unequally often. All ranks of the group use it together.

    Each call starts with the exchange of counts, in which every rank also names the layer that it calls. The ranks then
    compute the first of the layers that are called. Ranks that call another layer, or none, have no tokens in it, and
    exchange counts again.

    Args:
        layers: Converted modules, each with its name and its number of logical experts, in the same order on all ranks.
        groups: Process groups of the layers.
        device: Device of the layers' weights.
    """

    def __init__(
        self, layers: Sequence[tuple[str, int, JoinableExperts]], groups: ExpertGroups, device: torch.device
    ) -> None:
        self._layers, self._groups, self._device = layers, groups, device
        self._index = {id(module): index for index, (_, _, module) in enumerate(layers)}
        self._max_experts = max(num_experts for _, num_experts, _ in layers)

    def gather_counts(
        self, module: JoinableExperts, hidden_TD: Tensor, weights_TK: Tensor, counts_L: Tensor, payload: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Join other ranks' calls until it is this layer's turn. Then return the counts and payloads of all ranks.

        Returns:
            Counts, ``[R, L]`` int64, zeros for ranks that do not call the layer, and payloads, ``[R]``, zeros unless
            all ranks call it.

        Raises:
            RuntimeError: Not all ranks call the same layer, and one may run a backward pass or has extra arguments.
                All ranks raise it.
        """
        mine = Call.of(self._index[id(module)], hidden_TD, weights_TK, payload)
        while True:
            calls, counts_RL = self._exchange(mine, counts_L)
            turn = self._turn(calls)
            if turn == mine.layer:
                is_absent_R = np.array([call.layer != turn for call in calls])
                counts_RL[is_absent_R] = 0
                payloads_R = np.array([0 if is_absent_R.any() else call.payload for call in calls])
                return counts_RL[:, : len(counts_L)], payloads_R
            self._join_call(turn, calls, counts_RL)

    def pause(self) -> None:
        """Join other ranks' calls until all ranks pause or are done."""
        self._join_until(_PAUSES)

    def finish(self) -> None:
        """Join other ranks' calls until all ranks are done."""
        self._join_until(_IS_DONE)

    def _join_until(self, reason: int) -> None:
        mine = Call(reason)
        while True:
            calls, counts_RL = self._exchange(mine, torch.zeros(0, dtype=torch.int64, device=self._device))
            if any(call.layer >= 0 for call in calls):
                self._join_call(self._turn(calls), calls, counts_RL)
            elif reason == _PAUSES or all(call.layer == _IS_DONE for call in calls):
                return

    def _exchange(self, mine: Call, counts_L: Tensor) -> tuple[list[Call], np.ndarray]:
        padding = counts_L.new_zeros(self._max_experts - len(counts_L))
        sent = np.array(mine, dtype=np.int64) - _IS_DONE  # counts are zero or more
        columns_C = torch.cat((to_device(sent, self._device), counts_L, padding))
        columns_RC, _ = gather_counts(columns_C, self._groups)
        calls = [Call(*row.tolist()) for row in columns_RC[:, : len(mine)] + _IS_DONE]
        return calls, columns_RC[:, len(mine) :].copy()

    def _turn(self, calls: Sequence[Call]) -> int:
        turn = min(call.layer for call in calls if call.layer >= 0)
        others = [rank for rank, call in enumerate(calls) if call.layer != turn]
        if others and any(call.is_trained for call in calls):
            raise RuntimeError(
                f"{self._layers[turn][0]} was called with gradients enabled while EP ranks {others} did not call it,"
                " and a backward pass needs all ranks. Give all ranks as many batches and calls in validation_step,"
                " test_step or predict_step, or leave gradients disabled"
            )
        if others and any(call.payload & HAS_EXTRA_ARGUMENTS for call in calls):
            raise RuntimeError(
                f"{self._layers[turn][0]} was called with extra arguments while EP ranks {others} did not call it,"
                " which have no such arguments. Give all ranks as many batches and calls in evaluation."
            )
        return turn

    def _join_call(self, turn: int, calls: Sequence[Call], counts_RL: np.ndarray) -> None:
        _, num_experts, module = self._layers[turn]
        call = next(call for call in calls if call.layer == turn)
        counts_RL[[call.layer != turn for call in calls]] = 0
        with torch.no_grad(), call.autocast(self._device):
            module.compute_for_others(*call.empty_inputs(self._device), counts_RL[:, :num_experts])
