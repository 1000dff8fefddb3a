"""Expert modules are found by structure, converted in place, and refused in words."""

import copy
import inspect
from importlib import import_module
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lightning_eplb import ExpertLoadBalancer, ExpertPlacement, parallelize_experts
from lightning_eplb.parallel.parallelize import expert_layers
from tests.models import hugging_face_model, language_loss, token_batches
from tests.workers import Workers

FAMILIES = [
    "deepseek_v3",
    "ernie4_5_moe",
    "glm4_moe",
    "jamba",
    "mixtral",
    "muse_spark",
    "nemotron_h",
    "olmoe",
    "qwen3_moe",
]


class AnyConfig:
    """Has whatever an expert module's ``__init__`` asks for, small."""

    _experts_implementation = "eager"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if "act" in name and "factor" not in name:
            return "silu"
        if "latent" in name:
            return None
        return 8 if "expert" in name and "size" not in name and "dim" not in name else 16


def experts_of(family: str) -> list[nn.Module]:
    """The modules of a family's modeling file that are named experts and can be built from a config."""
    source = import_module(f"transformers.models.{family}.modeling_{family}")
    classes = [c for n, c in inspect.getmembers(source, inspect.isclass) if n.endswith("Experts")]
    own = [c for c in classes if c.__module__ == source.__name__ and issubclass(c, nn.Module)]
    return [c(AnyConfig()) for c in own]


@pytest.mark.parametrize("family", FAMILIES)
def test_parallelize_of_each_family_computes_the_same(family: str, workers: Workers) -> None:
    assert max(workers.run(2, difference_of_family, family)) < 1e-12


def difference_of_family(family: str) -> float:
    (original,), (converted,) = ([module.double()] for (module,) in (experts_of(family), experts_of(family)))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in original.parameters():
            parameter.normal_(std=0.3)
    converted.load_state_dict(original.state_dict())
    parallelize_experts(nn.ModuleDict({"experts": converted}), num_redundant_experts=2)
    hidden, index = torch.randn(10, 16, dtype=torch.float64), torch.rand(10, 8).topk(2).indices
    weights = torch.rand(10, 2, dtype=torch.float64)
    return float((original(hidden, index, weights) - converted(hidden, index, weights)).abs().max())


def test_parallelize_of_model_keeps_names_and_parameters(workers: Workers) -> None:
    workers.run(2, names_stay)


def names_stay() -> None:
    model, before = hugging_face_model("mixtral"), hugging_face_model("mixtral")
    parameters = dict(model.named_parameters())
    assert parallelize_experts(model) is model
    assert parallelize_experts(model) is model
    assert [name for name, _ in model.named_modules()] == [name for name, _ in before.named_modules()]
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())
    experts = model.get_submodule("model.layers.0.mlp.experts")
    assert isinstance(experts, type(before.get_submodule("model.layers.0.mlp.experts")))
    assert experts.gate_up_proj.shape[0] == 4
    assert list(model.state_dict()) == list(before.state_dict())
    for name, tensor in before.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)


def test_parallelize_with_unequal_weights_takes_those_of_rank_zero(workers: Workers) -> None:
    workers.run(2, other_weights_on_every_rank)


def other_weights_on_every_rank() -> None:
    model = hugging_face_model("mixtral")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(dist.get_rank())
    parallelize_experts(model)
    expected = hugging_face_model("mixtral").state_dict()
    name = "model.layers.1.mlp.experts.down_proj"
    assert torch.equal(model.state_dict()[name], expected[name])


class Router(nn.Module):
    """Has ``num_experts`` and rows of experts, and is none."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = 8
        self.weight = nn.Parameter(torch.zeros(8, 16))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden @ self.weight.T


def test_parallelize_without_experts_raises_and_names_near_misses() -> None:
    with pytest.raises(ValueError, match="no MoE layer found in ModuleDict: looked for a module with") as raised:
        parallelize_experts(nn.ModuleDict({"router": Router()}))
    assert "router (Router): no parameter of three dimensions" in str(raised.value)


def test_parallelize_of_unequal_numbers_of_experts_converts_all_layers() -> None:
    def experts(count: int) -> nn.Module:
        config = AnyConfig()
        config.num_local_experts = count  # type: ignore[attr-defined]
        return import_module("transformers.models.mixtral.modeling_mixtral").MixtralExperts(config)

    model = parallelize_experts(nn.ModuleDict({"a": experts(8), "b": experts(4)}))
    assert [(layer.name, layer.num_logical_experts) for layer, _ in expert_layers(model)] == [("a", 8), ("b", 4)]


def test_parallelize_of_shared_experts_raises() -> None:
    (first,), (second,) = experts_of("mixtral"), experts_of("mixtral")
    second.down_proj = first.down_proj
    with pytest.raises(ValueError, match=r"b\.down_proj is the same parameter as a\.down_proj"):
        parallelize_experts(nn.ModuleDict({"a": first, "b": second}))


def test_parameter_shared_by_experts_gets_gradient_on_every_rank(workers: Workers) -> None:
    workers.run(2, shared_norm)


def shared_norm() -> None:
    (original,), (converted,) = experts_of("muse_spark"), experts_of("muse_spark")
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in original.parameters():
            parameter.normal_(std=0.3)
    converted.load_state_dict(original.state_dict())
    parallelize_experts(nn.ModuleDict({"experts": converted}))
    hidden, index, weights = torch.randn(4, 16), torch.zeros(4, 1, dtype=torch.int64), torch.rand(4, 1)
    for module in (original, converted):
        module(hidden, index, weights).sum().backward()
    # Both ranks' tokens go to expert 0 on rank 0; under DDP the two gradients are averaged.
    expected = dict(original.named_parameters())["post_expert_norm.weight"].grad
    mine = dict(converted.named_parameters())["post_expert_norm.weight"].grad
    assert expected is not None
    assert mine is not None
    assert torch.allclose(mine, 2 * expected if dist.get_rank() == 0 else torch.zeros_like(expected))


def differences_of_a_copy() -> list[float]:
    """On every worker: of a copy's state dict from what it was copied of, before and after the original has moved."""
    model = parallelize_experts(hugging_face_model("mixtral"))
    copied, expected = copy.deepcopy(model), hugging_face_model("mixtral").state_dict()
    ExpertLoadBalancer(model).rearrange(ExpertPlacement([[4, 1, 2, 3, 0, 5, 6, 7], [7, 6, 5, 4, 3, 2, 1, 0]], 8, 2))
    found = []
    for _ in range(2):
        found.append(max(float((copied.state_dict()[name] - tensor).abs().max()) for name, tensor in expected.items()))
        tokens = token_batches(2)
        found.append(abs(float(language_loss(copied, tokens).detach() - language_loss(model, tokens).detach())))
        copied.load_state_dict(model.state_dict())
    return found


def test_deepcopy_of_parallelized_model_computes_the_same(workers: Workers) -> None:
    for differences in workers.run(2, differences_of_a_copy):
        assert max(differences) < 1e-12
