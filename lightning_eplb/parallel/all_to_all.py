"""Dispatch and combine of tokens by ``all_to_all_single``: over NCCL or gloo, within a node or between nodes.

Shape suffixes: ``T`` tokens, ``K`` top-k, ``M`` pairs that this rank computes, ``C`` columns of an argument, ``D``
model width.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_eplb.parallel.dispatch import DispatchedRows, TokenBatch, TokenDispatcher
from lightning_eplb.parallel.dispatch_plan import DispatchPlan, Routing, plan_dispatch, split_in_parts
from lightning_eplb.parallel.permute import combine_pairs, copy_to_pairs, merge_rows, split_rows
from lightning_eplb.parallel.token_exchange import TokenExchange, receive_back, receive_part, send_part_back, send_parts

BYTES_IN_PARTS_WITHIN_NODE = 384 * 2**20
"""Bytes of tokens of the fullest rank from which on they travel in two parts, within a node. Measured between four H200
with NVLink: one layer, forward and backward, took 1.22 times as long in two parts with 96 MiB, 1.08 with 192 (the hosts
had more to launch), 0.98 with 384 and 0.99 with 768. Between quarters of an H100, whose exchanges are slower, it was
0.95 with 96."""

BYTES_IN_PARTS_BETWEEN_NODES = 64 * 2**20
"""The same between nodes. Estimated, not measured: their networks have about an eighth of NVLink's bandwidth."""


@dataclass(eq=False)
class AllToAllHandle:
    """State of one batch, or of one argument, between dispatch and combine.

    Attributes:
        plan: Plan of the batch.
        weights: Routing weights, ``[T, K]``.
        to_experts: Exchange that sends tokens to the experts.
        to_tokens: Exchange that returns the experts' outputs.
        anchors: Autograd anchor of each part, in the exchange that it is in.
    """

    plan: DispatchPlan
    weights: Tensor
    to_experts: TokenExchange
    to_tokens: TokenExchange
    anchors: list[Tensor]


class AllToAllDispatcher(TokenDispatcher):
    """Exchange of tokens over ``all_to_all_single``, on any device and between any ranks.

    It packs the pairs into one collective for dispatch and one for combine. Many pairs travel in two parts: one travels
    while the experts of the other compute.
    """

    @property
    def way(self) -> str:
        """Phrase for messages."""
        return "by all_to_all_single" if type(self) is AllToAllDispatcher else super().way

    @property
    def bytes_in_parts(self) -> float:
        """Bytes of tokens of the fullest rank from which on they travel in two parts. ``math.inf`` for never.

        Below, the second collective and the second product cost more than they hide. It must be the same on all ranks,
        or they wait for each other's parts.
        """
        is_within_node = len(set(self.groups.node_of_rank)) == 1
        return BYTES_IN_PARTS_WITHIN_NODE if is_within_node else BYTES_IN_PARTS_BETWEEN_NODES

    def parts(self, batch: TokenBatch, routing: Routing) -> list[slice]:
        """Return the primaries of one or two parts."""
        return split_in_parts(routing, self._pairs_in_parts(batch))

    def dispatch(self, batch: TokenBatch, routing: Routing, in_flight: Any = None) -> AllToAllHandle:
        """Send the tokens of this rank, all parts."""
        order_N, _ = batch.sorted_pairs
        plan = plan_dispatch(order_N, routing, self._pairs_in_parts(batch))
        return self.send(plan, batch.hidden, batch.weights)

    def receive(self, handle: AllToAllHandle, part: int) -> tuple[DispatchedRows, DispatchedRows]:
        """Wait for the tokens of a part."""
        plan = handle.plan.parts[part]
        primaries_MD, redundant_MD = self.receive_argument(handle, part)
        return DispatchedRows(primaries_MD, plan.primary_ends), DispatchedRows(redundant_MD, plan.copy_ends)

    def send_back(self, handle: AllToAllHandle, part: int, primaries_MD: Tensor, redundant_MD: Tensor) -> None:
        """Send the outputs of a part."""
        plan = handle.plan.parts[part]
        output_MD = merge_rows(primaries_MD, redundant_MD, plan.primary_rows, plan.copy_rows)
        handle.anchors[part] = send_part_back(handle.to_tokens, part, output_MD)

    def combine(self, handle: AllToAllHandle) -> Tensor:
        """Wait for the outputs of all parts, and sum those of each token, weighted."""
        returned_ND = receive_back(handle.to_tokens, handle.anchors)
        return combine_pairs(returned_ND, handle.weights, handle.plan.pairs)

    def dispatch_argument(self, handle: AllToAllHandle, rows_TC: Tensor) -> AllToAllHandle:
        """Send the rows of an argument, by exchanges of its own."""
        return self.send(handle.plan, rows_TC, handle.weights)

    def receive_argument(self, handle: AllToAllHandle, part: int) -> tuple[Tensor, Tensor]:
        """Wait for the rows of an argument."""
        received_MC, plan = receive_part(handle.to_experts, part, handle.anchors[part]), handle.plan.parts[part]
        return split_rows(received_MC, plan.primary_rows, plan.copy_rows)

    def send(self, plan: DispatchPlan, rows_TC: Tensor, weights_TK: Tensor) -> AllToAllHandle:
        """Send rows of tokens according to ``plan``."""
        assert self.groups.ep_group is not None
        counts = [part.send_counts for part in plan.parts], [part.recv_counts for part in plan.parts]
        to_experts, to_tokens = (TokenExchange(*counts, self.groups.ep_group) for _ in range(2))
        anchors = send_parts(to_experts, copy_to_pairs(rows_TC, plan.pairs, weights_TK.shape[1]))
        return AllToAllHandle(plan, weights_TK, to_experts, to_tokens, anchors)

    def _pairs_in_parts(self, batch: TokenBatch) -> float:
        return self.bytes_in_parts / (batch.hidden.shape[-1] * batch.hidden.element_size())
