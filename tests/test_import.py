"""Importing the package brings in nothing that only some use, and nothing but its compiler beyond Lightning."""

import subprocess
import sys

SCRIPT = """
import sys
import lightning.pytorch
before = set(sys.modules)
import lightning_eplb
print(*sorted({name.split(".")[0] for name in sys.modules} - before - set(sys.stdlib_module_names)))
print(*sorted({"wandb", "transformers", "jsonargparse", "rich"} & set(sys.modules) - before))
"""


def test_only_the_package_and_its_compiler_are_new_after_lightning() -> None:
    answer = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    new, unwanted = answer.stdout.split("\n")[:2]
    assert unwanted == ""
    assert new.split() == ["lightning_eplb", "llvmlite", "numba"]
