"""Gradients of experts that are on their way: sent as soon as the backward pass has them, behind what is left of it."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_eplb.parallel.rows import Route, RowsUnderway
from lightning_eplb.parallel.shards import local_shard


class GradientsUnderway:
    """One layer's gradients on the way of its primaries. All ranks of ``group`` use it alike.

    With each backward pass they are sent anew; what was sent by the last counts. Whatever changes a gradient afterwards
    (unscaling, an average over ranks, another tensor in its place) makes it void: :attr:`is_current` tells.

    Args:
        parameters: Of the layer. Their gradients must be accumulated by autograd, not by FSDP.
        route: Of the primaries.
        group: The ranks of the route; the same work travels on it in the same order on all of them.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], route: Route, group: dist.ProcessGroup) -> None:
        self._frozen = [parameter for parameter in parameters if not parameter.requires_grad]
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self._route, self._group = route, group
        self.num_sent = 0
        """How often this rank has sent them."""
        self._missing = len(self._parameters)
        self._rows: RowsUnderway | None = None
        self._sent: list[tuple[Tensor, int]] = []
        self._hooks = [p.register_post_accumulate_grad_hook(self._note) for p in self._parameters]

    @property
    def is_current(self) -> bool:
        """Whether the layer's gradients are those that were sent, as they were then."""
        if self._rows is None or any(parameter.grad is not None for parameter in self._frozen):
            return False
        grads = [parameter.grad for parameter in self._parameters]
        return len(grads) == len(self._sent) and all(
            grad is sent and sent._version == version for grad, (sent, version) in zip(grads, self._sent, strict=True)
        )

    def aim(self, gradients: Sequence[Tensor]) -> None:
        """Say what :meth:`write` writes to. The host prepares it, and waits for nothing."""
        assert self._rows is not None
        self._rows.aim([[gradient] for gradient in gradients])

    def write(self) -> None:
        """Wait for those that were sent and put them in place."""
        assert self._rows is not None
        self._rows.write()
        self.close()

    def close(self) -> None:
        """Send no more. What is under way is forgotten; its buffers are kept until it has arrived."""
        self._forget()
        self.abandon()

    def abandon(self) -> None:
        """Send no more, and don't wait for what is under way: some rank may never send its part."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._sent, self._rows = [], [], None

    def _forget(self) -> None:
        if self._rows is not None:
            self._rows.discard()
            self._rows = None

    def _note(self, _: Tensor) -> None:
        """Autograd has accumulated one more."""
        self._missing -= 1
        if self._missing:
            return
        self._missing = len(self._parameters)
        self._forget()
        grads = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        with torch.no_grad():
            stacks = [[local_shard(grad)] for grad in grads]
            self._rows = RowsUnderway(stacks, self._route, self._group, is_behind=True).send()
        self._sent = [(grad, grad._version) for grad in grads]
        self.num_sent += 1
