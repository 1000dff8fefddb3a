"""Direct dispatch: ranks of a node write tokens straight into each other's memory.

A token crosses once to each rank that computes it, not once for each of its experts there. The destination copies it to
a row for each of them. On the way back a rank sums a token's outputs, and one sum crosses. Gradients take the same two
trips. Ids and routing weights go to all ranks, so tokens are sent before any rank knows the counts of the others. The
host waits once, for these counts, while tokens travel.

It runs where all of this holds, and elsewhere tokens go by ``all_to_all_single``:

=====================  ================================================================================
device                 CUDA, with Triton
ranks                  an EP group within one node, whose GPUs can access each other's memory
torch                  2.10 or newer, with symmetric memory
dtype                  float64, float32, bfloat16 or float16
strategy               any
call                   not while ranks may call layers unequally often, in evaluation with fewer batches on some
memory                 two regions of ``R * T * D`` elements for the longest batch, shared by all layers
=====================  ================================================================================

If replicas share the tokens of an expert, ranks exchange counts first, and then send slots in place of experts.

Ranks must call the same layers in the same order, forward and backward. Each trip carries the number of its layer and a
sequence number: the next forward pass raises if they differ. If a rank stays away, the others raise where their host
waits for it. In a backward pass no host waits: there the device stops after another minute, with a CUDA error
(unspecified launch failure) that names no layer.

Shape suffixes: ``T`` tokens, ``K`` top-k, ``M`` rows that this rank computes, ``L`` logical experts, ``R`` ranks, ``S``
slots of a rank, ``P`` slots of all ranks, ``D`` model width.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_eplb.parallel.all_to_all import AllToAllDispatcher, AllToAllHandle
from lightning_eplb.parallel.direct_autograd import (
    DISPATCH,
    Call,
    Combine,
    Dispatch,
    State,
    Trip,
    aligned,
    placed_of,
)
from lightning_eplb.parallel.dispatch import DispatchedRows, TokenBatch, TokenCounts, TokenDispatcher
from lightning_eplb.parallel.dispatch_plan import (
    DispatchPlan,
    Routing,
    assign_slots,
    gather_counts,
    plan_dispatch,
)
from lightning_eplb.parallel.groups import ExpertGroups
from lightning_eplb.parallel.packing import to_device
from lightning_eplb.parallel.permute import has_kernels
from lightning_eplb.parallel.symmetric_buffers import (
    ERROR_WORDS,
    HEADER_WORDS,
    Layout,
    SymmetricBuffers,
    SymmetricMemory,
    shared_buffers,
)

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of hidden states that kernels sum."""


