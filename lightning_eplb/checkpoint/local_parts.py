"""Which part of the unmodified model's tensors this rank holds."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_eplb import _compat
from lightning_eplb.checkpoint.sources import Box, whole_box
from lightning_eplb.parallel.convert import expert_layers
from lightning_eplb.parallel.shards import local_shard


@dataclass(frozen=True)
class Holding:
    """This rank's part of a tensor of the unmodified model.

    Attributes:
        tensor: The model's parameter or buffer.
        shape: Of the unmodified model's.
        rows: The entries of dimension 0 that are here, in their order here: the experts of this rank's primaries.
            ``None`` for what is no expert's.
        box: The part that is here; with ``rows``, of each of these, without dimension 0.
    """

    tensor: Tensor
    shape: torch.Size
    rows: tuple[int, ...] | None
    box: Box

    def pieces(self) -> Iterator[tuple[Box, Box]]:
        """Parts of the unmodified model's tensor, and where each is in this rank's: runs of successive experts."""
        if self.rows is None:
            yield self.box, tuple(slice(0, part.stop - part.start) for part in self.box)
            return
        behind = tuple(slice(0, part.stop - part.start) for part in self.box)
        start = 0
        for end in range(1, len(self.rows) + 1):
            if end == len(self.rows) or self.rows[end] != self.rows[end - 1] + 1:
                run = slice(self.rows[start], self.rows[start] + end - start)
                yield (run, *self.box), (slice(start, end), *behind)
                start = end

    @property
    def local(self) -> Tensor:
        """This rank's part, in the model's own memory."""
        return local_shard(self.tensor)


def holdings(model: nn.Module) -> dict[str, Holding]:
    """What of the unmodified model's state dict this rank holds, by name; tensors that are shared under each name."""
    row_of_experts = {
        id(parameter): layer for layer, module in expert_layers(model) for parameter in module.parameters(recurse=False)
    }
    found = {}
    for name, tensor in _state(model):
        shape, box = tensor.shape, whole_box(tensor.shape)
        if isinstance(tensor, DTensor):
            box = _compat.local_box(shape, tensor.device_mesh, tensor.placements)
        layer = row_of_experts.get(id(tensor))
        if layer is None:
            found[name] = Holding(tensor, shape, None, box)
        else:
            whole = torch.Size((layer.num_logical_experts, *shape[1:]))
            found[name] = Holding(tensor, whole, tuple(layer.local_experts.tolist()), box[1:])
    return found


def _state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What is in the model's state dict, which only all ranks together could make."""
    yield from model.named_parameters(remove_duplicate=False)
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in _compat.non_persistent_buffers(module):
                yield (f"{prefix}.{name}" if prefix else name), buffer
