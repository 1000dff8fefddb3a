"""Which of a checkpoint's tensors become which of the model's, and how: decided before anything is read.

A checkpoint of a Hugging Face model may have other names and other tensors than the model, such as one tensor for each
expert. transformers knows how the ones become the others; here its conversions are asked what they would make, and
those that treat each expert by itself are found out, so that a rank needs to read its own experts only.
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
    """How one tensor of the model is made, or several together.

    Attributes:
        name: The tensor of the model; the first, if there are several.
        keys: The checkpoint's tensors, by the pattern of the conversion that they match.
        conversion: Of transformers. ``None``: the tensor is the checkpoint's.
        targets: What is made: shapes of the unmodified model's tensors, by name.
        by_expert: Whether a conversion makes row ``i`` of its targets from the ``i``-th of the keys of each pattern, or
            from row ``i`` of each key; else rows can't be made by themselves.
    """

    name: str
    keys: dict[str, list[str]] = field(default_factory=dict)
    conversion: Any = None
    targets: dict[str, torch.Size] = field(default_factory=dict)
    by_expert: Literal["keys", "rows"] | None = None

    @property
    def key(self) -> str:
        """The only key."""
        ((key,),) = self.keys.values()
        return key

    @property
    def all_keys(self) -> list[str]:
        return [key for keys in self.keys.values() for key in keys]

    def keys_of_expert(self, expert: int) -> dict[str, list[str]]:
        """What one expert is made from: tensors of its own, or all tensors that have it as a row."""
        if self.by_expert == "keys":
            return {pattern: [keys[expert]] for pattern, keys in self.keys.items()}
        return self.keys

    def convert(
        self, model: nn.Module, shapes: Mapping[str, torch.Size], tensors: Mapping[str, list[Tensor]]
    ) -> dict[str, Tensor]:
        """All experts, or all of a tensor that is no expert's, from the tensors of :attr:`keys`.

        Args:
            shapes: Of the unmodified model's state dict.
        """
        return self._convert(model, shapes, tensors)

    def convert_expert(
        self, model: nn.Module, shapes: Mapping[str, torch.Size], tensors: Mapping[str, list[Tensor]]
    ) -> dict[str, Tensor]:
        """One expert, as tensors ``[1, ...]``, from those of :meth:`keys_of_expert`, or from its row of each."""
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
    """Stands in for the model where a conversion looks at the shapes of parameters: this rank's are others."""

    def __init__(self, shapes: Mapping[str, torch.Size]) -> None:
        self._shapes = shapes

    def get_parameter(self, name: str) -> Tensor:
        return torch.empty(self._shapes[name], device="meta")


def find_recipes(
    model: nn.Module, shapes: Mapping[str, torch.Size], sources: Mapping[str, Source]
) -> tuple[list[Recipe], list[str]]:
    """How each of the model's tensors is made, and the checkpoint's names that are left over.

    Args:
        shapes: Of the unmodified model's state dict.

    Raises:
        ValueError: A conversion does not work on what the checkpoint has, or makes something of another shape.
    """
    recipes, left_over = _match(model, shapes, sources)
    for recipe in recipes:
        _foresee(recipe, model, shapes, sources)
    return recipes, left_over


def is_hugging_face(model: nn.Module) -> bool:
    """Whether it is a model of transformers, if that is in use at all."""
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
    """Fill in what the recipe makes, from shapes alone, and whether it makes each expert by itself."""
    on_meta = {
        pattern: [torch.empty(sources[key].shape, device="meta") for key in keys]
        for pattern, keys in recipe.keys.items()
    }
    if recipe.conversion is None:
        if len(recipe.all_keys) > 1:
            raise ValueError(f"{recipe.name} would be loaded from {' and '.join(recipe.all_keys)} alike")
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
                f" ({listed(recipe.all_keys)}); the model must be built by the checkpoint's configuration"
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
    """Classes as they were before ``fully_shard``: transformers finds conversions by the name of the class."""
    modules = [module for module in model.modules() if isinstance(module, FSDPModule) and is_hugging_face(module)]
    classes = [type(module) for module in modules]
    try:
        for module, sharded in zip(modules, classes, strict=True):
            _, module.__class__ = sharded.__bases__
        yield
    finally:
        for module, sharded in zip(modules, classes, strict=True):
            module.__class__ = sharded