class DirectDispatcher(TokenDispatcher):
    """Exchange of tokens through symmetric memory where that is possible, and by ``all_to_all_single`` elsewhere."""

    memory: Callable[..., Any] = SymmetricMemory
    """Class of the memory that ranks share."""

    def __init__(self, groups: ExpertGroups) -> None:
        super().__init__(groups)
        self.all_to_all = AllToAllDispatcher(groups)
        """Dispatcher for what can't be dispatched directly."""
        self.reason: str | None = "no batch came yet"
        """Why the last batch was not dispatched directly. ``None`` if it was."""
        self._buffers: SymmetricBuffers = None  # type: ignore[assignment]
        self._layer_id = 0
        self._slots_S: Tensor | None = None

    def __deepcopy__(self, memo: dict) -> "DirectDispatcher":
        return type(self)(self.groups)  # a copy of a layer is another layer in the same buffers

    def why_not(self, batch: TokenBatch) -> str | None:
        """Return why a batch can't be dispatched directly, for reasons that are the same on all ranks."""
        if not has_kernels(batch.hidden):
            return "tokens are not on a CUDA device with Triton"
        if len(set(self.groups.node_of_rank)) > 1:
            return "the EP group spans nodes"
        if batch.hidden.dtype not in DTYPES:
            return f"hidden states are {batch.hidden.dtype}"
        return None

    @property
    def is_direct(self) -> bool:
        """``True`` if the last batch was dispatched directly."""
        return self.reason is None

    @property
    def way(self) -> str:
        """Phrase for messages."""
        return "directly, through symmetric memory" if self.is_direct else f"{self.all_to_all.way}, as {self.reason}"

    @property
    def for_uneven_calls(self) -> TokenDispatcher:
        """Dispatcher by ``all_to_all_single``: ranks that join without tokens know no other rank's tokens."""
        return self.all_to_all

    def count(self, batch: TokenBatch, payload: int = 0) -> TokenCounts:
        """Send tokens, if their slots don't depend on counts, and wait for the counts of all ranks."""
        reason = self.why_not(batch) or self._prepare(batch)
        if reason is None and batch.slot_of_expert is None:
            counts, payloads_R = self._gather(batch, payload)
            max_tokens = int(counts.sum(axis=1).max()) // batch.top_k
            if (reason := self._fit(batch, max_tokens)) is None:
                self.reason = None
                return TokenCounts(counts[:, :-1], payloads_R, self, (max_tokens, None))
            self.reason = reason
            return TokenCounts(counts[:, :-1], payloads_R, self.all_to_all)
        while reason is None:
            trip = self._send(batch, batch.index, batch.slot_of_expert, self._all_slots(batch), payload)
            headers_R8, counts_RP = self._wait(batch)
            max_tokens = int(headers_R8[:, 2].max())
            if max_tokens <= trip.region.capacity:
                self.reason = None
                trip = self._expand(batch, trip, int(counts_RP[:, self._own_slots(batch)].sum()))
                return TokenCounts(_by_expert(counts_RP, batch), headers_R8[:, 3], self, (max_tokens, trip))
            reason = self._fit(batch, max_tokens)  # then all ranks send again
        self.reason = reason
        return self.all_to_all.count(batch, payload)

    def _gather(self, batch: TokenBatch, payload: int) -> tuple[np.ndarray, np.ndarray]:
        """Gather the pairs of each rank and expert, those of no expert last, and the payloads.

        The identity of the trip travels along, since ranks in different layers would send different weights next.
        """
        _, counts_L = batch.sorted_pairs
        without_expert = batch.index.numel() - counts_L.sum(dim=0, keepdim=True)
        identity = to_device(np.array(self._buffers.next_trip(self._layer_id, DISPATCH)), counts_L.device)
        counts, payloads_R = gather_counts(torch.cat((counts_L, without_expert, identity)), self.groups, payload)
        self._buffers.check(counts[:, -2:], self._report_values(batch)[-ERROR_WORDS:])
        return counts[:, :-2], payloads_R

    def divides_gradients(self, batch: TokenBatch) -> bool:
        """Divide gradients in the kernels that copy them, where that is exact: by a power of two, in a wide range."""
        size = self.groups.size
        return batch.experts_weigh and size & (size - 1) == 0 and batch.hidden.dtype != torch.float16

    def dispatch(self, batch: TokenBatch, routing: Routing, in_flight: Any = None) -> "_Handle":
        """Copy the tokens to rows, which were sent by :meth:`count`, or are sent now."""
        max_tokens, trip = in_flight
        if trip is None:
            slots_TK = assign_slots(routing, batch.sorted_pairs[0], batch.index.shape)
            trip = self._send(batch, slots_TK, None, to_device(routing.serving_order.astype(np.int32), slots_TK.device))
        num_own = int(routing.received[:, : routing.num_primaries].sum())
        call = Call(
            self._buffers,
            self._layer_id,
            routing.slots.shape[1],
            batch.top_k,
            max_tokens,
            num_own,
            int(routing.received.sum()) - num_own,
            not batch.experts_weigh,
            self.groups.size if self.divides_gradients(batch) else 1,
        )
        own_MD, others_MD, own_M, others_M = Dispatch.apply(call, trip, batch.hidden, batch.weights)
        return _Handle(batch, routing, call, trip.state, (own_MD, others_MD), (own_M, others_M))

    def receive(self, handle: "_Handle", part: int) -> tuple[DispatchedRows, DispatchedRows]:
        """Return the rows. The device has received them."""
        n = handle.routing.num_primaries
        ends = handle.state.ends[: len(handle.routing.serving_order)]
        other_ends = ends[n:] - handle.call.num_own if len(ends) > n else ends[n:]
        weights = (None, None) if handle.call.combine_weighs else handle.weights
        return (
            DispatchedRows(handle.rows[0], ends[:n], weights[0]),
            DispatchedRows(handle.rows[1], other_ends, weights[1]),
        )

    def send_back(self, handle: "_Handle", part: int, primaries_MD: Tensor, redundant_MD: Tensor) -> None:
        """Keep the outputs for :meth:`combine`."""
        if primaries_MD.shape[1] != redundant_MD.shape[1]:  # no redundant experts, and outputs of another width
            redundant_MD = primaries_MD.new_empty(0, primaries_MD.shape[1])
        handle.rows = primaries_MD, redundant_MD

    def combine(self, handle: "_Handle") -> Tensor:
        """Sum each token's outputs on every rank, and then the sums."""
        own_MD, others_MD = handle.rows
        row_bytes = own_MD.shape[1] * own_MD.element_size()
        if not self._buffers.fit(Layout(0, handle.call.top_k, row_bytes)):  # all ranks ask for the same
            raise RuntimeError(f"outputs of {handle.batch.layer} do not fit: {self._buffers.failure}")
        return Combine.apply(handle.call, handle.state, own_MD, others_MD, *handle.weights)

    def dispatch_argument(self, handle: "_Handle", rows_TC: Tensor) -> AllToAllHandle:
        """Send the rows of an argument by ``all_to_all_single``: their order is the same."""
        if handle.plan is None:
            handle.plan = plan_dispatch(handle.batch.sorted_pairs[0], handle.routing, math.inf)
        return self.all_to_all.send(handle.plan, rows_TC, handle.batch.weights)

    def receive_argument(self, handle: AllToAllHandle, part: int) -> tuple[Tensor, Tensor]:
        """Wait for the rows of an argument."""
        return self.all_to_all.receive_argument(handle, part)

    def _prepare(self, batch: TokenBatch) -> str | None:
        """Find the buffers, or create them. Return why that is not possible."""
        buffers = shared_buffers(self.groups, batch.hidden.device, self.memory)
        if buffers is not self._buffers:
            self._buffers, self._layer_id = buffers, buffers.register(batch.layer)
        if buffers.layout.capacity == 0 and buffers.failure is None:
            return self._fit(batch, max(buffers.gather(len(batch.hidden))))
        return self._fit(batch, 0)

    def _fit(self, batch: TokenBatch, max_tokens: int) -> str | None:
        """Make buffers large enough for batches of ``max_tokens``. Return why that is not possible."""
        row_bytes = batch.hidden.shape[1] * batch.hidden.element_size()
        self._buffers.fit(Layout(max_tokens, batch.top_k, row_bytes))
        return self._buffers.failure

    def _all_slots(self, batch: TokenBatch) -> Tensor:
        if self._slots_S is None or len(self._slots_S) != batch.slots.shape[1]:
            self._slots_S = torch.arange(batch.slots.shape[1], dtype=torch.int32, device=batch.hidden.device)
        return self._slots_S

    @torch.no_grad()
    def _send(
        self, batch: TokenBatch, index_TK: Tensor, table: Tensor | None, served_S: Tensor, payload: int = 0
    ) -> "Trip":
        """Send tokens, and place the pairs of all ranks. A batch that is too long sends its header only."""
        from lightning_eplb.parallel import direct_exchange

        buffers, slots_per_rank, tokens = self._buffers, batch.slots.shape[1], len(batch.hidden)
        region, header = buffers.start_trip(self._layer_id, DISPATCH, tokens, payload)
        num_sent = tokens if tokens <= region.capacity else 0
        report = buffers.report(batch.slots.size)
        hidden_TD = aligned(batch.hidden)
        slots_TK = direct_exchange.send(
            hidden_TD[:num_sent],
            index_TK[:num_sent].contiguous(),
            batch.weights[:num_sent].contiguous(),
            table,
            slots_per_rank,
            region,
            header,
            report.counts,
        )
        buffers.barrier()
        dtype, _ = direct_exchange.sum_dtype(hidden_TD)
        counted = direct_exchange.count_pairs(
            slots_per_rank, batch.top_k, region, header, report.device, buffers.errors
        )
        report.copy_to_host()
        placed = direct_exchange.place_pairs(served_S, slots_per_rank, batch.top_k, dtype, region, counted)
        return Trip(State(slots_TK, *placed), region)

    def _own_slots(self, batch: TokenBatch) -> slice:
        first = self.groups.rank * batch.slots.shape[1]
        return slice(first, first + batch.slots.shape[1])

    @torch.no_grad()
    def _expand(self, batch: TokenBatch, trip: "Trip", num_rows: int) -> "Trip":
        """Copy tokens to rows of primaries at once, so that the device is busy while the host goes on."""
        from lightning_eplb.parallel import direct_exchange

        placed = placed_of(trip.state)
        rows_MD = direct_exchange.expand(aligned(batch.hidden), 0, num_rows, placed, batch.top_k, trip.region)
        return trip._replace(rows=rows_MD)

    def _wait(self, batch: TokenBatch) -> tuple[np.ndarray, np.ndarray]:
        """Wait for headers and counts of all ranks, ``[R, 8]`` and ``[R, P]``."""
        self._buffers.wait(self._buffers.report(batch.slots.size).event, batch.layer)
        values, first = self._report_values(batch), self.groups.size * HEADER_WORDS
        headers_R8 = values[:first].reshape(self.groups.size, HEADER_WORDS)
        self._buffers.check(headers_R8[:, :2], values[-ERROR_WORDS:])
        return headers_R8, values[first:-ERROR_WORDS].reshape(self.groups.size, batch.slots.size)

    def _report_values(self, batch: TokenBatch) -> np.ndarray:
        return self._buffers.report(batch.slots.size).host.numpy().copy()


@dataclass(eq=False)
class _Handle:
    """State of a batch between dispatch and combine."""

    batch: TokenBatch
    routing: Routing
    call: Call
    state: State
    rows: tuple[Tensor, Tensor]
    weights: tuple[Tensor, Tensor]
    plan: DispatchPlan | None = None


def _by_expert(counts_RP: np.ndarray, batch: TokenBatch) -> np.ndarray:
    """Return counts of logical experts from those of slots."""
    expert_P = batch.slots.ravel()
    if len(expert_P) == batch.num_experts:  # no slot is empty
        counts_RL = np.empty_like(counts_RP)
        counts_RL[:, expert_P] = counts_RP
        return counts_RL
    counts_RL = np.zeros((len(counts_RP), batch.num_experts), dtype=np.int64)
    counts_RL[:, expert_P[expert_P >= 0]] = counts_RP[:, expert_P >= 0]
    return counts_RL
