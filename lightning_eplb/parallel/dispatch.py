"""Contract of token dispatchers: the exchange of tokens between the ranks that share the experts of a layer.

Shape suffixes: ``T`` tokens, ``K`` top-k, ``M`` pairs of token and expert that this rank computes, ``L`` logical
experts, ``R`` ranks, ``S`` slots of a rank, ``D`` model width.
"""

import inspect
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_eplb.parallel.dispatch_plan import Routing, gather_counts, sort_pairs
from lightning_eplb.parallel.groups import ExpertGroups


@dataclass(eq=False)
class TokenBatch:
    """Tokens of one call of a layer on this rank, and the table that routes them.

    Attributes:
        layer: Name of the layer, for messages.
        hidden: Hidden states, ``[T, D]``.
        index: Logical expert of each choice, ``[T, K]``, any integer dtype. Ids outside ``0 ... L-1`` are no expert's.
        weights: Routing weights, ``[T, K]``, any floating dtype.
        num_experts: Number of logical experts, ``L``.
        slot_of_expert: Routing table, ``[L + 1]`` int32 on the tokens' device: slot of each logical expert, ``rank * S
            + slot``, and the number of all slots at the end. ``None`` if replicas share the tokens of an expert, so
            that slots depend on the counts of all ranks.
        slots: Logical expert of each slot in the placement, ``[R, S]`` int64, ``-1`` where the slot is empty.
        experts_weigh: The experts can multiply their outputs by the routing weights themselves.
    """

    layer: str
    hidden: Tensor
    index: Tensor
    weights: Tensor
    num_experts: int
    slot_of_expert: Tensor | None
    slots: np.ndarray
    experts_weigh: bool = False

    @property
    def top_k(self) -> int:
        """Number of choices of a token, ``K``."""
        return self.weights.shape[1]

    @cached_property
    def sorted_pairs(self) -> tuple[Tensor, Tensor]:
        """Pairs of this rank in the order of logical experts and the number of each, see :func:`sort_pairs`."""
        return sort_pairs(self.index, self.num_experts)


class TokenCounts(NamedTuple):
    """Result of :meth:`TokenDispatcher.count`.

    Attributes:
        counts: Pairs of each rank and logical expert, ``[R, L]`` int64.
        payloads: Number that each rank sent along, ``[R]`` int64.
        dispatcher: Dispatcher that goes on with the batch, mostly the one that counted. The same class on all ranks.
        in_flight: State of that dispatcher, passed to :meth:`TokenDispatcher.dispatch`.
    """

    counts: np.ndarray
    payloads: np.ndarray
    dispatcher: "TokenDispatcher"
    in_flight: Any = None


class DispatchedRows(NamedTuple):
    """Rows in the order of the experts that compute them.

    Attributes:
        hidden: Hidden states, ``[M, D]``.
        ends: End of each expert's rows, int32 on the device.
        weights: Routing weight of each row, ``[M]`` float32 (float64 for float64), if the experts are to multiply
            their outputs by it. ``None`` if :meth:`TokenDispatcher.combine` does.
    """

    hidden: Tensor
    ends: Tensor
    weights: Tensor | None = None


