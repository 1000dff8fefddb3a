"""Rows of tokens to other ranks and back, in parts: one part travels while another is computed.

There are two journeys, and the backward pass of each is the other: :func:`send_out` and :func:`receive_part` take rows
of one tensor into a tensor for each part; :func:`send_part_back` and :func:`receive_back` take these into one. What
sends returns a ticket, an empty tensor that what receives is given: by it the backward pass finds its way, in which
what received sends gradients off and what sent waits for them.

A forward pass sends all parts out, and then receives, computes and sends back one after the other. Autograd runs first
what was called last: so the gradients of a part travel while those of a later one are computed.

Shape suffixes: ``N`` rows of this rank, ``M`` rows that it is sent, of one part; ``D`` model width.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


class PartsUnderway:
    """One journey of rows, and its gradients' journey. All ranks of ``group`` do the same with it, in the same order.

    Args:
        send_counts: For each part the rows that go to each rank, ``[R]``; parts lie one behind the other in this
            rank's rows, and so do within a part the rows of each rank.
        recv_counts: For each part the rows that come from each rank, ``[R]``.
        group: The ranks.
    """

    def __init__(
        self, send_counts: Sequence[list[int]], recv_counts: Sequence[list[int]], group: dist.ProcessGroup
    ) -> None:
        self._send_counts, self._recv_counts, self._group = send_counts, recv_counts, group
        self.num_parts = len(send_counts)
        self._rows = [sum(counts) for counts in send_counts]
        self._arriving: dict[int, tuple[Tensor, dist.Work | None]] = {}
        self._coming_back: tuple[Tensor, list[dist.Work]] | None = None

    def send_out(self, rows_ND: Tensor, parts: Sequence[int]) -> None:
        """Send all parts off, in the order that is given."""
        sent = rows_ND.contiguous().split(self._rows)
        for part in parts:
            received_MD = rows_ND.new_empty(sum(self._recv_counts[part]), *rows_ND.shape[1:])
            work = self._exchange(received_MD, sent[part], self._recv_counts[part], self._send_counts[part])
            self._arriving[part] = received_MD, work

    def receive_part(self, part: int) -> Tensor:
        """Wait for a part, ``[M, D]``, from the ranks in order."""
        received_MD, work = self._arriving.pop(part)
        if work is not None:
            work.wait()
        return received_MD

    def send_part_back(self, part: int, rows_MD: Tensor) -> None:
        """Send a part off; the other way."""
        if self._coming_back is None:
            self._coming_back = rows_MD.new_empty(sum(self._rows), *rows_MD.shape[1:]), []
        back_ND, works = self._coming_back
        received = back_ND.split(self._rows)[part]
        work = self._exchange(received, rows_MD.contiguous(), self._send_counts[part], self._recv_counts[part])
        if work is not None:
            works.append(work)

    def receive_back(self) -> Tensor:
        """Wait for all parts, ``[N, D]``."""
        assert self._coming_back is not None
        (back_ND, works), self._coming_back = self._coming_back, None
        for work in works:
            work.wait()
        return back_ND

    def _exchange(
        self, received: Tensor, sent: Tensor, recv_counts: list[int], send_counts: list[int]
    ) -> dist.Work | None:
        return dist.all_to_all_single(
            received, sent, recv_counts, send_counts, group=self._group, async_op=self.num_parts > 1
        )


def send_out(parts: PartsUnderway, rows_ND: Tensor) -> list[Tensor]:
    """Send all parts of ``rows_ND`` to the ranks that they are for. Returns a ticket for each part."""
    return list(_SendOut.apply(parts, rows_ND))


def receive_part(parts: PartsUnderway, part: int, ticket: Tensor) -> Tensor:
    """Wait for the rows of a part, ``[M, D]``, in the order of their source ranks."""
    return _ReceivePart.apply(parts, part, ticket)


def send_part_back(parts: PartsUnderway, part: int, rows_MD: Tensor) -> Tensor:
    """Send the rows of a part to the ranks that they are for, which is where those of :func:`send_out` came from."""
    return _SendPartBack.apply(parts, part, rows_MD)


def receive_back(parts: PartsUnderway, tickets: Sequence[Tensor]) -> Tensor:
    """Wait for all parts' rows, ``[N, D]``, each where :func:`send_out` would have taken it from.

    Args:
        parts: What travelled.
        tickets: Of all parts, in order.
    """
    return _ReceiveBack.apply(parts, *tickets)


class _SendOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parts: PartsUnderway, rows_ND: Tensor) -> tuple[Tensor, ...]:
        ctx.parts = parts
        parts.send_out(rows_ND, range(parts.num_parts))
        return tuple(rows_ND.new_empty(0) for _ in range(parts.num_parts))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, ctx.parts.receive_back()


class _ReceivePart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parts: PartsUnderway, part: int, ticket: Tensor) -> Tensor:
        ctx.parts, ctx.part = parts, part
        return parts.receive_part(part)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_MD,) = grads
        ctx.parts.send_part_back(ctx.part, grad_MD)
        return None, None, grad_MD.new_empty(0)


class _SendPartBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parts: PartsUnderway, part: int, rows_MD: Tensor) -> Tensor:
        ctx.parts, ctx.part = parts, part
        parts.send_part_back(part, rows_MD)
        return rows_MD.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, ctx.parts.receive_part(ctx.part)


class _ReceiveBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parts: PartsUnderway, *tickets: Tensor) -> Tensor:
        ctx.parts = parts
        return parts.receive_back()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_ND,), parts = grads, ctx.parts
        parts.send_out(grad_ND, range(parts.num_parts - 1, -1, -1))  # the last part's experts are the first to go on
        return None, *(grad_ND.new_empty(0) for _ in range(parts.num_parts))
