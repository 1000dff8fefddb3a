"""Layer calls in evaluation, where ranks may call the layers unequally often.

A rank with fewer batches, or shorter generated sequences, has no call left while others go on. Their tokens need the
experts of that rank, so it takes part in their calls without tokens.

Shape suffixes: ``R`` ranks, ``L`` logical experts, ``C`` columns of the exchange: a call, then counts of experts.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from lightning_eplb.parallel.dispatch import gather_counts
from lightning_eplb.parallel.extra_arguments import FURTHER_GIVEN
from lightning_eplb.parallel.groups import ExpertGroups
from lightning_eplb.parallel.packing import to_device

_PAUSES, _IS_DONE = -1, -2
"""In place of a layer: this rank calls none until all ranks pause, or calls none anymore."""

_DTYPES = sorted((dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)), key=str)


class Call(NamedTuple):
    """One rank's call of a layer, as the other ranks must know it to take part without tokens.

    Attributes:
        layer: Its place among the layers; negative where the rank calls none.
        width: Of the hidden states.
        top_k: Choices of a token.
        hidden_dtype: Index of the hidden states' dtype.
        weights_dtype: Index of the routing weights' dtype.
        autocast_dtype: Index of the dtype that is computed in under ``torch.autocast``; -1 without.
        is_trained: 1 where a backward pass may follow.
        word: Of its gradient hooks and further arguments, see
            :func:`~lightning_eplb.parallel.gradient_hooks.wrap_hooks`.
    """

    layer: int
    width: int = 0
    top_k: int = 0
    hidden_dtype: int = 0
    weights_dtype: int = 0
    autocast_dtype: int = -1
    is_trained: int = 0
    word: int = 0

    @classmethod
    def of(cls, layer: int, hidden_TD: Tensor, weights_TK: Tensor, word: int) -> "Call":
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
            word,
        )

    def autocast(self, device: torch.device) -> torch.autocast:
        """The context in which the call is made."""
        if self.autocast_dtype < 0:
            return torch.autocast(device.type, enabled=False)
        return torch.autocast(device.type, dtype=_DTYPES[self.autocast_dtype])

    def no_tokens(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Hidden states ``[0, D]`` and routing weights ``[0, K]`` like those of the call."""
        hidden_TD = torch.empty(0, self.width, dtype=_DTYPES[self.hidden_dtype], device=device)
        return hidden_TD, torch.empty(0, self.top_k, dtype=_DTYPES[self.weights_dtype], device=device)


class ConvertedExperts(Protocol):
    """A converted expert module, as :class:`UnevenCalls` uses it."""

    def take_part(self, hidden_TD: Tensor, weights_TK: Tensor, counts_RL: np.ndarray) -> None:
        """Serve the tokens of other ranks."""
        ...


class UnevenCalls:
    """Lets the ranks of an EP group call layers unequally often. All ranks of the group use it at the same time.

    Each call begins with the exchange of counts, in which every rank also says which layer it calls. The ranks then
    serve the first of the layers that are called. Those that call another one, or none, have no tokens in it, and
    exchange counts again.

    Args:
        layers: Converted modules, each with its name and its number of logical experts; the same order on all ranks.
        groups: Of all layers.
        device: Of the layers' weights.
    """

    def __init__(
        self, layers: Sequence[tuple[str, int, ConvertedExperts]], groups: ExpertGroups, device: torch.device
    ) -> None:
        self._layers, self._groups, self._device = layers, groups, device
        self._place = {id(module): place for place, (_, _, module) in enumerate(layers)}
        self._most_experts = max(num_experts for _, num_experts, _ in layers)

    def wait_for(
        self, module: ConvertedExperts, hidden_TD: Tensor, weights_TK: Tensor, counts_L: Tensor, word: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Take part in other ranks' calls until it is this layer's turn.

        Returns:
            The counts of all ranks, ``[R, L]`` int64; zeros where a rank does not call the layer. Their words, ``[R]``;
            zeros unless all ranks call it.

        Raises:
            RuntimeError: On all ranks, if not all call the same layer, and a rank may run a backward pass or was given
                further arguments.
        """
        mine = Call.of(self._place[id(module)], hidden_TD, weights_TK, word)
        while True:
            calls, counts_RL = self._exchange(mine, counts_L)
            turn = self._turn(calls)
            if turn == mine.layer:
                is_absent_R = np.array([call.layer != turn for call in calls])
                counts_RL[is_absent_R] = 0
                words_R = np.array([0 if is_absent_R.any() else call.word for call in calls])
                return counts_RL[:, : len(counts_L)], words_R
            self._take_part(turn, calls, counts_RL)

    def pause(self) -> None:
        """Take part in other ranks' calls until all ranks pause, or are done."""
        self._take_part_while(_PAUSES)

    def finish(self) -> None:
        """Take part in other ranks' calls until all ranks are done."""
        self._take_part_while(_IS_DONE)

    def _take_part_while(self, reason: int) -> None:
        mine = Call(reason)
        while True:
            calls, counts_RL = self._exchange(mine, torch.zeros(0, dtype=torch.int64, device=self._device))
            if any(call.layer >= 0 for call in calls):
                self._take_part(self._turn(calls), calls, counts_RL)
            elif reason == _PAUSES or all(call.layer == _IS_DONE for call in calls):
                return

    def _exchange(self, mine: Call, counts_L: Tensor) -> tuple[list[Call], np.ndarray]:
        padding = counts_L.new_zeros(self._most_experts - len(counts_L))
        told = np.array(mine, dtype=np.int64) - _IS_DONE  # counts are zero or more
        columns_C = torch.cat((to_device(told, self._device), counts_L, padding))
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
        if others and any(call.word & FURTHER_GIVEN for call in calls):
            raise RuntimeError(
                f"{self._layers[turn][0]} was called with further arguments while EP ranks {others} did not call it,"
                " and these don't know them. Give all ranks as many batches and calls in evaluation"
            )
        return turn

    def _take_part(self, turn: int, calls: Sequence[Call], counts_RL: np.ndarray) -> None:
        _, num_experts, module = self._layers[turn]
        call = next(call for call in calls if call.layer == turn)
        counts_RL[[call.layer != turn for call in calls]] = 0
        with torch.no_grad(), call.autocast(self._device):
            module.take_part(*call.no_tokens(self._device), counts_RL[:, :num_experts])
