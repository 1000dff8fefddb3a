"""Recognition of expert modules that fused kernels can compute."""

import importlib
import inspect
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.utils.parametrize as parametrize
import transformers
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.integrations.moe import use_experts_implementation

from lightning_eplb.parallel.fused_form import (
    CONCATENATED,
    GELU,
    GELU_TANH,
    INTERLEAVED,
    PLAIN,
    RELU,
    RELU_SQUARED,
    SIGMOID,
    ActivationArguments,
    FusedForm,
    recognize,
)
from tests.models import hugging_face_model

SWIGLU = ActivationArguments(SIGMOID, 1.0, 0.0, 0.0, CONCATENATED)
LIMITED = ActivationArguments(SIGMOID, 1.0, 10.0, 0.0, CONCATENATED)


def family(name: str, class_name: str, config: str, **settings: Any) -> nn.Module:
    """Experts of a family of transformers, on the meta device."""
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    configuration = importlib.import_module(f"transformers.models.{name}.configuration_{name}")
    with torch.device("meta"):
        return getattr(module, class_name)(getattr(configuration, config)(**settings))


@pytest.mark.parametrize(
    ("name", "class_name", "config", "expected"),
    [
        ("qwen3_moe", "Qwen3MoeExperts", "Qwen3MoeConfig", SWIGLU),
        ("mixtral", "MixtralExperts", "MixtralConfig", SWIGLU),
        ("deepseek_v3", "DeepseekV3Experts", "DeepseekV3Config", SWIGLU),
        ("olmoe", "OlmoeExperts", "OlmoeConfig", SWIGLU),
        ("aria", "AriaExperts", "AriaTextConfig", SWIGLU),
        ("lfm2_moe", "Lfm2MoeExperts", "Lfm2MoeConfig", SWIGLU),
        ("nemotron_h", "NemotronHExperts", "NemotronHConfig", ActivationArguments(RELU_SQUARED, layout=PLAIN)),
        ("gpt_oss", "GptOssExperts", "GptOssConfig", ActivationArguments(SIGMOID, 1.702, 7.0, 1.0, INTERLEAVED)),
    ],
)
def test_fused_form_of_transformers_family_is_recognized(
    name: str, class_name: str, config: str, expected: ActivationArguments
):
    form = recognize(family(name, class_name, config))
    assert isinstance(form, FusedForm)
    assert form.activation == expected
    assert form.is_transposed == (name in ("aria", "gpt_oss"))
    assert form.has_bias == (name == "gpt_oss")


@pytest.mark.slow
def test_fused_form_of_all_transformers_families_is_recognized_but_those_that_differ():
    found: dict[str, FusedForm | str] = {}
    for path in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        if "@use_experts_implementation" in path.read_text(encoding="utf-8"):
            name = path.parent.name
            found |= {key: recognize(module) for key, module in experts_of_family(name)}
    assert len(found) > 50
    reasons = {name: form for name, form in found.items() if isinstance(form, str)}
    assert reasons == {
        "Inkling2Experts": "its forward computes something else than the known forms",  # an activation of its own
        "Inkling2LoopExperts": "its forward computes something else than the known forms",
        "MuseSparkExperts": "a norm follows the experts",
        "OpenAIPrivacyFilterExperts": "its forward computes something else than the known forms",  # in float32
    }


def experts_of_family(name: str) -> Iterator[tuple[str, nn.Module]]:
    """Expert modules of a family, on the meta device, by the name of their class, if its default config builds them."""
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    configuration = importlib.import_module(f"transformers.models.{name}.configuration_{name}")
    configs = [
        value for key, value in vars(configuration).items() if key.endswith("Config") and isinstance(value, type)
    ]
    for key, value in vars(module).items():
        if isinstance(value, type) and hasattr(value, "_apply_gate") and value.__module__ == module.__name__:
            for config in configs:
                with suppress(Exception), torch.device("meta"):
                    yield key, value(config())
                    break


@pytest.mark.parametrize(
    ("act", "expected"),
    [
        ("silu", ActivationArguments(SIGMOID)),
        ("quick_gelu", ActivationArguments(SIGMOID, 1.702)),
        ("gelu", ActivationArguments(GELU)),
        ("gelu_pytorch_tanh", ActivationArguments(GELU_TANH)),
        ("gelu_new", ActivationArguments(GELU_TANH)),
        ("relu", ActivationArguments(RELU)),
        ("relu2", ActivationArguments(RELU_SQUARED)),
    ],
)
def test_fused_form_of_known_activation_has_its_arguments(act: str, expected: ActivationArguments):
    form = recognize(family("mixtral", "MixtralExperts", "MixtralConfig", hidden_act=act))
    assert isinstance(form, FusedForm)
    assert form.activation == expected


@pytest.mark.parametrize("act", ["mish", "tanh", "gelu_10", "laplace", "leaky_relu"])
def test_fused_form_of_other_activation_gives_the_reason(act: str):
    found = recognize(family("mixtral", "MixtralExperts", "MixtralConfig", hidden_act=act))
    assert found == "its forward computes something else than the known forms"


