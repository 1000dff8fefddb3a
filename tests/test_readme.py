"""What the README shows works, and says what the code says."""

import inspect
import re
from pathlib import Path

import pytest
import torch
import yaml

from lightning_eplb import EPLBCallback
from lightning_eplb.parallel.convert import find_experts
from lightning_eplb.scalars import SCALARS
from tests.test_cli import callback_from

README = (Path(__file__).parents[1] / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_hand_written_experts_follow_the_protocol() -> None:
    (source,) = [block for block in blocks("python") if "class Experts" in block]
    names: dict = {}
    exec(source, names)
    experts = names["Experts"](4, 6, 5)
    assert [module for _, module in find_experts(torch.nn.ModuleDict({"experts": experts}))] == [experts]
    output = experts(torch.randn(3, 6), torch.tensor([[0, 1], [2, 3], [1, 0]]), torch.rand(3, 2))
    assert output.shape == (3, 6)


@pytest.mark.parametrize("source", blocks("python"))
def test_python_compiles(source: str) -> None:
    compile(source, "README.md", "exec")


def test_the_yaml_is_taken(tmp_path: Path) -> None:
    (source,) = blocks("yaml")
    (callback,) = yaml.safe_load(source)["trainer"]["callbacks"]
    assert callback_from(tmp_path, callback["init_args"]).step_interval == 200


def test_every_argument_is_in_the_table() -> None:
    for name, parameter in inspect.signature(EPLBCallback).parameters.items():
        row = next(line for line in README.splitlines() if line.startswith(f"| `{name}`"))
        default = "all ranks" if name == "ep_size" else parameter.default
        assert str(default if name != "policy" else "`BalancedPolicy()`") in row


def test_files_that_commands_name_exist() -> None:
    for path in re.findall(r"\b(?:examples|tests)/[\w/.]+\.(?:py|yaml)", README):
        assert (Path(__file__).parents[1] / path).exists(), path


def test_every_scalar_is_in_the_table() -> None:
    for name, (unit, meaning) in SCALARS.items():
        assert f"| `{name}` | {unit} | {meaning} |" in README.splitlines()