class TokenDispatcher(ABC):
    """Exchange of tokens between the ranks of an EP group. Subclass it for another transport.

    Pass the subclass as ``parallelize_experts(dispatcher=...)``. A converted layer calls, on all ranks of the EP group
    and also on ranks without tokens:

    1. :meth:`count`: all ranks learn how many pairs of token and expert each of them has;
    2. :meth:`dispatch`: tokens are sent to the ranks of their experts. The :class:`Routing` says how many pairs each
       slot computes; :func:`~lightning_eplb.parallel.dispatch_plan.assign_slots` makes a slot id for each pair of it;
    3. for each of :meth:`parts`, :meth:`receive`, the experts and :meth:`send_back`;
    4. :meth:`combine`: the outputs of each token are summed.

    Within an expert, rows are ordered by source rank, then by token and choice, whatever the transport. So the same
    counts make the same order. Autograd runs the reverse in the backward pass: the methods must be differentiable in
    hidden states, routing weights and rows.

    Args:
        groups: Process groups of the layer. ``groups.ep_group`` are the ranks that share its experts.
    """

    def __init__(self, groups: ExpertGroups) -> None:
        self.groups = groups

    @property
    def is_direct(self) -> bool:
        """``True`` if ranks wrote the latest batch into each other's memory."""
        return False

    @property
    def way(self) -> str:
        """Phrase for messages: how tokens travel, after the first batch."""
        return f"by {type(self).__name__}"

    @property
    def for_uneven_calls(self) -> "TokenDispatcher":
        """Dispatcher for calls that some ranks join without tokens, with counts that they know already."""
        return self

    def count(self, batch: TokenBatch, payload: int = 0) -> TokenCounts:
        """Gather the counts of all ranks. The only method that waits for the device.

        Args:
            batch: Tokens of this rank.
            payload: Number below ``2**23`` that goes to all ranks, too.
        """
        _, counts_L = batch.sorted_pairs
        return TokenCounts(*gather_counts(counts_L, self.groups, payload), self)

    def parts(self, batch: TokenBatch, routing: Routing) -> list[slice]:
        """Return the primaries that each part of the exchange is for, in order. The same on all ranks.

        The last part is also for the redundant experts. By default there is one part.
        """
        return [slice(0, routing.num_primaries)]

    def divides_gradients(self, batch: TokenBatch) -> bool:
        """Return ``True`` if gradients of rows come divided by ``R``. The same on all ranks.

        Then those of parameters are averages over ranks, and the dispatcher multiplies what goes back to tokens. It
        may do so only where ``batch.experts_weigh``.
        """
        return False

    @abstractmethod
    def dispatch(self, batch: TokenBatch, routing: Routing, in_flight: Any = None) -> Any:
        """Send the tokens of this rank.

        Args:
            batch: Tokens of this rank.
            routing: Number of pairs that each slot computes.
            in_flight: State from :meth:`count`.

        Returns:
            Handle for the methods below. It can be anything.
        """

    @abstractmethod
    def receive(self, handle: Any, part: int) -> tuple[DispatchedRows, DispatchedRows]:
        """Wait for the tokens of a part that this rank computes.

        Returns:
            Rows of the primaries in the order of their slots, and rows of the redundant experts in the order in which
            their weights arrive, ``routing.serving_order``. The latter are empty but in the last part.
        """

    @abstractmethod
    def send_back(self, handle: Any, part: int, primaries_MD: Tensor, redundant_MD: Tensor) -> None:
        """Send the experts' outputs for the rows that :meth:`receive` returned, in the same order."""

    @abstractmethod
    def combine(self, handle: Any) -> Tensor:
        """Wait for the outputs of all parts, and sum those of each token.

        They are weighted by ``batch.weights``, unless :meth:`receive` returned weights.

        Returns:
            ``[T, D]`` in the outputs' dtype.
        """

    def dispatch_argument(self, handle: Any, rows_TC: Tensor) -> Any:
        """Send a further argument of the experts, which has a row for each token. Called after :meth:`dispatch`.

        Args:
            handle: Return value of :meth:`dispatch`.
            rows_TC: Rows of any width, in a floating dtype or as uint8.

        Returns:
            Handle of the argument.
        """
        raise NotImplementedError(
            f"{type(self).__name__} has no dispatch_argument and receive_argument, which send further arguments of"
            " experts that have a row for each token. Implement them, or use AllToAllDispatcher."
        )

    def receive_argument(self, handle: Any, part: int) -> tuple[Tensor, Tensor]:
        """Wait for the rows of an argument, ``[M, C]`` for primaries and for redundant experts, as :meth:`receive`."""
        raise NotImplementedError(f"{type(self).__name__} has no receive_argument")


NEW_METHODS = "count, dispatch(batch, routing, in_flight), receive, send_back and combine(handle)"


def check_dispatcher(dispatcher: Any) -> None:
    """Raise ``TypeError`` unless ``dispatcher`` is a class with the methods of :class:`TokenDispatcher`."""
    if not (isinstance(dispatcher, type) and issubclass(dispatcher, TokenDispatcher)):
        raise TypeError(
            f"dispatcher={dispatcher!r} must be a subclass of lightning_eplb.parallel.dispatch.TokenDispatcher, or"
            " None for the fastest that runs here"
        )
    parameters = list(inspect.signature(dispatcher.dispatch).parameters)
    has_old = hasattr(dispatcher, "send_home") or parameters[1:3] == ["hidden_TD", "plan"]
    missing = sorted(getattr(dispatcher, "__abstractmethods__", ()))
    if has_old or missing:
        reason = "has methods of an earlier contract" if has_old else f"lacks {', '.join(missing)}"
        raise TypeError(
            f"dispatcher={dispatcher.__name__} {reason}. TokenDispatcher now has the methods {NEW_METHODS}; the"
            " exchange by all_to_all_single, whose bytes_in_parts can be set, is"
            " lightning_eplb.parallel.all_to_all.AllToAllDispatcher"
        )


def empty_index(weights_TK: Tensor) -> Tensor:
    """Return ids of no tokens, ``[0, K]`` int64, for a rank that joins a call of others."""
    return torch.empty(weights_TK.shape, dtype=torch.int64, device=weights_TK.device)
