"""Plan the conversion of a checkpoint's tensors to the model's, before anything is read.

A checkpoint of a Hugging Face model may have other names and other tensors than the model, such as one tensor for each
expert. transformers has the conversions. They are run on shapes here to find those that treat each expert by itself:
for these a rank reads its own experts only.
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from lightning_eplb.checkpoint.sources import Source, listed


@dataclass
class Recipe:
    """Conversion that makes one tensor of the model, or several together.

    Attributes:
        name: Name of the model's tensor, of the first if there are several.
        keys: Names of the checkpoint's tensors, by the pattern of the conversion that they match.
        conversion: Conversion of transformers. ``None`` takes the checkpoint's tensor as it is.
        targets: Shapes of the unmodified model's tensors that it makes, by name.
        by_expert: Source of row ``i`` of the targets: the ``i``-th key of each pattern (``"keys"``), or row ``i`` of
            each key (``"rows"``). ``None`` if rows can't be converted one by one.
    """

    name: str
    keys: dict[str, list[str]] = field(default_factory=dict)
    conversion: Any = None
    targets: dict[str, torch.Size] = field(default_factory=dict)
    by_expert: Literal["keys", "rows"] | None = None

    @property
    def key(self) -> str:
        """Name of the checkpoint's only tensor."""
        ((key,),) = self.keys.values()
        return key

    @property
    def all_keys(self) -> list[str]:
        return [key for keys in self.keys.values() for key in keys]

    def keys_of_expert(self, expert: int) -> dict[str, list[str]]:
        """Return the keys that one expert is made from: tensors of its own, or tensors with a row for it."""
        if self.by_expert == "keys":
            return {pattern: [keys[expert]] for pattern, keys in self.keys.items()}
        return self.keys

    def convert(
        self, model: nn.Module, shapes: Mapping[str, torch.Size], tensors: Mapping[str, list[Tensor]]
    ) -> dict[str, Tensor]:
        """Convert whole tensors.

        Args:
            model: Model whose configuration conversions may read.
            shapes: Shapes of the unmodified model's state dict, by name.
            tensors: Tensors of :attr:`keys`, by pattern.
        """
        return self._convert(model, shapes, tensors)

    def convert_expert(
        self, model: nn.Module, shapes: Mapping[str, torch.Size], tensors: Mapping[str, list[Tensor]]
    ) -> dict[str, Tensor]:
        """Convert one expert to tensors ``[1, ...]``, from those of :meth:`keys_of_expert` or its row of each."""
        return self._convert(model, {name: torch.Size((1, *shapes[name][1:])) for name in self.targets}, tensors)

    def _convert(
        self, model: nn.Module, shapes: Mapping[str, torch.Size], tensors: Mapping[str, list[Tensor]]
    ) -> dict[str, Tensor]:
        conversion = deepcopy(self.conversion)
        for pattern, of_pattern in tensors.items():
            for tensor in of_pattern:
                conversion.add_tensor(self.name, pattern, pattern, tensor)
        made = conversion.convert(self.name, model=_OfShapes(shapes), config=getattr(model, "config", None))
        return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in made.items()}


class _OfShapes:
    """Stand-in for the model with the unmodified shapes of parameters, which conversions read."""

    def __init__(self, shapes: Mapping[str, torch.Size]) -> None:
        self._shapes = shapes

    def get_parameter(self, name: str) -> Tensor:
        return torch.empty(self._shapes[name], device="meta")


def find_recipes(
    model: nn.Module, shapes: Mapping[str, torch.Size], sources: Mapping[str, Source]
) -> tuple[list[Recipe], list[str]]:
    """Return the conversions that make the model's tensors, and names of the checkpoint that none of them uses.

    Args:
        model: Model to fill.
        shapes: Shapes of the unmodified model's state dict, by name.
        sources: Tensors of the checkpoint, by name.

    Raises:
        ValueError: A conversion fails on the checkpoint's tensors, or makes a tensor of another shape.
    """
    recipes, left_over = _match(model, shapes, sources)
    for recipe in recipes:
        _foresee(recipe, model, shapes, sources)
    return recipes, left_over


def is_hugging_face(model: nn.Module) -> bool:
    """Return ``True`` for a model of transformers. Does not import transformers."""
    modeling = sys.modules.get("transformers.modeling_utils")
    return modeling is not None and isinstance(model, modeling.PreTrainedModel)


