"""Dispatch and combine of tokens across EP ranks.

Shape suffixes: ``N`` token-expert pairs of this rank (tokens times top-k), ``M`` pairs that this rank computes, ``T``
tokens, ``K`` top-k, ``R`` ranks, ``D`` model width.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_eplb.parallel.dispatch_plan import DispatchPlan
from lightning_eplb.parallel.groups import ExpertGroups
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
class DispatchHandle:
    """State of one batch between :meth:`TokenDispatcher.dispatch` and :meth:`TokenDispatcher.combine`.

    Attributes:
        plan: Plan of the batch.
        to_experts: Exchange that sends tokens to the experts.
        to_tokens: Exchange that returns the experts' outputs.
        anchors: Autograd anchor of each part, in the exchange that it is in.
    """

    plan: DispatchPlan
    to_experts: TokenExchange
    to_tokens: TokenExchange
    anchors: list[Tensor]


class TokenDispatcher:
    """Exchange of tokens over ``all_to_all_single``. Subclass it for another transport.

    Pass the subclass as ``parallelize_experts(dispatcher=...)``. A converted layer calls :meth:`dispatch`, then for
    each of ``plan.parts`` :meth:`receive`, its experts and :meth:`send_home`, then :meth:`combine`. All ranks of the EP
    group call them, also ranks without tokens. Autograd runs the reverse in the backward pass.

    The assignment of pairs to slots is decided before and is the same on all ranks: it is the ``plan``, whose parts
    name the pairs for each slot in ``sent``. The other methods get the return value of :meth:`dispatch`, which can be
    anything, as ``handle``. All methods must be differentiable in their tensors, the routing weights included, and must
    not synchronize with the device.

    This class packs the pairs into one collective for dispatch and one for combine. Many pairs travel in two parts:
    one travels while the experts of the other compute.

    Args:
        groups: Process groups of the layer. ``groups.ep_group`` are the ranks that share its experts.
    """

    def __init__(self, groups: ExpertGroups) -> None:
        self.groups = groups

    @property
    def bytes_in_parts(self) -> float:
        """Bytes of tokens of the fullest rank from which on they travel in two parts. ``math.inf`` for never.

        Below, the second collective and the second product cost more than they hide. It must be the same on all ranks,
        or they wait for each other's parts.
        """
        is_within_node = len(set(self.groups.node_of_rank)) == 1
        return BYTES_IN_PARTS_WITHIN_NODE if is_within_node else BYTES_IN_PARTS_BETWEEN_NODES

    def dispatch(self, hidden_TD: Tensor, plan: DispatchPlan, top_k: int) -> Any:
        """Send the tokens of this rank, all parts. Return the handle.

        An extra argument of the experts' call that has a row for each token has a dispatch and a handle of its own. It
        may have any width, in a floating dtype or as uint8. Its handle ends with :meth:`receive`, in the order of the
        tokens.
        """
        assert self.groups.ep_group is not None
        counts = [part.send_counts for part in plan.parts], [part.recv_counts for part in plan.parts]
        to_experts, to_tokens = (TokenExchange(*counts, self.groups.ep_group) for _ in range(2))
        anchors = send_parts(to_experts, copy_to_pairs(hidden_TD, plan.pairs, top_k))
        return DispatchHandle(plan, to_experts, to_tokens, anchors)

    def receive(self, handle: Any, part: int) -> tuple[Tensor, Tensor]:
        """Wait for the tokens of a part that this rank computes.

        Returns:
            Rows for the primaries and rows for the redundant experts, in the order of the part's ``primary_ends`` and
            ``copy_ends``. Within an expert their order is the same whenever the same counts are dispatched.
        """
        received_MD, plan = receive_part(handle.to_experts, part, handle.anchors[part]), handle.plan.parts[part]
        return split_rows(received_MD, plan.primary_rows, plan.copy_rows)

    def send_home(self, handle: Any, part: int, primaries_MD: Tensor, copies_MD: Tensor) -> None:
        """Send the experts' outputs for the rows that :meth:`receive` returned, in the same order."""
        plan = handle.plan.parts[part]
        output_MD = merge_rows(primaries_MD, copies_MD, plan.primary_rows, plan.copy_rows)
        handle.anchors[part] = send_part_back(handle.to_tokens, part, output_MD)

    def combine(self, handle: Any, weights_TK: Tensor) -> Tensor:
        """Wait for the outputs of all parts, and sum those of each token, weighted.

        Args:
            handle: Return value of :meth:`dispatch`.
            weights_TK: Routing weights in any floating dtype.

        Returns:
            ``[T, D]`` in the outputs' dtype.
        """
        return combine_pairs(receive_back(handle.to_tokens, handle.anchors), weights_TK, handle.plan.pairs)
