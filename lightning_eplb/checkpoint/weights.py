"""Weights from disk into a model whose experts are spread over ranks."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_eplb import _compat
from lightning_eplb.checkpoint.conversion import Recipe, find_recipes, is_hugging_face
from lightning_eplb.checkpoint.local_parts import Holding, holdings
from lightning_eplb.checkpoint.parts import PartFinder
from lightning_eplb.checkpoint.sources import Source, is_from_lightning, listed, open_checkpoint, read_json, whole_box
from lightning_eplb.parallel.materialize import (
    give_memory,
    initialize,
    memory_device,
    named_tensors,
    share_over_replicas,
)


def load_weights(model: nn.Module, path: str | Path, *, device: torch.device | str | None = None) -> nn.Module:
    """Fill a parallelized model with the weights of a checkpoint, in place. Each rank reads what it holds.

    Of expert layers that is the experts of this rank, of tensors that ``fully_shard`` cut this rank's shard, of all
    else the whole. A model that was built on the meta device gets its memory here, for no more than that. Call it after
    ``parallelize_experts`` or ``fully_shard_moe`` and before the optimizer is made, on every rank; each reads the files
    by itself.

    The checkpoint is the folder of a Hugging Face model, as ``from_pretrained`` takes it: names and tensors that differ
    from the model's, such as one tensor for each expert, are converted as transformers does it. Or it is a file or
    folder that ``Trainer.save_checkpoint`` has written, on however many ranks: then of a ``LightningModule``, or of a
    module in it, the weights are loaded and nothing else. Values are cast to the data types of the model.

    Example::

        def configure_model(self):
            if self.model is None:
                with torch.device("meta"):
                    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
                fully_shard_moe(model, self.device_mesh, num_redundant_experts=8)
                self.model = load_weights(model, folder)

    Args:
        model: A model of transformers, or any other whose state dict has the checkpoint's names.
        path: The folder, or the file of a Lightning checkpoint. For a model on the hub it is what
            ``huggingface_hub.snapshot_download(name)`` returns.
        device: Where a model on the meta device gets its memory, as in :func:`~lightning_eplb.materialize`.

    Returns:
        ``model``.

    Raises:
        ValueError: ``path`` is no such checkpoint, a damaged or a quantized one; or tensors are missing in it, are left
            over, or have other shapes or kinds of numbers than the model's. The model is as it was then, unless a shard
            is damaged inside: that is found as it is read.
    """
    device = memory_device(model, device)
    _check_unquantized(model, Path(path))
    held = holdings(model)
    shapes = {name: holding.shape for name, holding in held.items()}
    with open_checkpoint(path) as sources:
        if is_from_lightning(path):
            recipes, left_over = _of_module(shapes, sources)
        else:
            recipes, left_over = find_recipes(model, shapes, sources)
        made = {name for recipe in recipes for name in recipe.targets}
        _check_complete(model, held, made, [*left_over, *sorted(made - set(shapes))], path)
        _check_kinds(recipes, held, sources, path)
        empty = give_memory(model, device)
        held = holdings(model)
        filled = {id(held[name].tensor) for name in made if name in held}
        left = {name for name, tensor in named_tensors(model).items() if name in empty and id(tensor) not in filled}
        initialize(model, left, device)
        share_over_replicas(model, left & set(held))  # which a model may lack, and still be complete
        finder = PartFinder(model, shapes, sources)
        with torch.no_grad():
            for recipe in recipes:
                _fill(recipe, model, held, sources, finder)
    return model


def _fill(
    recipe: Recipe,
    model: nn.Module,
    held: Mapping[str, Holding],
    sources: Mapping[str, Source],
    finder: PartFinder,
) -> None:
    targets = {name: held[name] for name in recipe.targets if name in held}  # a model may leave some alone
    shapes = {name: holding.shape for name, holding in held.items()}
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
    """Of a ``LightningModule`` the state dict's own names, of a module in it those behind a prefix."""
    first = next(iter(shapes), "")
    prefixes = [key.removesuffix(first) for key in sources if key == first or key.endswith(f".{first}")]
    found = {prefix: sum(prefix + name in sources for name in shapes) for prefix in prefixes}
    best = [prefix for prefix, count in found.items() if count == max(found.values())]
    if len(best) > 1 and "" not in best:
        raise ValueError(
            f"path: the checkpoint has several modules like this one: {listed(best)}; load the LightningModule that was"
            " saved"
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
                f" ({recipe.key}); the model must be built as the one that was saved"
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
            f"path={str(path)!r} is quantized ({method}), and quantized weights are not loaded here; load it with"
            " from_pretrained(), which can dequantize it, and save_pretrained() it to a folder that this takes"
        )


def _check_kinds(
    recipes: Iterable[Recipe], held: Mapping[str, Holding], sources: Mapping[str, Source], path: str | Path
) -> None:
    """Raise ``ValueError`` where a cast would change numbers: between real ones and whole, complex or packed ones."""
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
            " would change it; quantized weights load with from_pretrained(), which can dequantize them"
        )


def _check_complete(
    model: nn.Module, held: Mapping[str, Holding], made: set[str], left_over: Iterable[str], path: str | Path
) -> None:
    """Raise ``ValueError`` unless each tensor is made under one of its names, and nothing else is."""
    tensors = {id(held[name].tensor) for name in made if name in held}
    missing = {name for name, holding in held.items() if id(holding.tensor) not in tensors}
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
        raise ValueError(
            f"path={str(path)!r} {' and '.join(parts)}; the model must be of the class and settings that were saved"
        )
