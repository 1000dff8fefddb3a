"""Load weights from disk into a model whose experts are spread over ranks."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_eplb import _compat
from lightning_eplb.checkpoint.conversion import Recipe, find_recipes, is_hugging_face
from lightning_eplb.checkpoint.local_parts import LocalPart, PartFinder, local_parts
from lightning_eplb.checkpoint.sources import Source, is_from_lightning, listed, open_checkpoint, read_json, whole_box
from lightning_eplb.parallel.materialize import (
    allocate,
    broadcast_replicated,
    clear_phantoms,
    initialize,
    memory_device,
    named_tensors,
)


def load_weights(model: nn.Module, path: str | Path, *, device: torch.device | str | None = None) -> nn.Module:
    """Load the weights of a checkpoint into a parallelized model, in place. Each rank reads its own part.

    That part is the experts of this rank, this rank's shard of tensors that ``fully_shard`` has sharded, and all other
    tensors whole. A model on the meta device gets memory for this part here. Call it on every rank, after
    ``parallelize_experts`` or ``fully_shard_moe`` and before the optimizer is made. It performs no communication
    to read the files.

    The checkpoint is the folder of a Hugging Face model, as for ``from_pretrained``. Names and tensors that differ from
    the model's, such as one tensor for each expert, are converted as in transformers. Or it is a file or folder of
    ``Trainer.save_checkpoint``, from any number of ranks: the weights of the ``LightningModule``, or of a module in it,
    are loaded and nothing else. Values are cast to the data types of the model.

    Example::

        def configure_model(self):
            if self.model is None:
                with torch.device("meta"):
                    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
                fully_shard_moe(model, self.device_mesh, num_redundant_experts=8)
                self.model = load_weights(model, folder)

    Args:
        model: Model of transformers, or any other whose state dict has the checkpoint's names.
        path: Folder of a model, or file or folder of a Lightning checkpoint. For a model on the hub, the result of
            ``huggingface_hub.snapshot_download(name)``.
        device: Device on which a model on the meta device gets memory, as in :func:`~lightning_eplb.materialize`.

    Returns:
        ``model``.

    Raises:
        ValueError: ``path`` is no such checkpoint, damaged or quantized; or its tensors are missing, left over, or of
            other shapes or kinds of numbers than the model's. The model is unchanged then, unless a shard is damaged
            inside, which is found while it is read.
    """
    device = memory_device(model, device)
    _check_unquantized(model, Path(path))
    held = local_parts(model)
    shapes = {name: part.shape for name, part in held.items()}
    with open_checkpoint(path) as sources:
        if is_from_lightning(path):
            recipes, left_over = _of_module(shapes, sources)
        else:
            recipes, left_over = find_recipes(model, shapes, sources)
        made = {name for recipe in recipes for name in recipe.targets}
        _check_complete(model, held, made, [*left_over, *sorted(made - set(shapes))], path)
        _check_kinds(recipes, held, sources, path)
        empty = allocate(model, device)
        held = local_parts(model)
        filled = {id(held[name].tensor) for name in made if name in held}
        left = {name for name, tensor in named_tensors(model).items() if name in empty and id(tensor) not in filled}
        initialize(model, left, device)
        clear_phantoms(model)
        broadcast_replicated(model, left & set(held))  # which a complete checkpoint may lack
        finder = PartFinder(model, shapes, sources)
        with torch.no_grad():
            for recipe in recipes:
                _fill(recipe, model, held, sources, finder)
    return model


def _fill(
    recipe: Recipe,
    model: nn.Module,
    held: Mapping[str, LocalPart],
    sources: Mapping[str, Source],
    finder: PartFinder,
) -> None:
    targets = {name: held[name] for name in recipe.targets if name in held}  # a model may ignore some
    shapes = {name: part.shape for name, part in held.items()}
    if recipe.conversion is None:
        for target in targets.values():
            for box, place in target.pieces():
                if all(part.start < part.stop for part in box):
                    target.local[place].copy_(sources[recipe.key].read(box))
        return
    experts = {target.rows for target in targets.values()}
    is_complete = len(targets) == len(recipe.targets)
    if recipe.by_expert is not None and is_complete and len(experts) == 1 and None not in experts:
        (rows,) = experts
        parts = finder.find(recipe, {name: target.box for name, target in targets.items()})
        for place, expert in enumerate(rows or ()):
            made = recipe.convert_expert(model, shapes, finder.read(recipe, expert, parts))
            for name, target in targets.items():
                target.local[place].copy_(made[name][0][target.box])
    else:
        tensors = {
            pattern: [sources[key].read(whole_box(sources[key].shape)) for key in keys]
            for pattern, keys in recipe.keys.items()
        }
        made = recipe.convert(model, shapes, tensors)
        for name, target in targets.items():
            for box, place in target.pieces():
                target.local[place].copy_(made[name][box])


def _of_module(shapes: Mapping[str, torch.Size], sources: Mapping[str, Source]) -> tuple[list[Recipe], list[str]]:
    """Match the names of a Lightning checkpoint: those of the state dict, or those behind the prefix of a module."""
    first = next(iter(shapes), "")
    prefixes = [key.removesuffix(first) for key in sources if key == first or key.endswith(f".{first}")]
    found = {prefix: sum(prefix + name in sources for name in shapes) for prefix in prefixes}
    best = [prefix for prefix, count in found.items() if count == max(found.values())]
    if len(best) > 1 and "" not in best:
        raise ValueError(
            f"path: the checkpoint has several modules like this one: {listed(best)}. Load the LightningModule that was"
            " saved."
        )
    prefix = best[0] if best and "" not in best else ""
    recipes = [
        Recipe(name, {name: [prefix + name]}, None, {name: shapes[name]}) for name in shapes if prefix + name in sources
    ]
    for recipe in recipes:
        saved = sources[recipe.key].shape
        if saved != shapes[recipe.name]:
            raise ValueError(
                f"{recipe.name} has shape {list(shapes[recipe.name])} in the model and {list(saved)} in the checkpoint"
                f" ({recipe.key}). Build the model like the saved one."
            )
    left_over = [key for key in sources if key.startswith(prefix) and key.removeprefix(prefix) not in shapes]
    return recipes, left_over


def _check_unquantized(model: nn.Module, path: Path) -> None:
    if (path / "config.json").is_file():
        settings: Any = read_json(path / "config.json").get("quantization_config")
    else:
        settings = getattr(getattr(model, "config", None), "quantization_config", None)
    if settings is not None:
        method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
        raise ValueError(
            f"path={str(path)!r} is quantized ({method}), which is not supported. Load it with"
            " from_pretrained(), which can dequantize it, and save that with save_pretrained()."
        )


def _check_kinds(
    recipes: Iterable[Recipe], held: Mapping[str, LocalPart], sources: Mapping[str, Source], path: str | Path
) -> None:
    """Raise ``ValueError`` if a cast would change numbers: from or to integers, complex or packed numbers."""
    wrong = {
        key: name
        for recipe in recipes
        for name in recipe.targets
        if name in held
        for key in recipe.all_keys
        if held[name].tensor.is_floating_point() != sources[key].is_floating_point
    }
    if wrong:
        name = next(iter(wrong.values()))
        raise ValueError(
            f"path={str(path)!r} has another kind of numbers (real, whole, complex or packed) than the model in"
            f" {listed(sorted(wrong))}: {name} is {str(held[name].tensor.dtype).removeprefix('torch.')}, and a cast"
            " would change it. Load quantized weights with from_pretrained(), which can dequantize them."
        )


def _check_complete(
    model: nn.Module, held: Mapping[str, LocalPart], made: set[str], left_over: Iterable[str], path: str | Path
) -> None:
    """Raise ``ValueError`` unless the checkpoint makes every tensor, under one of its names, and nothing else."""
    tensors = {id(held[name].tensor) for name in made if name in held}
    missing = {name for name, part in held.items() if id(part.tensor) not in tensors}
    unexpected = set(left_over)
    if is_hugging_face(model):
        missing, unexpected = _compat.without_ignored_keys(model, missing, unexpected)
    parts = [
        f"{what} {listed(sorted(names))}"
        for what, names in {"lacks": missing, "has, and the model has not,": unexpected}.items()
        if names
    ]
    if parts:
        inner = next((name for name, module in model.named_modules() if is_hugging_face(module)), "")
        if inner and not is_from_lightning(path):
            parts.append(f"is to be loaded into the model of transformers that is {inner} here, not into what has it")
        raise ValueError(f"path={str(path)!r} {' and '.join(parts)}. Use a model of the saved class and settings.")
