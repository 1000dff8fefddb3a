"""Experts as DTensors: local shards share memory, move in place, and are saved and loaded in logical order."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from lightning_eplb import ExpertLoadBalancer, fully_shard_moe, parallelize_experts
from lightning_eplb.checkpoint import install_optimizer_hooks
from lightning_eplb.parallel.dtensor import local_shard
from lightning_eplb.parallel.fully_shard import shard_dimension
from lightning_eplb.parallel.groups import ExpertGroups
from tests.fidelity import ShufflePolicy, whole
from tests.models import hugging_face_model, language_loss, optimizer_of, token_batches
from tests.workers import Workers

NAMES = ("efsdp", "ep", "tensor_parallel")


def mesh_of(*shape: int, names: tuple[str, ...] = NAMES) -> DeviceMesh:
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def test_shard_dimension_of_shape_is_first_that_divides() -> None:
    assert shard_dimension(torch.Size([8, 6, 4]), 2) == Shard(1)
    assert shard_dimension(torch.Size([8, 3, 4]), 2) == Shard(2)
    assert shard_dimension(torch.Size([8, 3]), 2) is None
    assert shard_dimension(torch.Size([8]), 1) is None


def test_local_shard_of_dtensor_shares_its_memory(workers: Workers) -> None:
    workers.run(4, write_to_shards)


def write_to_shards() -> None:
    model = fully_shard_moe(hugging_face_model("mixtral"), mesh_of(2, 2, 1))
    experts = model.get_submodule("model.layers.0.mlp.experts")
    assert isinstance(experts.down_proj, DTensor)
    assert experts.down_proj.placements == (Shard(1), Shard(0))
    assert experts.down_proj.shape == (8, 16, 24)
    shard = local_shard(experts.down_proj)
    assert shard.shape == (4, 8, 24)
    assert not shard.requires_grad
    shard.fill_(dist.get_rank())
    full = experts.down_proj.full_tensor()
    efsdp, ep = divmod(dist.get_rank(), 2)
    assert (full[4 * ep : 4 * ep + 4, 8 * efsdp : 8 * efsdp + 8] == dist.get_rank()).all()


def moved_model() -> tuple[nn.Module, torch.optim.Optimizer, ExpertLoadBalancer]:
    """After one step, experts anywhere."""
    model = fully_shard_moe(hugging_face_model("mixtral"), mesh_of(2, 2, 1), num_redundant_experts=2)
    optimizer = optimizer_of("adamw", model)
    install_optimizer_hooks(optimizer, model)
    balancer = ExpertLoadBalancer(model, [optimizer], policy=ShufflePolicy(), step_interval=1)
    language_loss(model, token_batches(2)).backward()
    optimizer.step()
    before = balancer.placement
    balancer.step()
    assert balancer.placement != before
    return model, optimizer, balancer


def test_dtensor_after_moves_is_saved_in_logical_order(workers: Workers) -> None:
    workers.run(4, save_and_load)


def save_and_load() -> None:
    plain = hugging_face_model("mixtral")
    plain_optimizer = optimizer_of("adamw", plain)
    language_loss(plain, token_batches(2)).backward()
    plain_optimizer.step()
    expected, moments = plain.state_dict(), plain_optimizer.state_dict()["state"]

    model, optimizer, balancer = moved_model()
    state, states = model.state_dict(), optimizer.state_dict()
    assert list(state) == list(expected)
    for name, tensor in state.items():
        assert isinstance(tensor, DTensor)
        assert float((whole(tensor) - expected[name]).abs().max()) < 1e-12
    for index, values in states["state"].items():
        for key, value in values.items():
            assert float((whole(value) - moments[index][key]).abs().max()) < 1e-12

    kept = {name: local_shard(parameter).clone() for name, parameter in model.named_parameters()}
    balancer.rearrange()  # elsewhere again, with other redundant experts
    assert any(not torch.equal(kept[name], local_shard(parameter)) for name, parameter in model.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts" in name:  # what did not move is saved without a copy
                local_shard(parameter).zero_()
                optimizer.state[parameter]["exp_avg"].zero_()
    model.load_state_dict(state)
    optimizer.load_state_dict(states)
    for name, tensor in model.state_dict().items():
        assert float((whole(tensor) - expected[name]).abs().max()) < 1e-12
    for index, values in optimizer.state_dict()["state"].items():
        assert float((whole(values["exp_avg"]) - moments[index]["exp_avg"]).abs().max()) < 1e-12


class SharedNorm(nn.Module):
    """Experts with a parameter that all of them share."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = 4
        self.up = nn.Parameter(torch.zeros(4, 4, 4))
        self.norm = nn.LayerNorm(4)

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return hidden * weights.sum(dim=1, keepdim=True)


