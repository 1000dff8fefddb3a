"""A rank's part of the model's tensors, and the parts of a checkpoint's tensors that fill it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_eplb import _compat
from lightning_eplb.checkpoint.conversion import Recipe
from lightning_eplb.checkpoint.sources import Box, Source, whole_box
from lightning_eplb.parallel.dtensor import local_shard
from lightning_eplb.parallel.parallelize import layers_by_parameter


@dataclass(frozen=True)
class LocalPart:
    """Part of one of the unmodified model's tensors that a rank holds.

    Attributes:
        tensor: Parameter or buffer of the parallelized model.
        shape: Shape of the unmodified model's tensor.
        rows: Entries of dimension 0 on this rank, in its own order: logical ids of its primaries. ``None`` for a
            tensor that is not an expert's.
        box: This rank's part of the tensor; with ``rows``, of each row, without dimension 0.
    """

    tensor: Tensor
    shape: torch.Size
    rows: tuple[int, ...] | None
    box: Box

    def pieces(self) -> Iterator[tuple[Box, Box]]:
        """Yield parts of the unmodified model's tensor, with places in this rank's; runs of experts are one."""
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
        """Memory of the model that holds this rank's part."""
        return local_shard(self.tensor)


def local_parts(model: nn.Module) -> dict[str, LocalPart]:
    """Return this rank's part of the unmodified model's state dict, by name. Shared tensors appear under each name."""
    row_of_experts = layers_by_parameter(model)
    found = {}
    for name, tensor in _state(model):
        shape, box = tensor.shape, whole_box(tensor.shape)
        if isinstance(tensor, DTensor):
            box = _compat.local_box(shape, tensor.device_mesh, tensor.placements)
        layer = row_of_experts.get(id(tensor))
        if layer is None:
            found[name] = LocalPart(tensor, shape, None, box)
        else:
            whole = torch.Size((layer.num_logical_experts, *shape[1:]))
            found[name] = LocalPart(tensor, whole, tuple(layer.local_experts.tolist()), box[1:])
    return found


def _state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield names and tensors of the state dict without gathering, as ``state_dict()`` would on all ranks."""
    yield from model.named_parameters(remove_duplicate=False)
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in _compat.non_persistent_buffers(module):
                yield (f"{prefix}.{name}" if prefix else name), buffer


Parts = dict[str, list[Box]]
"""Smallest box with all used values of each tensor that one expert is converted from, by the conversion's pattern.

For an expert that is a row of a tensor, the box is that of the row, ``[1, ...]``."""


class PartFinder:
    """Finds the values of a checkpoint that a rank needs, once for all experts and layers of the same kind.

    A conversion that makes experts one by one only rearranges values. It is therefore run on indices in place of
    values, and the indices in its output tell the source of each value.

    Args:
        model: Model whose configuration conversions may read.
        shapes: Shapes of the unmodified model's state dict, by name.
        sources: Tensors of the checkpoint, by name.
    """

    def __init__(self, model: nn.Module, shapes: Mapping[str, torch.Size], sources: Mapping[str, Source]) -> None:
        self._model = model
        self._shapes = shapes
        self._sources = sources
        self._found: dict[tuple, Parts] = {}

    def find(self, recipe: Recipe, boxes: Mapping[str, Box]) -> Parts:
        """Return the parts of one expert's source tensors that this rank needs.

        Args:
            recipe: Conversion that makes experts one by one.
            boxes: This rank's part of one expert, by the name of the target tensor.
        """
        sizes = self._sizes(recipe)
        if all(box == whole_box(self._shapes[name][1:]) for name, box in boxes.items()):
            return {pattern: [whole_box(shape) for shape in shapes] for pattern, shapes in sizes.items()}
        alike = (id(recipe.conversion), repr(sizes), repr(list(boxes.values())))
        if alike not in self._found:
            self._found[alike] = self._trace(recipe, boxes, sizes)
        return self._found[alike]

    def read(self, recipe: Recipe, expert: int, parts: Parts) -> dict[str, list[Tensor]]:
        """Read one expert's tensors for :meth:`Recipe.convert_expert`. Only ``parts`` of them are initialized."""
        row = expert if recipe.by_expert == "rows" else None
        return {
            pattern: [self._read(key, row, part) for key, part in zip(keys, parts[pattern], strict=True)]
            for pattern, keys in recipe.keys_of_expert(expert).items()
        }

    def _sizes(self, recipe: Recipe) -> dict[str, list[torch.Size]]:
        def size(key: str) -> torch.Size:
            shape = self._sources[key].shape
            return torch.Size((1, *shape[1:])) if recipe.by_expert == "rows" else shape

        return {pattern: [size(key) for key in keys] for pattern, keys in recipe.keys_of_expert(0).items()}

    def _trace(self, recipe: Recipe, boxes: Mapping[str, Box], sizes: Mapping[str, list[torch.Size]]) -> Parts:
        numbered: dict[str, list[Tensor]] = {}
        start = 0
        for pattern, shapes in sizes.items():
            numbered[pattern] = []
            for shape in shapes:
                end = start + shape.numel()
                numbered[pattern].append(torch.arange(start, end, device="cpu").view(shape))
                start = end
        made = recipe.convert_expert(self._model, self._shapes, numbered)
        used = torch.cat([made[name][0][box].flatten() for name, box in boxes.items()])
        parts: Parts = {}
        start = 0
        for pattern, shapes in sizes.items():
            parts[pattern] = []
            for shape in shapes:
                end = start + shape.numel()
                of_source = used[(used >= start) & (used < end)] - start
                parts[pattern].append(_box_around(of_source, shape))
                start = end
        return parts

    def _read(self, key: str, row: int | None, part: Box) -> Tensor:
        source = self._sources[key]
        shape = source.shape if row is None else torch.Size((1, *source.shape[1:]))
        read = source.read(part if row is None else (slice(row, row + part[0].stop), *part[1:]))
        if read.shape == shape:
            return read
        tensor = read.new_empty(shape)
        tensor[part] = read
        return tensor


def _box_around(numbers: Tensor, shape: torch.Size) -> Box:
    """Return the smallest box of a tensor of ``shape`` that contains the entries at these flat indices."""
    if len(numbers) == 0:
        return tuple(slice(0, 0) for _ in shape)
    return tuple(slice(int(index.min()), int(index.max()) + 1) for index in torch.unravel_index(numbers, shape))