def _match(
    model: nn.Module, shapes: Mapping[str, torch.Size], sources: Mapping[str, Source]
) -> tuple[list[Recipe], list[str]]:
    if not is_hugging_face(model):
        recipes = [Recipe(name, {name: [name]}, None, {name: shapes[name]}) for name in shapes if name in sources]
        return recipes, [key for key in sources if key not in shapes]
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    with _without_sharded_classes(model):
        mapping = get_model_conversion_mapping(model)  # type: ignore[arg-type]
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    converter_of = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix = {"base_model_prefix": model.base_model_prefix, "meta_state_dict": dict(shapes)}
    made: dict[str, Recipe] = {}
    left_over = []
    for key in sorted(sources, key=dot_natural_key):  # the order in which a conversion takes experts
        name, pattern = rename_source_key(key, renamings, converters, **prefix)  # type: ignore[arg-type]
        if name not in shapes and key in shapes:
            name, pattern = rename_source_key(key, [], [], **prefix)  # type: ignore[arg-type]
        if name not in shapes:
            left_over.append(key)
            continue
        recipe = made.setdefault(name, Recipe(name, {}, converter_of.get(pattern) if pattern is not None else None))
        recipe.keys.setdefault(pattern if pattern is not None else name, []).append(key)
    return list(made.values()), left_over


def _foresee(recipe: Recipe, model: nn.Module, shapes: Mapping[str, torch.Size], sources: Mapping[str, Source]) -> None:
    """Fill in ``targets`` and ``by_expert`` of a recipe, from shapes alone."""
    on_meta = {
        pattern: [torch.empty(sources[key].shape, device="meta") for key in keys]
        for pattern, keys in recipe.keys.items()
    }
    if recipe.conversion is None:
        if len(recipe.all_keys) > 1:
            raise ValueError(f"{recipe.name} would be loaded from both {' and '.join(recipe.all_keys)}.")
        made = {recipe.name: on_meta[recipe.name][0]}
    else:
        try:
            made = recipe.convert(model, shapes, on_meta)
        except Exception as error:
            raise ValueError(
                f"{recipe.name} can't be made from {listed(recipe.all_keys)} of shapes"
                f" {sorted({tuple(sources[key].shape) for key in recipe.all_keys})}: {type(error).__name__}: {error}"
            ) from error
    for name, tensor in made.items():
        if name in shapes and tensor.shape != shapes[name]:
            raise ValueError(
                f"{name} has shape {list(shapes[name])} in the model and {list(tensor.shape)} in the checkpoint"
                f" ({listed(recipe.all_keys)}). Build the model with the checkpoint's configuration."
            )
    recipe.targets = {name: tensor.shape for name, tensor in made.items()}
    rows = {shape[0] for shape in recipe.targets.values() if len(shape)}
    if recipe.conversion is not None and len(rows) == 1:
        recipe.by_expert = _by_expert(recipe, rows.pop(), sources)


def _by_expert(recipe: Recipe, rows: int, sources: Mapping[str, Source]) -> Literal["keys", "rows"] | None:
    from transformers import core_model_loading as known

    operations = recipe.conversion.operations
    is_merged = isinstance(operations[0], known.MergeModulelist) and operations[0].dim == 0
    for operation in operations[is_merged:]:
        if isinstance(operation, (known.Concatenate, known.Chunk, known.Interleave)):
            dimensions = [operation.dim]
        elif isinstance(operation, known.Transpose):
            dimensions = [operation.dim0, operation.dim1]
        else:
            return None  # it may do anything
        if min(dimensions) < 1:
            return None
    if is_merged:
        return "keys" if all(len(keys) == rows for keys in recipe.keys.values()) else None
    return "rows" if all(sources[key].shape[:1] == (rows,) for key in recipe.all_keys) else None


@contextmanager
def _without_sharded_classes(model: nn.Module) -> Iterator[None]:
    """Undo ``fully_shard``'s change of classes for a while: transformers finds conversions by the class name."""
    modules = [module for module in model.modules() if isinstance(module, FSDPModule) and is_hugging_face(module)]
    classes = [type(module) for module in modules]
    try:
        for module, sharded in zip(modules, classes, strict=True):
            _, module.__class__ = sharded.__bases__
        yield
    finally:
        for module, sharded in zip(modules, classes, strict=True):
            module.__class__ = sharded
