"""One norm of the whole model, on every rank."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from lightning_eplb import fully_shard_moe
from lightning_eplb.parallel.clipping import clip_by_norm_of_all_, clip_grad_value_
from lightning_eplb.parallel.groups import ExpertGroups
from lightning_eplb.parallel.parallelize import expert_layers
from tests.fidelity import whole
from tests.models import hugging_face_model, language_loss, token_batches
from tests.workers import Workers


@pytest.mark.parametrize("max_norm", [0.1, 1e9])
def test_clip_grad_norm_with_ep_counts_every_expert_once(max_norm: float, workers: Workers) -> None:
    workers.run(2, clip, max_norm)


def clip(max_norm: float) -> None:
    groups = ExpertGroups.create()
    generator = torch.Generator().manual_seed(0)
    dense = [nn.Parameter(torch.randn(3, 2, generator=generator, dtype=torch.float64)) for _ in range(2)]
    experts = [nn.Parameter(torch.randn(4, 5, generator=generator, dtype=torch.float64))]
    for parameter in dense + experts:
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    expected = torch.nn.utils.clip_grad_norm_(dense + experts, max_norm)
    whole = [parameter.grad.clone() for parameter in dense + experts if parameter.grad is not None]

    generator.manual_seed(0)
    for parameter in dense + experts:
        torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    for parameter in dense + experts:
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    rows = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    mine = nn.Parameter(experts[0][rows].detach())
    assert experts[0].grad is not None
    mine.grad = experts[0].grad[rows].clone()
    norm = clip_by_norm_of_all_([*dense, mine], max_norm, [mine], groups)
    assert abs(float(norm - expected)) < 1e-12
    for parameter, grad in zip([*dense, mine], [*whole[:2], whole[2][rows]], strict=True):
        assert parameter.grad is not None
        assert float((parameter.grad - grad).abs().max()) < 1e-12


def test_clip_grad_norm_without_expert_gradients_on_one_rank_is_equal(workers: Workers) -> None:
    assert workers.run(2, clip_where_one_has_none) == [5.0, 5.0]


def clip_where_one_has_none() -> float:
    groups = ExpertGroups.create()
    dense, expert = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1, 1))
    dense.grad = torch.tensor([3.0])
    if dist.get_rank() == 1:
        expert.grad = torch.tensor([[4.0]])
    return float(clip_by_norm_of_all_([dense, expert], 10.0, [expert], groups))


@pytest.mark.parametrize("sizes", [{"efsdp": 2, "ep": 2}, {"efsdp": 4, "ep": 1}, {"replicate": 2, "efsdp": 1, "ep": 2}])
def test_clip_grad_norm_of_several_meshes_equals_unsharded(sizes: dict[str, int], workers: Workers) -> None:
    for difference in workers.run(4, clip_sharded, sizes):
        assert difference < 1e-12


def clip_sharded(sizes: dict[str, int]) -> float:
    original, tokens = hugging_face_model("mixtral"), token_batches(8)
    language_loss(original, tokens).backward()
    model = hugging_face_model("mixtral")
    fully_shard_moe(model, init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes)))
    language_loss(model, tokens[2 * dist.get_rank() :][:2]).backward()
    layers = list(expert_layers(model))
    experts = [parameter for _, module in layers for parameter in module.parameters()]

    expected = torch.nn.utils.clip_grad_norm_(original.parameters(), 0.1)
    norm = clip_by_norm_of_all_(model.parameters(), 0.1, experts, layers[0][0].groups)
    differences = [abs(float(norm - expected)), largest_gradient_difference(model, original)]
    torch.nn.utils.clip_grad_value_(original.parameters(), 1e-3)
    clip_grad_value_(model.parameters(), 1e-3)
    differences.append(largest_gradient_difference(model, original))
    assert max(float(p.grad.abs().max()) for p in original.parameters() if p.grad is not None) == 1e-3
    return max(differences)


def largest_gradient_difference(ours: nn.Module, theirs: nn.Module) -> float:
    expected = dict(theirs.named_parameters())
    differences = []
    for name, parameter in ours.named_parameters():
        grad, reference = parameter.grad, expected[name].grad
        assert grad is not None
        assert reference is not None
        differences.append(float((whole(grad) - reference).abs().max()))
    return max(differences)
