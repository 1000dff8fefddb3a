"""All-to-all of token rows in parts, with gradients: one part travels while the experts of another compute.

A :class:`TokenExchange` goes one way in the forward pass and the other way in the backward pass. :func:`send_parts` and
:func:`receive_part` turn rows of one tensor into a tensor for each part, :func:`send_part_back` and
:func:`receive_back` turn these into one. Sending functions return an autograd anchor, an empty tensor, which receiving
functions take. It links the two in the autograd graph: in the backward pass the receiver sends the gradients, and the
sender waits for them.

The forward pass sends all parts, then receives, computes and returns one after the other. Autograd runs first what was
called last, so that the gradients of a part travel while those of a later part are computed.

Shape suffixes: ``N`` rows of this rank, ``M`` rows of one part that this rank receives, ``D`` model width.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


class TokenExchange:
    """Exchange of rows in parts, there and back. All ranks of ``group`` call its methods in the same order.

    Args:
        send_counts: Rows for each rank, ``[R]``, of each part. This rank's rows are ordered by part, and within a part
            by rank.
        recv_counts: Rows from each rank, ``[R]``, of each part.
        group: Process group of the ranks.
    """

    def __init__(
        self, send_counts: Sequence[list[int]], recv_counts: Sequence[list[int]], group: dist.ProcessGroup
    ) -> None:
        self._send_counts, self._recv_counts, self._group = send_counts, recv_counts, group
        self.num_parts = len(send_counts)
        self._rows = [sum(counts) for counts in send_counts]
        self._in_flight: dict[int, tuple[Tensor, dist.Work | None]] = {}
        self._returning: tuple[Tensor, list[dist.Work]] | None = None

    def send_parts(self, rows_ND: Tensor, parts: Sequence[int]) -> None:
        """Send all parts in the given order."""
        sent = rows_ND.contiguous().split(self._rows)
        for part in parts:
            received_MD = rows_ND.new_empty(sum(self._recv_counts[part]), *rows_ND.shape[1:])
            work = self._exchange(received_MD, sent[part], self._recv_counts[part], self._send_counts[part])
            self._in_flight[part] = received_MD, work

    def receive_part(self, part: int) -> Tensor:
        """Wait for a part, ``[M, D]``, ordered by source rank."""
        received_MD, work = self._in_flight.pop(part)
        if work is not None:
            work.wait()
        return received_MD

    def send_part_back(self, part: int, rows_MD: Tensor) -> None:
        """Return a part to its source ranks."""
        if self._returning is None:
            self._returning = rows_MD.new_empty(sum(self._rows), *rows_MD.shape[1:]), []
        returned_ND, works = self._returning
        received = returned_ND.split(self._rows)[part]
        work = self._exchange(received, rows_MD.contiguous(), self._send_counts[part], self._recv_counts[part])
        if work is not None:
            works.append(work)

    def receive_back(self) -> Tensor:
        """Wait until all parts have returned, ``[N, D]``."""
        assert self._returning is not None
        (returned_ND, works), self._returning = self._returning, None
        for work in works:
            work.wait()
        return returned_ND

    def _exchange(
        self, received: Tensor, sent: Tensor, recv_counts: list[int], send_counts: list[int]
    ) -> dist.Work | None:
        return dist.all_to_all_single(
            received, sent, recv_counts, send_counts, group=self._group, async_op=self.num_parts > 1
        )


def send_parts(exchange: TokenExchange, rows_ND: Tensor) -> list[Tensor]:
    """Send all parts of ``rows_ND`` to their ranks. Return the anchor of each part."""
    return list(_SendParts.apply(exchange, rows_ND))


def receive_part(exchange: TokenExchange, part: int, anchor: Tensor) -> Tensor:
    """Wait for the rows of a part, ``[M, D]``, ordered by source rank."""
    return _ReceivePart.apply(exchange, part, anchor)


def send_part_back(exchange: TokenExchange, part: int, rows_MD: Tensor) -> Tensor:
    """Return the rows of a part to the ranks that :func:`send_parts` took them from. Return the part's anchor."""
    return _SendPartBack.apply(exchange, part, rows_MD)


def receive_back(exchange: TokenExchange, anchors: Sequence[Tensor]) -> Tensor:
    """Wait for the rows of all parts, ``[N, D]``, in the order in which :func:`send_parts` takes them.

    Args:
        exchange: Exchange of the rows.
        anchors: Anchors of all parts, in order.
    """
    return _ReceiveBack.apply(exchange, *anchors)


class _SendParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: TokenExchange, rows_ND: Tensor) -> tuple[Tensor, ...]:
        ctx.exchange = exchange
        exchange.send_parts(rows_ND, range(exchange.num_parts))
        return tuple(rows_ND.new_empty(0) for _ in range(exchange.num_parts))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, ctx.exchange.receive_back()


class _ReceivePart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: TokenExchange, part: int, anchor: Tensor) -> Tensor:
        ctx.exchange, ctx.part = exchange, part
        return exchange.receive_part(part)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_MD,) = grads
        ctx.exchange.send_part_back(ctx.part, grad_MD)
        return None, None, grad_MD.new_empty(0)


class _SendPartBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: TokenExchange, part: int, rows_MD: Tensor) -> Tensor:
        ctx.exchange, ctx.part = exchange, part
        exchange.send_part_back(part, rows_MD)
        return rows_MD.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, ctx.exchange.receive_part(ctx.part)


class _ReceiveBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: TokenExchange, *anchors: Tensor) -> Tensor:
        ctx.exchange = exchange
        return exchange.receive_back()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_ND,), exchange = grads, ctx.exchange
        exchange.send_parts(
            grad_ND, range(exchange.num_parts - 1, -1, -1)
        )  # the experts of the last part compute first
        return None, *(grad_ND.new_empty(0) for _ in range(exchange.num_parts))
