"""Code and figures of the README work, and say what the code says."""

import inspect
import re
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from torch.distributed.fsdp import FSDPModule

from lightning_eplb import EPLBCallback, ExpertParallelStrategy
from lightning_eplb.cli import COMMANDS, main
from lightning_eplb.logging.scalars import SCALARS
from lightning_eplb.parallel.discovery import find_experts
from lightning_eplb.parallel.parallelize import expert_layers
from lightning_eplb.simulation.synthetic import synthetic_load
from lightning_eplb.simulation.trace import TraceWriter
from tests.fidelity import SEQUENCES, trainer_for
from tests.fsdp1 import DoublePrecision, fsdp1
from tests.models import LanguageModel, hugging_face_model, loader, token_batches
from tests.test_cli import callback_from
from tests.workers import Workers

README = (Path(__file__).parents[1] / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_readme_experts_class_follows_protocol() -> None:
    (source,) = [block for block in blocks("python") if "class Experts" in block]
    names: dict = {}
    exec(source, names)
    experts = names["Experts"](4, 6, 5)
    assert [module for _, module in find_experts(torch.nn.ModuleDict({"experts": experts}))] == [experts]
    output = experts(torch.randn(3, 6), torch.tensor([[0, 1], [2, 3], [1, 0]]), torch.rand(3, 2))
    assert output.shape == (3, 6)


@pytest.mark.parametrize("source", blocks("python"))
def test_readme_python_block_compiles(source: str) -> None:
    compile(source, "README.md", "exec")


class WithData(LanguageModel):
    """Brings its own data: four batches."""

    def train_dataloader(self):
        return loader(token_batches(8), SEQUENCES)


def test_readme_quickstart_trains() -> None:
    (source,) = [block for block in blocks("python") if 'strategy="ddp"' in block]
    eight_gpus = 'strategy="ddp", devices=8'
    assert eight_gpus in source
    here = 'accelerator="cpu", devices=1, max_epochs=1, logger=False, enable_checkpointing=False'
    model = WithData(hugging_face_model("mixtral"), "adamw")
    names: dict = {"model": model}
    exec(source.replace(eight_gpus, here), names)
    assert len(model.losses) == 4


def test_readme_configure_model_builds_once() -> None:
    (source,) = [block for block in blocks("python") if "class MyModel" in block]
    names: dict = {"build_my_model": lambda: hugging_face_model("mixtral")}
    exec(source, names)
    model = names["MyModel"]()
    model.configure_model()
    built = model.model
    assert len(list(expert_layers(model))) == 2
    model.configure_model()  # as Lightning does for validate, test and a further fit
    assert model.model is built


def train_sharded() -> tuple[int, int, bool]:
    """On every worker: the README's sharded model, with something to train added to it."""
    (source,) = [block for block in blocks("python") if "class MyShardedModel" in block]
    eight_gpus = "strategy=strategy, devices=8"
    assert eight_gpus in source
    here = (
        'strategy=strategy, accelerator="cpu", devices=2, plugins=[TorchElasticEnvironment()], max_epochs=1,'
        " logger=False, enable_checkpointing=False, enable_progress_bar=False"
    )
    source = source.replace(eight_gpus, here).replace("ep_size=8", "ep_size=2").replace("experts=8", "experts=2")
    names: dict = {
        "build_my_model": lambda: hugging_face_model("mixtral"),
        "TorchElasticEnvironment": TorchElasticEnvironment,
    }
    exec(source, names)

    class Trained(names["MyShardedModel"]):
        training_step, configure_optimizers = LanguageModel.training_step, LanguageModel.configure_optimizers
        optimizer_name = "adamw"

    model = Trained()
    model.losses = []
    names["trainer"].fit(model, loader(token_batches(8), SEQUENCES))
    return (
        len(model.losses),
        names["trainer"].callbacks[0].balancer.groups.size,
        isinstance(model.model, FSDPModule),
    )


def test_readme_fsdp2_model_trains(workers: Workers) -> None:
    assert workers.run(2, train_sharded) == [(2, 2, True)] * 2


def train_under_fsdp1(folder: str) -> tuple[int, int, int]:
    """On every worker: the README's trainer with Lightning's FSDP, as it is on a CPU, and a checkpoint of its kind."""
    from transformers.models.mixtral.modeling_mixtral import MixtralDecoderLayer

    (source,) = [block for block in blocks("python") if "import FSDPStrategy" in block]
    eight_gpus = "strategy=strategy, devices=8"
    assert eight_gpus in source
    here = (
        'strategy=strategy, accelerator="cpu", devices=2, plugins=[TorchElasticEnvironment(), DoublePrecision()],'
        " max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False"
    )
    names: dict = {
        "MyDecoderLayer": MixtralDecoderLayer,
        "TorchElasticEnvironment": TorchElasticEnvironment,
        "DoublePrecision": DoublePrecision,
    }
    with mock.patch("lightning.pytorch.strategies.FSDPStrategy", fsdp1):
        exec(source.replace(eight_gpus, here).replace("experts=8", "experts=2"), names)
    model = LanguageModel(hugging_face_model("mixtral"), "adamw")
    names["trainer"].fit(model, loader(token_batches(8), SEQUENCES))
    names["trainer"].save_checkpoint(folder)
    size = names["trainer"].callbacks[0].balancer.groups.size
    return len(model.losses), size, len(list(Path(folder).glob("*.distcp")))


def test_readme_fsdp1_model_trains(workers: Workers, tmp_path: Path) -> None:
    assert workers.run(2, train_under_fsdp1, str(tmp_path / "last.ckpt")) == [(2, 2, 2)] * 2


def train_pretrained(path: str, ddp: bool) -> list[float]:
    """On every worker: the README's model that is read from a folder; by its words, too, under DDP."""
    (source,) = [block for block in blocks("python") if "class MyPretrainedModel" in block]
    source = source.replace("path/to/model", path).replace("experts=8", "experts=2")
    if ddp:
        source = source.replace("fully_shard_moe(model, self.device_mesh, ", "parallelize_experts(model, ")
        source = source.replace("import fully_shard_moe", "import parallelize_experts")
    names: dict = {}
    exec(source, names)

    class Trained(names["MyPretrainedModel"]):
        training_step, configure_optimizers = LanguageModel.training_step, LanguageModel.configure_optimizers
        optimizer_name = "sgd"

    model = Trained()
    model.losses = []
    strategy = None if ddp else ExpertParallelStrategy()
    trainer = trainer_for(2, strategy, max_steps=2, callbacks=[EPLBCallback(num_redundant_experts=2)])
    trainer.fit(model, loader(token_batches(8), SEQUENCES))
    return model.losses


def test_readme_pretrained_model_trains(workers: Workers, tmp_path: Path) -> None:
    hugging_face_model("qwen3_moe").float().save_pretrained(tmp_path)
    sharded = workers.run(2, train_pretrained, str(tmp_path), False)
    replicated = workers.run(2, train_pretrained, str(tmp_path), True)
    assert all(len(losses) == 2 for losses in sharded + replicated)
    assert np.allclose(sharded, replicated, atol=1e-5)


def commands() -> list[str]:
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    return [line.partition("-m lightning_eplb ")[2] for line in lines if line.startswith("python3 -m lightning_eplb ")]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the example leaves, of its own numbers of experts and layers."""
    folder = tmp_path_factory.mktemp("readme")
    writer = TraceWriter(folder / "runs/pretrain/trace.npy")
    load_WYL = synthetic_load("drift-30", 120, 4, 16)
    for load_YL in load_WYL:
        writer.append(load_YL)
    (folder / "runs/pretrain/checkpoints").mkdir()
    state = {"window": torch.from_numpy(load_WYL[-40:]), "num_rearrangements": 1, "rearranged_bytes": 0}
    torch.save({"callbacks": {"EPLBCallback": state}}, folder / "runs/pretrain/checkpoints/last.ckpt")
    return folder


@pytest.mark.parametrize("command", commands())
def test_readme_command_succeeds(command: str, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained)
    if command.startswith("dashboard"):  # needs an account
        workspaces = pytest.importorskip("wandb_workspaces.workspaces")
        monkeypatch.setattr(workspaces.Workspace, "save", lambda workspace: None)
        monkeypatch.setattr(workspaces.Workspace, "url", "https://address")
    assert main(command.split()) == 0


def test_readme_commands_are_complete() -> None:
    assert {command.split()[0] for command in commands()} == set(COMMANDS)


def test_readme_yaml_builds_callback(tmp_path: Path) -> None:
    (source,) = blocks("yaml")
    (callback,) = yaml.safe_load(source)["trainer"]["callbacks"]
    assert callback_from(tmp_path, callback["init_args"]).step_interval == 200


def test_readme_table_of_arguments_is_complete() -> None:
    for name, parameter in inspect.signature(EPLBCallback).parameters.items():
        row = next(line for line in README.splitlines() if line.startswith(f"| `{name}`"))
        default = "all ranks" if name == "ep_size" else parameter.default
        assert str(default if name != "policy" else "`BalancedPolicy()`") in row


def test_readme_files_exist() -> None:
    for path in re.findall(r"\b(?:examples|tests)/[\w/.]+\.(?:py|yaml)", README):
        assert (Path(__file__).parents[1] / path).exists(), path


def test_readme_table_of_scalars_is_complete() -> None:
    for name, (unit, meaning) in SCALARS.items():
        assert f"| `{name}` | {unit} | {meaning} |" in README.splitlines()
