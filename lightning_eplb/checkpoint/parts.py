"""Which parts of an expert's tensors in a checkpoint make the part of it that a rank holds, and how they are read."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_eplb.checkpoint.conversion import Recipe
from lightning_eplb.checkpoint.sources import Box, Source, whole_box

Parts = dict[str, list[Box]]
"""By the pattern of a conversion: of each tensor that one expert is made from, the smallest box with all that is used.
For an expert that is a row of a tensor, the box of that row, ``[1, ...]``."""


class PartFinder:
    """Finds the parts, once for all experts and layers that are alike.

    A conversion that makes experts one by one only puts values in other places. So it is done with numbers for values,
    and the numbers that arrive tell where the values come from.

    Args:
        model: Whose configuration conversions may look at.
        shapes: Of the unmodified model's state dict.
    """

    def __init__(self, model: nn.Module, shapes: Mapping[str, torch.Size], sources: Mapping[str, Source]) -> None:
        self._model = model
        self._shapes = shapes
        self._sources = sources
        self._found: dict[tuple, Parts] = {}

    def find(self, recipe: Recipe, boxes: Mapping[str, Box]) -> Parts:
        """
        Args:
            recipe: Makes experts one by one.
            boxes: The part that is held of one expert of each target.
        """
        sizes = self._sizes(recipe)
        if all(box == whole_box(self._shapes[name][1:]) for name, box in boxes.items()):
            return {pattern: [whole_box(shape) for shape in shapes] for pattern, shapes in sizes.items()}
        alike = (id(recipe.conversion), repr(sizes), repr(list(boxes.values())))
        if alike not in self._found:
            self._found[alike] = self._trace(recipe, boxes, sizes)
        return self._found[alike]

    def read(self, recipe: Recipe, expert: int, parts: Parts) -> dict[str, list[Tensor]]:
        """One expert's tensors, in which only ``parts`` hold anything: what :meth:`Recipe.convert_expert` takes."""
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
    """The smallest box of a tensor of ``shape`` with the entries of these numbers, counted as they lie in memory."""
    if len(numbers) == 0:
        return tuple(slice(0, 0) for _ in shape)
    return tuple(slice(int(index.min()), int(index.max()) + 1) for index in torch.unravel_index(numbers, shape))