class Experts(nn.Module):
    """Experts of the common form, with one place for a change."""

    def __init__(self, config: Any = None) -> None:
        super().__init__()
        self.num_experts = 4
        self.gate_up_proj = nn.Parameter(torch.randn(4, 12, 8))
        self.down_proj = nn.Parameter(torch.randn(4, 8, 6))
        self.act_fn = ACT2FN["silu"]

    def gate(self, inner: Tensor) -> Tensor:
        gate, up = inner.chunk(2, dim=-1)
        return self.act_fn(gate) * up

    def after(self, output: Tensor) -> Tensor:
        return output

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        output = torch.zeros_like(hidden)
        for expert in range(self.num_experts):
            token, k = torch.where(top_k_index == expert)
            inner = nn.functional.linear(hidden[token], self.gate_up_proj[expert])
            rows = nn.functional.linear(self.gate(inner), self.down_proj[expert])
            output = output.index_add(0, token, self.after(rows) * top_k_weights[token, k, None])
        return output


class OwnLimit(Experts):
    def gate(self, inner: Tensor) -> Tensor:
        gate, up = inner.chunk(2, dim=-1)
        return self.act_fn(gate) * up.clamp(-50, 50)


class OnlyInTraining(Experts):
    def gate(self, inner: Tensor) -> Tensor:
        return super().gate(inner) * (2 if self.training else 1)


class Scaled(Experts):
    def after(self, output: Tensor) -> Tensor:
        return output * self.down_proj.shape[-1] ** -0.5


class Detached(Experts):
    def gate(self, inner: Tensor) -> Tensor:
        gate, up = inner.chunk(2, dim=-1)
        return self.act_fn(gate).detach() * up


class WithNorm(Experts):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)


class WithBuffer(Experts):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(4))


class WithOneBias(Experts):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj_bias = nn.Parameter(torch.zeros(4, 12))


class WithTensor(Experts):
    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.ones(())

    def after(self, output: Tensor) -> Tensor:
        return output * self.scale


class Biased(Experts):
    """Biases of any shape that can be added."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.gate_up_proj_bias = nn.Parameter(torch.randn(4, 12))
        self.down_proj_bias = nn.Parameter(torch.randn(*shape))

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        output = torch.zeros_like(hidden)
        for expert in range(self.num_experts):
            token, k = torch.where(top_k_index == expert)
            inner = nn.functional.linear(hidden[token], self.gate_up_proj[expert]) + self.gate_up_proj_bias[expert]
            rows = nn.functional.linear(self.gate(inner), self.down_proj[expert]) + self.down_proj_bias[expert]
            output = output.index_add(0, token, rows * top_k_weights[token, k, None])
        return output


class Raises(Experts):
    def gate(self, inner: Tensor) -> Tensor:
        raise RuntimeError("needs bfloat16")


OTHER = "its forward computes something else than the known forms"


def test_fused_form_of_module_with_same_protocol_is_recognized():
    assert isinstance(recognize(Experts()), FusedForm)
    assert isinstance(recognize(Biased(4, 8)), FusedForm)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (OwnLimit(), OTHER),
        (OnlyInTraining(), OTHER),
        (Scaled(), OTHER),
        (Detached(), OTHER),
        (WithNorm(), "its submodules have parameters"),
        (WithBuffer(), "it has buffers"),
        (WithTensor(), "it has tensors that are no parameters"),
        (Biased(4, 1), "its biases are not as wide as the outputs"),
        (Biased(4, 1, 8), "its biases are not as wide as the outputs"),
        (Biased(5, 8), "its parameters have different numbers of experts"),
        (WithOneBias(), "its parameters are gate_up_proj, down_proj, gate_up_proj_bias"),
        (Raises(), "its forward raised RuntimeError for random tokens"),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, nn.Module) else "",
)
def test_fused_form_of_module_that_differs_gives_the_reason(module: nn.Module, reason: str):
    assert recognize(module) == reason


def test_fused_form_of_module_with_hooks_parametrizations_or_own_forward_gives_the_reason():
    hooked, inner, parametrized, replaced = (Experts() for _ in range(4))
    hooked.register_forward_hook(lambda *_: None)
    assert recognize(hooked) == "it has hooks"
    inner.act_fn.register_full_backward_hook(lambda *_: None)
    assert recognize(inner) == "a submodule has hooks"
    parametrize.register_parametrization(parametrized, "down_proj", nn.Identity())
    assert recognize(parametrized) == "its parameters are computed by parametrizations"
    replaced.forward = lambda *_: None  # type: ignore[method-assign]
    assert recognize(replaced) == "its forward was replaced on the module itself"


def test_fused_form_of_module_with_norm_after_experts_gives_the_reason():
    @use_experts_implementation(has_post_expert_norm=True)
    class Normed(Experts):
        pass

    assert recognize(Normed(None)) == "a norm follows the experts"


def test_fused_form_after_trial_leaves_module_and_random_state_unchanged():
    model = hugging_face_model("gpt_oss", layers=1)
    module = next(m for m in model.modules() if type(m).__name__ == "GptOssExperts")
    before, state = [p.clone() for p in module.parameters()], torch.get_rng_state()
    assert isinstance(recognize(module), FusedForm)
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), before, strict=True))
    assert all(p.grad is None for p in module.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert list(inspect.signature(type(module).forward).parameters)


def test_fused_form_of_unknown_shapes_gives_the_reason():
    module = Experts()
    module.gate_up_proj = nn.Parameter(torch.randn(4, 13, 8))
    assert recognize(module) == "the shapes of its weights are unknown"
