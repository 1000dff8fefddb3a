"""One call shards a whole Hugging Face model: experts, blocks, and what is outside of blocks."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, Replicate, Shard

from lightning_eplb import fully_shard_moe
from tests.models import hugging_face_model, token_batches
from tests.workers import Workers


def mesh_of(**sizes: int) -> DeviceMesh:
    return init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))


def test_fully_shard_moe_without_mesh_raises() -> None:
    with pytest.raises(ValueError, match=r"mesh=None must be the mesh of ExpertParallelStrategy"):
        fully_shard_moe(hugging_face_model("mixtral"), None)  # type: ignore[arg-type]


def test_fully_shard_moe_of_blocks_shards_each_by_itself(workers: Workers) -> None:
    workers.run(4, blocks)


def blocks() -> None:
    model = fully_shard_moe(hugging_face_model("mixtral"), mesh_of(efsdp=2, ep=2))
    sharded = [name for name, module in model.named_modules() if isinstance(module, FSDPModule)]
    layers = [f"model.layers.{i}{inner}" for i in range(2) for inner in ("", ".mlp.experts")]
    assert sharded == ["", *layers]
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        assert parameter.placements == ((Shard(1), Shard(0)) if "experts" in name else (Shard(0),))


def test_experts_that_no_other_rank_has_are_not_sharded_further(workers: Workers) -> None:
    workers.run(2, whole_experts)


def whole_experts() -> None:
    model = fully_shard_moe(hugging_face_model("mixtral"), mesh_of(efsdp=1, ep=2))
    sharded = [name for name, module in model.named_modules() if isinstance(module, FSDPModule)]
    assert sharded == ["", "model.layers.0", "model.layers.1"]
    before = {name: parameter.full_tensor() for name, parameter in model.named_parameters() if "experts" in name}
    assert len(before) == 4
    logits = model(input_ids=token_batches(2)[dist.get_rank()].unsqueeze(0), use_cache=False).logits
    logits.square().mean().backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        assert parameter.placements == (Shard(0),)
        assert isinstance(parameter.grad, DTensor)
        if "experts" in name:
            assert not torch.equal(parameter.full_tensor(), before[name])


class DenseFirst(nn.Module):
    """As DeepSeek's: the first block has no experts."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4), hugging_face_model("mixtral", layers=1)])

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden


def test_fully_shard_moe_of_dense_block_shards_it(workers: Workers) -> None:
    workers.run(2, dense_block)


def dense_block() -> None:
    model = fully_shard_moe(DenseFirst(), mesh_of(efsdp=1, ep=2))
    assert all(isinstance(block, FSDPModule) for block in model.get_submodule("blocks").children())


def test_fully_shard_moe_with_replicas_is_hybrid(workers: Workers) -> None:
    workers.run(4, hybrid)


def hybrid() -> None:
    model = fully_shard_moe(hugging_face_model("mixtral"), mesh_of(replicate=2, efsdp=1, ep=2))
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        inner = (Shard(1), Shard(0)) if "experts" in name else (Shard(0),)
        assert parameter.placements == (Replicate(), *inner)


def test_fully_shard_moe_with_mixed_precision_reaches_experts(workers: Workers) -> None:
    workers.run(2, half_precision)


def half_precision() -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = hugging_face_model("mixtral").float()
    fully_shard_moe(model, mesh_of(efsdp=1, ep=2), num_redundant_experts=2, mp_policy=policy)
    logits = model(input_ids=token_batches(2), use_cache=False).logits
    assert logits.dtype == torch.bfloat16
    logits.float().square().mean().backward()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
