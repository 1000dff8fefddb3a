"""Autograd functions of direct dispatch: two trips forward, and the same two backward.

Tensors that the backward pass needs are private: nothing that is saved views a shared buffer. All ranks save as many
tensors, also without rows, since activation checkpointing ends a recomputation with the last of them.

Shape suffixes: ``T`` tokens, ``K`` top-k, ``M`` rows that this rank computes, ``D`` model width.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_eplb.parallel.symmetric_buffers import KINDS, Region, SymmetricBuffers

DISPATCH, COMBINE, COMBINE_BACKWARD, DISPATCH_BACKWARD = range(len(KINDS))


class State(NamedTuple):
    """Tensors of a batch that its backward pass needs, see :class:`direct_exchange.Placed`."""

    slots: Tensor
    pairs: Tensor
    weights: Tensor
    place: Tensor
    ends: Tensor
    stride: int


class Trip(NamedTuple):
    """Tensors of a batch, the regions of its trip, and rows of primaries that were copied before."""

    state: State
    region: Region
    rows: Tensor | None = None


class Call(NamedTuple):
    """Numbers of a batch.

    Attributes:
        buffers: Buffers of the group.
        layer: Number of the layer.
        slots_per_rank: Slots of a rank.
        top_k: Choices of a token.
        max_tokens: Most tokens of a rank.
        num_own: Rows of this rank's primaries.
        num_others: Rows of its redundant experts.
        combine_weighs: Rows are weighted when they are summed, and not by the experts.
        divisor: Number that gradients of outputs are divided by, and those of tokens and weights multiplied.
    """

    buffers: SymmetricBuffers
    layer: int
    slots_per_rank: int
    top_k: int
    max_tokens: int
    num_own: int
    num_others: int
    combine_weighs: bool
    divisor: int


class Dispatch(torch.autograd.Function):
    """Rows of tokens that have arrived. The backward pass sends the sum of a token's gradients, and its weights'."""

    @staticmethod
    def forward(ctx: Any, call: Call, trip: Trip, hidden_TD: Tensor, weights_TK: Tensor) -> tuple[Tensor, ...]:
        from lightning_eplb.parallel import direct_exchange

        state, hidden_TD, num_own, num_others = trip.state, aligned(hidden_TD), call.num_own, call.num_others
        ctx.call, ctx.stride, ctx.weights_dtype = call, state.stride, weights_TK.dtype
        placed = placed_of(state)
        own_MD = trip.rows
        if own_MD is None:
            own_MD = direct_exchange.expand(hidden_TD, 0, num_own, placed, call.top_k, trip.region)
        others_MD = direct_exchange.expand(hidden_TD, num_own, num_others, placed, call.top_k, trip.region)
        own_M, others_M = state.weights[: num_own + num_others].clone().split((num_own, num_others))
        ctx.save_for_backward(*state[:-1])
        if not ctx.needs_input_grad[2]:
            ctx.mark_non_differentiable(own_MD, others_MD)
        if not ctx.needs_input_grad[3]:
            ctx.mark_non_differentiable(own_M, others_M)
        return own_MD, others_MD, own_M, others_M

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from lightning_eplb.parallel import direct_exchange

        call, state = ctx.call, _restored(ctx.saved_tensors, ctx.stride)
        own_MD, others_MD, own_M, others_M = (aligned(grad) for grad in grads)
        region, header = call.buffers.start_trip(call.layer, DISPATCH_BACKWARD)
        direct_exchange.send_sums(
            (own_MD, others_MD),
            (own_M, others_M) if ctx.needs_input_grad[3] else None,
            False,
            call.max_tokens,
            placed_of(state),
            call.top_k,
            region,
            header,
            call.divisor,
        )
        call.buffers.barrier()
        weights_dtype = ctx.weights_dtype if ctx.needs_input_grad[3] else None
        grad_TD, grad_TK = direct_exchange.receive_sums(
            state.slots, call.slots_per_rank, own_MD, weights_dtype, region, header, call.buffers.errors
        )
        return None, None, grad_TD if ctx.needs_input_grad[2] else None, grad_TK


class Combine(torch.autograd.Function):
    """Sums of a token's outputs, weighted or not. The backward pass sends the token's gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        call: Call,
        state: State,
        own_MD: Tensor,
        others_MD: Tensor,
        own_M: Tensor,
        others_M: Tensor,
    ) -> Tensor:
        from lightning_eplb.parallel import direct_exchange

        ctx.call, ctx.stride = call, state.stride
        own_MD, others_MD = aligned(own_MD), aligned(others_MD)
        region, header = call.buffers.start_trip(call.layer, COMBINE)
        direct_exchange.send_sums(
            (own_MD, others_MD),
            None,
            call.combine_weighs,
            call.max_tokens,
            placed_of(state),
            call.top_k,
            region,
            header,
        )
        call.buffers.barrier()
        output_TD, _ = direct_exchange.receive_sums(
            state.slots, call.slots_per_rank, own_MD, None, region, header, call.buffers.errors
        )
        has_dot = call.combine_weighs and ctx.needs_input_grad[4]
        ctx.save_for_backward(*state[:-1], *((own_MD, others_MD) if has_dot else ()))
        return output_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from lightning_eplb.parallel import direct_exchange

        call, saved = ctx.call, ctx.saved_tensors  # recomputed here, if at all: before the trip starts
        state, outputs = _restored(saved, ctx.stride), saved[5:]
        grad_TD, placed = aligned(grads[0]), placed_of(state)
        region, header = call.buffers.start_trip(call.layer, COMBINE_BACKWARD)
        direct_exchange.send(grad_TD, state.slots, None, None, call.slots_per_rank, region, header)
        call.buffers.barrier()
        found = []
        for i, (first, length) in enumerate(((0, call.num_own), (call.num_own, call.num_others))):
            if call.combine_weighs:
                output_MD = outputs[i] if outputs else None
                found.append(
                    direct_exchange.expand_weighted(grad_TD, output_MD, first, length, placed, call.top_k, region)
                )
            else:
                rows_MD = direct_exchange.expand(grad_TD, first, length, placed, call.top_k, region, call.divisor)
                found.append((rows_MD, None))
        (own_MD, own_M), (others_MD, others_M) = found
        if not ctx.needs_input_grad[4]:
            own_M = others_M = None
        return None, None, own_MD, others_MD if ctx.needs_input_grad[3] else None, own_M, others_M


def _restored(saved: Sequence[Tensor], stride: int) -> State:
    """Return the state whose tensors a function saved first. Checkpointing lets them be unpacked only once."""
    slots, pairs, weights, place, ends = saved[:5]
    return State(slots, pairs, weights, place, ends, stride)


def placed_of(state: State) -> Any:
    from lightning_eplb.parallel.direct_exchange import Placed

    return Placed(*state[1:])


def aligned(rows: Tensor) -> Tensor:
    """Return contiguous rows at an address that vector instructions can read."""
    rows = rows.contiguous()
    return rows if rows.data_ptr() % 16 == 0 else rows.clone()
