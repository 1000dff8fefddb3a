"""Autograd nodes that tie tensors together, so that every rank enters the same collectives in the backward pass."""

from typing import Any

import torch
from torch import Tensor


class TieOutput(torch.autograd.Function):
    """Output tied to tensors that it does not depend on, so that every rank enters their backward collectives.

    They get gradients of zeros. DDP waits for a gradient of each shared parameter from every rank. An undefined
    gradient could run on autograd's CPU thread, ahead of what this rank's device is to do before.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, *tensors: Tensor) -> Tensor:
        ctx.tensors = tensors
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        needed = zip(ctx.tensors, ctx.needs_input_grad[1:], strict=True)
        return grads[0], *(torch.zeros_like(tensor) if is_needed else None for tensor, is_needed in needed)


class TieGradients(torch.autograd.Function):
    """Identity of tensors, of which all get a gradient once one does."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return grads
