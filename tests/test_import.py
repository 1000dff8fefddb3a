"""Importing the package brings in nothing that only some use, and little beyond Lightning."""

import subprocess
import sys

SCRIPT = """
import sys
import lightning.pytorch
before = set(sys.modules)
import lightning_eplb
print(*sorted({name.split(".")[0] for name in set(sys.modules) - before}))
print(*sorted({"wandb", "transformers", "jsonargparse", "rich"} & set(sys.modules) - before))
"""


def test_only_the_package_itself_is_new_after_lightning() -> None:
    answer = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    new, unwanted = answer.stdout.split("\n")[:2]
    assert unwanted == ""
    assert new.split() == ["lightning_eplb"]
