"""Everything is configured from a YAML file; what does not fit is refused with its name."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel

from lightning_eplb import BalancedPolicy, DeepSeekPolicy, EPLBCallback, Policy, StaticPolicy


def callback_from(folder: Path, arguments: dict[str, Any]) -> EPLBCallback:
    config = {"trainer": {"callbacks": [{"class_path": "lightning_eplb.EPLBCallback", "init_args": arguments}]}}
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    cli = LightningCLI(BoringModel, args=["--config", str(file)], run=False, save_config_callback=None)
    (callback,) = [callback for callback in cli.trainer.callbacks if isinstance(callback, EPLBCallback)]
    return callback


def test_lightning_cli_with_all_arguments_passes_them_on(tmp_path: Path) -> None:
    numbers = {"num_redundant_experts": 8, "ep_size": 4, "window_size": 50, "step_interval": 30}
    policy = {"class_path": "lightning_eplb.DeepSeekPolicy", "init_args": {"num_groups": 2}}
    callback = callback_from(tmp_path, {**numbers, "policy": policy})
    assert {name: getattr(callback, name) for name in numbers} == numbers
    assert isinstance(callback.policy, DeepSeekPolicy)
    assert callback.policy.num_groups == 2


@pytest.mark.parametrize("policy", [BalancedPolicy, StaticPolicy])
def test_lightning_cli_with_policy_class_builds_it(policy: type[Policy], tmp_path: Path) -> None:
    callback = callback_from(tmp_path, {"policy": {"class_path": f"lightning_eplb.{policy.__name__}"}})
    assert type(callback.policy) is policy


def test_lightning_cli_with_placement_builds_static_policy(tmp_path: Path) -> None:
    policy = {"class_path": "lightning_eplb.StaticPolicy", "init_args": {"physical_to_logical": [[1, 0], [0, 1]]}}
    assert isinstance(callback_from(tmp_path, {"policy": policy}).policy, StaticPolicy)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"step_intervall": 10}, "step_intervall"),
        ({"step_interval": "often"}, "step_interval"),
        ({"window_size": 1.5}, "window_size"),
        ({"window_size": 0}, "window_size=0"),
        ({"num_redundant_experts": -1}, "num_redundant_experts=-1"),
        ({"policy": {"class_path": "lightning_eplb.NoPolicy"}}, "policy"),
        ({"policy": {"class_path": "lightning_eplb.DeepSeekPolicy", "init_args": {"groups": 2}}}, "groups"),
    ],
)
def test_lightning_cli_with_invalid_argument_names_it(
    arguments: dict[str, Any], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises((SystemExit, ValueError)) as raised:
        callback_from(tmp_path, arguments)
    assert named in capsys.readouterr().err + str(raised.value)
