"""Conversions of transformers: one expert by itself is a row of all experts together, or it is not asked for."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import core_model_loading as hf

from lightning_eplb.checkpoint import conversion
from lightning_eplb.checkpoint.conversion import Recipe
from lightning_eplb.checkpoint.local_parts import PartFinder
from lightning_eplb.checkpoint.sources import whole_box

GATE, UP = "experts.*.gate.weight", "experts.*.up.weight"
STACKED = "experts.gate_and_up"
TARGET = "layers.0.experts.gate_up_proj"

# What each conversion takes, and whether it makes experts one by one.
CONVERSIONS: dict[str, tuple[list[str], list[Any], str | None]] = {
    "merged": ([GATE], [hf.MergeModulelist(0)], "keys"),
    "merged and fused": ([GATE, UP], [hf.MergeModulelist(0), hf.Concatenate(1)], "keys"),
    "merged and transposed": ([GATE], [hf.MergeModulelist(0), hf.Transpose(1, 2)], "keys"),
    "merged and interleaved": ([GATE, UP], [hf.MergeModulelist(0), hf.Concatenate(1), hf.Interleave(1)], "keys"),
    "transposed": ([STACKED], [hf.Transpose(1, 2)], "rows"),
    "transposed if need be": ([STACKED], [hf.Transpose(1, 2, check_dims=True)], "rows"),
    "interleaved": ([STACKED], [hf.Interleave(1)], "rows"),
    "interleaved experts": ([STACKED], [hf.Interleave(0)], None),
    "merged behind": ([GATE], [hf.MergeModulelist(1)], None),
    "merged and swapped": ([GATE], [hf.MergeModulelist(0), hf.Transpose(0, 1)], None),
    "two stacks after each other": (["experts.a", "experts.b"], [hf.Concatenate(0)], None),
}


def checkpoint(patterns: list[str], experts: int, width: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for pattern in patterns:
        if "*" in pattern:
            for expert in range(experts):
                tensors[f"layers.0.{pattern.replace('*', str(expert))}"] = torch.rand(4, width, generator=generator)
        else:
            tensors[f"layers.0.{pattern}"] = torch.rand(experts, 4, width, generator=generator)
    return tensors


def recipe_for(name: str, tensors: dict[str, Tensor]) -> Recipe:
    patterns, operations, _ = CONVERSIONS[name]
    converter = hf.WeightConverter(list(patterns), "experts.gate_up_proj", operations)
    recipe = Recipe(TARGET, {}, converter)
    for key in sorted(tensors, key=hf.dot_natural_key):
        _, pattern = converter.rename_source_key(key)
        assert pattern is not None
        recipe.keys.setdefault(pattern, []).append(key)
    return recipe


def whole_of(recipe: Recipe, tensors: dict[str, Tensor], shapes: dict[str, torch.Size]) -> Tensor:
    read = {pattern: [tensors[key] for key in keys] for pattern, keys in recipe.keys.items()}
    (whole,) = recipe.convert(nn.Identity(), shapes, read).values()
    return whole


class Counted:
    """A tensor as a source, and how many of its entries were read."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.shape, self.read_entries = tensor, tensor.shape, 0

    def read(self, box: tuple[slice, ...]) -> Tensor:
        self.read_entries += self.tensor[box].numel()
        return self.tensor[box].clone()


@pytest.mark.parametrize("name", CONVERSIONS)
@given(half=st.integers(1, 6), width=st.integers(1, 4), seed=st.integers(0, 9), data=st.data())
def test_convert_expert_of_part_reads_only_its_sources(
    name: str, half: int, width: int, seed: int, data: st.DataObject
) -> None:
    """Rows made of one expert's tensors, of which only the needed parts are read, are those that a rank holds."""
    tensors = checkpoint(CONVERSIONS[name][0], 2 * half, width, seed)
    sources = {key: Counted(tensor) for key, tensor in tensors.items()}
    recipe, model = recipe_for(name, tensors), nn.Identity()
    # A conversion that checks dimensions is given those that make it transpose.
    whole = whole_of(recipe, tensors, {TARGET: torch.Size((2 * half, width, 4))})
    shapes = {TARGET: whole.shape}
    conversion._foresee(recipe, model, shapes, sources)
    assert recipe.targets == shapes
    assert recipe.by_expert == CONVERSIONS[name][2]
    if recipe.by_expert is None:
        return
    box = []
    for size in whole.shape[1:]:
        start = data.draw(st.integers(0, size - 1))
        box.append(slice(start, data.draw(st.integers(start + 1, size))))
    expert = data.draw(st.integers(0, 2 * half - 1))
    finder = PartFinder(model, shapes, sources)
    parts = finder.find(recipe, {TARGET: tuple(box)})
    if tuple(box) != whole_box(whole.shape[1:]):  # looked for once
        assert finder.find(recipe, {TARGET: tuple(box)}) is parts
    (made,) = recipe.convert_expert(model, shapes, finder.read(recipe, expert, parts)).values()
    assert torch.equal(made[0][tuple(box)], whole[expert][tuple(box)])
    read = sum(source.read_entries for source in sources.values())
    if "interleaved" not in name:
        assert read == whole[expert][tuple(box)].numel()
    assert read <= whole[expert].numel()


def test_conversion_that_fails_raises_with_shapes() -> None:
    tensors = checkpoint([GATE, UP], 3, 2, 0)
    tensors["layers.0.experts.1.up.weight"] = torch.zeros(3, 5)
    recipe = recipe_for("merged and fused", tensors)
    with pytest.raises(
        ValueError, match=rf"{TARGET} can't be made from .* and 1 more of shapes .*\(3, 5\).*: (Runtime|Assertion)Error"
    ):
        conversion._foresee(recipe, nn.Identity(), {TARGET: torch.Size((3, 8, 2))}, tensors)  # type: ignore[arg-type]


def test_conversions_of_all_families_are_by_expert() -> None:
    """Conversions of transformers that make tensors of experts: all but those that are known to mix them."""
    from transformers import conversion_mapping

    mixing = set()
    for model_type, entries in conversion_mapping._build_checkpoint_conversion_mapping().items():
        for entry in entries:
            targets = entry.target_patterns
            if isinstance(entry, hf.WeightConverter) and any("experts." in target for target in targets):
                merged = "*" in entry.source_patterns[0]
                keys = {
                    pattern: [f"{pattern}{i}" for i in range(4 if merged else 1)] for pattern in entry.source_patterns
                }
                source = SimpleNamespace(shape=torch.Size((4, 2, 2)))
                sources = {key: source for of_pattern in keys.values() for key in of_pattern}
                if conversion._by_expert(Recipe("", keys, entry), 4, sources) is None:  # type: ignore[arg-type]
                    mixing.add(model_type)
    assert mixing <= {"ernie4_5_vl_moe", "inkling2_loop_text"}