class OddExperts(SharedNorm):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.zeros(4, 3, 5))
        del self.norm


def distributed_norm() -> nn.Module:
    model = hugging_face_model("mixtral")
    mesh = mesh_of(4, names=("other",))
    model.lm_head.weight = nn.Parameter(DTensor.from_local(model.lm_head.weight.detach(), mesh))
    return model


def mixtral() -> nn.Module:
    return hugging_face_model("mixtral")


REFUSED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[str, ...], str]] = {
    "no ep": (mixtral, (4,), ("data_parallel",), "group: the mesh has dimensions ('data_parallel',). It must have one"),
    "no efsdp": (mixtral, (4,), ("ep",), "mesh has dimensions ('ep',); 'efsdp' must be among them"),
    "tensor parallel": (mixtral, (1, 2, 2), NAMES, "group: the mesh has 'tensor_parallel' of size 2; its ranks would"),
    "a part of the world": (mixtral, (1, 2, 1), NAMES, "group: the mesh has 2 ranks in dimensions ('efsdp', 'ep'"),
    "sharded before": (distributed_norm, (2, 2, 1), NAMES, "lm_head.weight is a DTensor already. Call parallelize_exp"),
    "odd sizes": (OddExperts, (2, 2, 1), NAMES, "mesh: efsdp=2 must divide a dimension after the first of experts.up"),
    "a shared norm": (
        SharedNorm,
        (2, 2, 1),
        NAMES,
        "experts.norm.weight: a parameter that all experts of a module share",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_fully_shard_moe_of_unsupported_mesh_or_model_raises(name: str, workers: Workers) -> None:
    for message in workers.run(4, refused, name):
        assert REFUSED[name][3] in message


def refused(name: str) -> str:
    make, shape, names, _ = REFUSED[name]
    model = nn.ModuleDict({"experts": make()}) if make in (SharedNorm, OddExperts) else make()
    mesh: Any = mesh_of(4, names=("all",)) if name == "a part of the world" else mesh_of(*shape, names=names)
    if name == "a part of the world":  # as a rank sees it whose mesh was made for two ranks
        mesh = DeviceMesh("cpu", torch.arange(2).view(shape), mesh_dim_names=names)
    with (
        mock.patch.object(ExpertGroups, "create", side_effect=AssertionError("a collective before the check")),
        pytest.raises(ValueError, match=r"\w") as raised,
    ):
        fully_shard_moe(model, mesh)
    return str(raised.value)


def test_fully_shard_by_hand_equals_helper(workers: Workers) -> None:
    assert max(workers.run(4, by_hand)) < 1e-12


def by_hand() -> float:
    """Gradients of ``parallelize_experts`` followed by ``fully_shard``, against one process."""
    from torch.distributed.fsdp import fully_shard

    model = hugging_face_model("mixtral")
    mesh = mesh_of(2, 2, 1)
    everyone = mesh["efsdp", "ep"]._flatten("data_parallel")
    parallelize_experts(model, mesh, num_redundant_experts=2)
    for block in model.model.layers:
        fully_shard(block.mlp.experts, mesh=mesh["efsdp"], shard_placement_fn=lambda parameter: Shard(1))
        fully_shard(block, mesh=everyone)
    fully_shard(model, mesh=everyone)
    tokens = token_batches(8)
    language_loss(model, tokens[2 * dist.get_rank() :][:2]).backward()
    original = hugging_face_model("mixtral")
    language_loss(original, tokens).backward()
    expected = dict(original.named_parameters())
    differences = []
    for name, parameter in model.named_parameters():
        grad, theirs = parameter.grad, expected[name].grad
        assert grad is not None
        assert theirs is not None
        differences.append(float((whole(grad) - theirs).abs().max()))
    return max(differences)
