"""Models built on the meta device: memory for a rank's part only, and a start that is the same wherever it must be."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from lightning_eplb import EPLBCallback, fully_shard_moe, materialize, parallelize_experts
from lightning_eplb.parallel.dtensor import local_shard
from lightning_eplb.parallel.parallelize import expert_layers
from tests.fidelity import SEQUENCES, TOLERANCE, ShufflePolicy, trainer_for, whole
from tests.models import LanguageModel, hugging_face_model, language_loss, loader, token_batches
from tests.workers import Workers


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return hugging_face_model("mixtral")


def logical_state(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(tensor) for name, tensor in model.state_dict().items()}


def check_drawn(state: dict[str, Tensor]) -> None:
    """Weights are those of an initialization: no two experts alike, and spread as the unmodified model's are."""
    for name, tensor in hugging_face_model("mixtral").state_dict().items():
        assert state[name].shape == tensor.shape
        if "experts" in name:
            rows = state[name].flatten(1)
            assert len(rows.unique(dim=0)) == len(rows)
        if "experts" in name or "embed" in name or "proj" in name:
            assert 0.8 < float(state[name].std() / tensor.std()) < 1.25
            assert len(state[name].unique()) == state[name].numel()
        elif "norm" in name:
            assert (state[name] == 1).all()


@pytest.mark.parametrize(("ranks", "ep_size"), [(2, 2), (4, 2)])
def test_materialize_under_ddp_starts_all_ranks_equal(ranks: int, ep_size: int, workers: Workers) -> None:
    first, *others = workers.run(ranks, start, ep_size)
    check_drawn(first)
    for state in others:
        assert all(torch.equal(state[name], tensor) for name, tensor in first.items())


def start(ep_size: int) -> dict[str, Tensor]:
    torch.manual_seed(3)  # as seed_everything does on all ranks
    group = None if ep_size == dist.get_world_size() else dist.new_subgroups(ep_size)[0]
    assert group is None or isinstance(group, dist.ProcessGroup)
    model = materialize(parallelize_experts(on_meta(), group))
    next_number = torch.rand(())
    dist.broadcast(agreed := next_number.clone(), 0)
    assert torch.equal(agreed, next_number)  # all ranks' generators go on alike
    for _, module in expert_layers(model):
        assert [parameter.shape[0] for parameter in module.parameters()] == [8 // ep_size] * 2
    if group is not None:  # what replicas hold is the same row by row, too
        state = [parameter.detach() for _, module in expert_layers(model) for parameter in module.parameters()]
        for tensor in state:
            every = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
            dist.all_gather(every, tensor)
            assert all(torch.equal(every[rank], every[rank % ep_size]) for rank in range(len(every)))
    return logical_state(model)


@pytest.mark.parametrize("sizes", [(1, 2, 2), (1, 4, 1), (2, 1, 2)])
def test_materialize_of_sharded_model_starts_all_ranks_equal(sizes: tuple[int, int, int], workers: Workers) -> None:
    first, *others = workers.run(4, start_sharded, sizes)
    check_drawn(first)
    for state in others:
        assert all(torch.equal(state[name], tensor) for name, tensor in first.items())


def start_sharded(sizes: tuple[int, int, int]) -> dict[str, Tensor]:
    torch.manual_seed(3)
    names = ("replicate", "efsdp", "ep")[sizes[0] == 1 :]
    mesh = init_device_mesh("cpu", sizes[sizes[0] == 1 :], mesh_dim_names=names)
    model = materialize(fully_shard_moe(on_meta(), mesh))
    for parameter in model.parameters():
        assert isinstance(parameter, DTensor)
        for dim, placement in enumerate(parameter.placements):
            if placement.is_replicate():
                local = local_shard(parameter).contiguous()
                every = [torch.empty_like(local) for _ in range(parameter.device_mesh.size(dim))]
                dist.all_gather(every, local, group=parameter.device_mesh.get_group(dim))
                assert all(torch.equal(tensor, local) for tensor in every)
    return logical_state(model)


class InInit(LanguageModel):
    def __init__(self) -> None:
        super().__init__(on_meta(), "adamw")


class InConfigureModel(LanguageModel):
    def __init__(self) -> None:
        super().__init__(nn.Identity(), "adamw")

    def configure_model(self) -> None:
        if isinstance(self.model, nn.Identity):
            self.model = materialize(parallelize_experts(on_meta(), num_redundant_experts=2))


@pytest.mark.parametrize("kind", [InInit, InConfigureModel])
def test_model_after_materialize_trains_as_one_process(kind: type[LanguageModel], workers: Workers) -> None:
    """Under DDP: what the unmodified model does that starts from what the ranks started from."""
    (losses, begin), (other_losses, other_begin) = workers.run(2, train, kind)
    check_drawn(begin)
    assert all(torch.equal(other_begin[name], tensor) for name, tensor in begin.items())
    model = hugging_face_model("mixtral")
    model.load_state_dict(begin)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    for step, batch in enumerate(token_batches(4 * 2 * SEQUENCES).split(2 * SEQUENCES)):
        loss = language_loss(model, batch)
        assert abs(loss.item() - (losses[step] + other_losses[step]) / 2) < TOLERANCE
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


class Begin(EPLBCallback):
    def on_train_start(self, trainer: object, pl_module: LanguageModel) -> None:  # type: ignore[override]
        super().on_train_start(trainer, pl_module)  # type: ignore[arg-type]
        self.begin = {name: tensor.clone() for name, tensor in pl_module.model.state_dict().items()}


def train(kind: type[LanguageModel]) -> tuple[list[float], dict[str, Tensor]]:
    torch.manual_seed(3)
    module, callback = kind(), Begin(2, policy=ShufflePolicy(), step_interval=1)
    trainer_for(2, max_steps=4, callbacks=[callback]).fit(module, loader(token_batches(4 * 2 * SEQUENCES), SEQUENCES))
    return module.losses, callback.begin


class Forgetful(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2))


def test_materialize_of_uninitialized_tensor_warns() -> None:
    with torch.device("meta"):
        model = nn.ModuleDict({"linear": nn.Linear(2, 2), "mine": Forgetful()})
    with pytest.warns(UserWarning, match=r"mine.weight was built on the meta device.*; 1 such tensors hold anything"):
        materialize(model)


def test_materialize_of_tensor_with_memory_keeps_it() -> None:
    kept = nn.Linear(2, 2)
    with torch.device("meta"):
        model = nn.ModuleDict({"new": nn.Linear(2, 2)})
    model["kept"] = kept
    weight, values = kept.weight, kept.weight.detach().clone()
    materialize(model, "cpu")
    assert kept.weight is weight
    assert torch.equal(weight, values)
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert materialize(kept) is kept
    assert torch.equal(kept.weight, values)


def test_materialize_of_shared_parameters_keeps_them_shared() -> None:
    with torch.device("meta"):
        model = nn.ModuleDict({"first": nn.Linear(2, 2), "second": nn.Linear(2, 2)})
        model["second"].weight = model["first"].weight
    materialize(model)
    assert model["second"].weight is model["first"].weight
    assert len(list(model.parameters())) == 3


def test_materialize_on_meta_device_raises() -> None:
    with pytest.raises(ValueError, match=r"device='meta' has no memory. Leave `with torch.device\('meta'\)` first"):
        materialize(nn.Linear(2, 2), "meta")
