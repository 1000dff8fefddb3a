"""``ExpertParallelStrategy`` by itself: its mesh, its sampler, its YAML form, and what it refuses."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.plugins.environments import TorchElasticEnvironment

from lightning_eplb import EPLBCallback, ExpertParallelStrategy, parallelize_experts
from lightning_eplb.parallel.groups import check_nodes
from tests.fidelity import SEQUENCES, trainer_for
from tests.models import ShardedLanguageModel, hugging_face_model, loader, token_batches
from tests.workers import Workers

CONFIG = """
trainer:
  accelerator: cpu
  devices: 4
  max_steps: 3
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  gradient_clip_val: 0.5
  strategy:
    class_path: lightning_eplb.ExpertParallelStrategy
    init_args:
      ep_size: 2
  callbacks:
    - class_path: lightning_eplb.EPLBCallback
      init_args:
        num_redundant_experts: 2
        step_interval: 1
        policy:
          class_path: tests.fidelity.ShufflePolicy
model:
  num_redundant_experts: 2
"""


class Configured(ShardedLanguageModel):
    def __init__(self, num_redundant_experts: int = 0) -> None:
        super().__init__(hugging_face_model("mixtral"), "adamw", num_redundant_experts)

    def train_dataloader(self) -> Any:
        return loader(token_batches(16 * SEQUENCES), SEQUENCES)


def test_strategy_from_yaml_trains_on_mesh(workers: Workers, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    for rearrangements, sizes, sampler in workers.run(4, from_yaml, str(path), seconds=200):
        assert rearrangements == 3
        assert sizes == {"efsdp": 2, "ep": 2, "tensor_parallel": 1}
        assert sampler == 4


def from_yaml(path: str) -> tuple[int, dict[str, int], int]:
    defaults = {"plugins": [TorchElasticEnvironment()]}
    cli = LightningCLI(
        Configured, run=False, args=["--config", path], trainer_defaults=defaults, save_config_callback=None
    )
    cli.trainer.fit(cli.model)
    (callback,) = (c for c in cli.trainer.callbacks if isinstance(c, EPLBCallback))  # type: ignore[attr-defined]
    assert callback.balancer is not None
    strategy = cli.trainer.strategy
    assert isinstance(strategy, ExpertParallelStrategy)
    mesh = strategy.device_mesh
    assert mesh["data_parallel"].size() == 4
    assert mesh["data_parallel"].get_local_rank() == strategy.distributed_sampler_kwargs["rank"] == dist.get_rank()
    sizes = {name: mesh[name].size() for name in mesh.mesh_dim_names or ()}
    return callback.balancer.num_rearrangements, sizes, strategy.distributed_sampler_kwargs["num_replicas"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ep_size": 0}, "ep_size=0 must be at least 1; None takes all ranks that are not replicas"),
        ({"replicate_size": 0}, "replicate_size=0 must be at least 1, which is no replica"),
    ],
)
def test_strategy_with_size_below_one_raises(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExpertParallelStrategy(**arguments)


def fit(strategy: ExpertParallelStrategy, module: ShardedLanguageModel, callback: EPLBCallback, **kwargs: Any) -> str:
    too_late = AssertionError("a collective before the check")
    trainer = trainer_for(dist.get_world_size(), strategy, max_steps=1, callbacks=[callback], **kwargs)
    with (
        mock.patch("lightning_eplb.parallel.groups.ExpertGroups.create", side_effect=too_late),
        pytest.raises(ValueError, match=r"\w") as raised,
    ):
        trainer.fit(module, loader(token_batches(8), SEQUENCES))
    return str(raised.value)


def refused(ep_size: int, replicate_size: int, callback: dict[str, Any]) -> str:
    with mock.patch("lightning_eplb.strategies.init_device_mesh", side_effect=AssertionError("a mesh was made")):
        module = ShardedLanguageModel(hugging_face_model("mixtral"), "adamw")
        return fit(ExpertParallelStrategy(ep_size, replicate_size), module, EPLBCallback(**callback))


def test_strategy_with_indivisible_sizes_raises(workers: Workers) -> None:
    (message,) = set(workers.run(4, refused, 3, 1, {}))
    assert message.startswith("ep_size=3 times replicate_size=1 must divide the 4 ranks (num_nodes=1, devices=4)")
    (message,) = set(workers.run(4, refused, 4, 2, {}))
    assert message.startswith("ep_size=4 times replicate_size=2 must divide the 4 ranks")


def test_check_nodes_with_unequal_parts_raises() -> None:
    with pytest.raises(ValueError, match=r"as a node has 6 ranks\. Use one of \[1, 2, 3, 6\], or a multiple of 6"):
        check_nodes(4, 6)
    for ep_size, ranks_a_node in [(4, 8), (8, 4), (16, 8), (3, 6), (4, 1), (1, 8)]:
        check_nodes(ep_size, ranks_a_node)


def test_strategy_with_other_ep_size_in_callback_raises(workers: Workers) -> None:
    for message in workers.run(2, callback_disagrees):
        assert message == "ep_size=1 must be that of ExpertParallelStrategy, which is 2; leave it out here"


def callback_disagrees() -> str:
    module = ShardedLanguageModel(hugging_face_model("mixtral"), "adamw")
    return fit(ExpertParallelStrategy(), module, EPLBCallback(ep_size=1))


class Unsharded(ShardedLanguageModel):
    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard

        assert self.device_mesh is not None
        fully_shard(self.model, mesh=self.device_mesh["data_parallel"])


def test_strategy_with_unconverted_model_raises(workers: Workers) -> None:
    for message in workers.run(2, not_spread):
        assert "call fully_shard_moe(self.model, self.device_mesh, num_redundant_experts=0) at its end" in message


def not_spread() -> str:
    return fit(ExpertParallelStrategy(), Unsharded(hugging_face_model("mixtral"), "adamw"), EPLBCallback())


class OnlySpread(ShardedLanguageModel):
    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard

        assert self.device_mesh is not None
        parallelize_experts(self.model, self.device_mesh)
        fully_shard(self.model.lm_head, mesh=self.device_mesh["data_parallel"])


def test_strategy_with_unsharded_experts_raises(workers: Workers) -> None:
    for message in workers.run(4, only_spread):
        assert "model.layers.0.mlp.experts was spread over a mesh and not sharded" in message


def only_spread() -> str:
    return refused_after_configuring(OnlySpread, 4)


class AsUnderDDP(ShardedLanguageModel):
    def configure_model(self) -> None:
        parallelize_experts(self.model)


def test_strategy_with_unsharded_dense_parameters_raises(workers: Workers) -> None:
    for message in workers.run(2, as_under_ddp):
        assert message.startswith(
            "model.model.embed_tokens.weight was not sharded, so that nobody averages its gradient"
        )


def as_under_ddp() -> str:
    return refused_after_configuring(AsUnderDDP, 2)


def refused_after_configuring(module: type[ShardedLanguageModel], world_size: int) -> str:
    trainer = trainer_for(world_size, ExpertParallelStrategy(2), max_steps=1, callbacks=[EPLBCallback()])
    with pytest.raises(ValueError, match=r"\w") as raised:
        trainer.fit(module(hugging_face_model("mixtral"), "adamw"), loader(token_batches(8), SEQUENCES))
    torch.distributed.barrier()
    return str(raised.value)
