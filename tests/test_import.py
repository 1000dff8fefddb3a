"""Imports: none is heavy that only some need, and all that is imported is declared."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.fresh_interpreter import FreshInterpreter

PROJECT = Path(__file__).parents[1]
PACKAGE = PROJECT / "lightning_eplb"
SCRIPT = """
import sys
before = set(sys.modules)
import lightning_eplb
print(*sorted({name.split(".")[0] for name in sys.modules} - before - set(sys.stdlib_module_names)))
print(*sorted({"wandb", "transformers", "jsonargparse", "rich"} & set(sys.modules) - before))
print(lightning_eplb._compiled.folder.cache_info().misses)
"""
LATE = {"PIL", "matplotlib", "rich", "safetensors", "transformers", "wandb", "wandb_workspaces"}
"""Imported inside of functions, where they are needed."""
IMPORTS = (ast.Import, ast.ImportFrom)
DISTRIBUTIONS = {"PIL": "pillow", "typing_extensions": "typing-extensions", "wandb_workspaces": "wandb-workspaces"}
"""Names of distributions that differ from the module's."""


def test_import_after_lightning_adds_only_numba(fresh_interpreter: FreshInterpreter) -> None:
    new, unwanted, hashes = fresh_interpreter.run(SCRIPT).splitlines()
    assert unwanted == ""
    assert hashes == "0"  # sources are read at the first call of a loop
    assert new.split() == ["lightning_eplb", "llvmlite", "numba"]


def imported(statements: list[ast.stmt]) -> Iterator[str]:
    """Top-level names of the modules that statements import."""
    for statement in statements:
        for node in ast.walk(statement):
            if isinstance(node, ast.Import):
                yield from (alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                yield node.module.partition(".")[0]


def trees() -> dict[str, ast.Module]:
    files = sorted(PACKAGE.rglob("*.py"))
    return {str(path.relative_to(PACKAGE)): ast.parse(path.read_text(encoding="utf-8")) for path in files}


def test_imports_of_optional_modules_are_late() -> None:
    early = {
        name: found
        for name, tree in trees().items()
        if name != "logging/dashboard.py"  # imported late itself
        and (
            found := LATE & set(imported([each for each in tree.body if isinstance(each, ast.Import | ast.ImportFrom)]))
        )
    }
    assert early == {}


def test_imports_of_package_are_declared() -> None:
    declared = set(re.findall(r'"([a-z-]+)(?:\[[a-z]+\])?>=', (PROJECT / "pyproject.toml").read_text(encoding="utf-8")))
    modules = {module for tree in trees().values() for module in imported(tree.body)}
    modules -= {"lightning_eplb", "triton", *sys.stdlib_module_names}  # Triton is a part of torch's CUDA builds
    assert {DISTRIBUTIONS.get(module, module) for module in modules} - declared == set()
