"""Expert parallelism as textbooks have it: counts, sort, all-to-all, grouped products, all-to-all. And the products.

Shape suffixes: ``T`` tokens, ``K`` top-k, ``N`` token-expert pairs of this rank, ``M`` pairs that this rank computes,
``D`` model width, ``H`` expert hidden width, ``R`` ranks, ``n`` experts of a rank.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import grouped_mm, silu


class TextbookExperts(nn.Module):
    """SwiGLU experts over all ranks, for tokens ``[T, D]``, ids ``[T, K]`` and weights ``[T, K]``.

    Args:
        gate_up_proj: Of this rank's experts, ``[n, 2H, D]``.
        down_proj: Of this rank's experts, ``[n, D, H]``.
    """

    def __init__(self, gate_up_proj: Tensor, down_proj: Tensor) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Parameter(gate_up_proj), nn.Parameter(down_proj)

    def forward(self, hidden_TD: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Return ``[T, D]``, the weighted sums of the experts' outputs."""
        num_ranks, num_local = dist.get_world_size(), len(self.down_proj)
        experts_N = index_TK.flatten()
        order_N = torch.argsort(experts_N)
        sent_Rn = torch.bincount(experts_N, minlength=num_ranks * num_local).view(num_ranks, num_local)
        received_Rn = torch.empty_like(sent_Rn)
        dist.all_to_all_single(received_Rn, sent_Rn)
        sent_R, received_R = torch.stack([sent_Rn.sum(1), received_Rn.sum(1)]).tolist()

        sent_ND = hidden_TD.index_select(0, order_N // index_TK.shape[1])
        received_MD = _Exchange.apply(sent_ND, sent_R, received_R)
        expert_M = torch.arange(num_local, device=order_N.device).repeat(num_ranks)
        expert_M = expert_M.repeat_interleave(received_Rn.flatten(), output_size=sum(received_R))
        by_expert_M = torch.argsort(expert_M, stable=True)
        ends_n = received_Rn.sum(0).cumsum(0, dtype=torch.int32)
        output_MD = self._compute(received_MD.index_select(0, by_expert_M), ends_n)
        output_MD = output_MD.index_select(0, torch.argsort(by_expert_M))
        returned_ND = _Exchange.apply(output_MD, received_R, sent_R)

        pairs_TKD = returned_ND.index_select(0, torch.argsort(order_N)).view(*index_TK.shape, -1)
        return (pairs_TKD * weights_TK.unsqueeze(-1)).sum(dim=1)

    def _compute(self, rows_MD: Tensor, ends_n: Tensor) -> Tensor:
        hidden = grouped_mm(rows_MD, self.gate_up_proj.transpose(-2, -1), offs=ends_n)
        return grouped_mm(swiglu(hidden), self.down_proj.transpose(-2, -1), offs=ends_n)


class _Exchange(torch.autograd.Function):
    """Rows ordered by destination rank become rows ordered by source rank; gradients go the other way."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent_R: list[int], received_R: list[int]) -> Tensor:
        ctx.counts = sent_R, received_R
        received = rows.new_empty(sum(received_R), rows.shape[1])
        dist.all_to_all_single(received, rows.contiguous(), received_R, sent_R)
        return received

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        sent_R, received_R = ctx.counts
        returned = grads[0].new_empty(sum(sent_R), grads[0].shape[1])
        dist.all_to_all_single(returned, grads[0].contiguous(), sent_R, received_R)
        return returned, None, None


class Products:
    """The six grouped products of a layer's forward and backward alone, on as many rows as this rank computes.

    Args:
        gate_up_proj: Of this rank's experts, ``[n, 2H, D]``.
        down_proj: Of this rank's experts, ``[n, D, H]``.
        tokens_n: Rows of each expert.
    """

    def __init__(self, gate_up_proj: Tensor, down_proj: Tensor, tokens_n: Tensor) -> None:
        self.gate_up, self.down = gate_up_proj.detach(), down_proj.detach()
        self.ends = tokens_n.cumsum(0, dtype=torch.int32)
        shape = int(tokens_n.sum()), self.down.shape[1]
        # Values of the layer's own kind: a device that draws less power on some values computes them faster.
        self.input, self.grad = (torch.randn(shape, device=self.down.device).to(self.down.dtype) for _ in range(2))
        hidden = grouped_mm(self.input, self.gate_up.transpose(-2, -1), offs=self.ends).requires_grad_()
        self.activation = swiglu(hidden).detach()
        (self.grad_of_hidden,) = torch.autograd.grad(
            swiglu(hidden), hidden, grouped_mm(self.grad, self.down, offs=self.ends)
        )

    def __call__(self) -> None:
        """Compute two products forward, four backward; the results are dropped."""
        ends = self.ends
        grouped_mm(self.input, self.gate_up.transpose(-2, -1), offs=ends)
        grouped_mm(self.activation, self.down.transpose(-2, -1), offs=ends)
        grouped_mm(self.grad, self.down, offs=ends)
        grouped_mm(self.grad.t(), self.activation, offs=ends)
        grouped_mm(self.grad_of_hidden, self.gate_up, offs=ends)
        grouped_mm(self.grad_of_hidden.t(), self.input, offs=ends)


def swiglu(rows: Tensor) -> Tensor:
    """Gate one half of each row by the other: ``[M, 2H] -> [M, H]``."""
    gate, up = rows.chunk(2, dim=-1)
    return silu(gate) * up
