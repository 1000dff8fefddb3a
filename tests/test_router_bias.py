"""Biases of routers: literal updates, models in which they are found, and training as in one process without us."""

import re
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_eplb import (
    EPLBCallback,
    ExpertLoadBalancer,
    ExpertParallelStrategy,
    RouterBiasCallback,
    RouterBiases,
    parallelize_experts,
)
from lightning_eplb.balancer.step_stats import StepStats
from lightning_eplb.parallel.parallelize import expert_layers
from tests.fidelity import TOLERANCE, ShufflePolicy, trainer_for, whole
from tests.fsdp1 import DoublePrecision, fsdp1, full_state
from tests.models import (
    LanguageModel,
    ShardedLanguageModel,
    hugging_face_model,
    language_loss,
    loader,
    optimizer_of,
    token_batches,
)
from tests.workers import Workers

NAME = "e_score_correction_bias"
STEPS, ACCUMULATION, RATE, SEQUENCES = 6, 2, 0.02, 8
"""Sequences of all ranks in a batch."""


class Router(nn.Module):
    """DeepSeek-V3's router without groups and in float64: float32 sums depend on the number of tokens of a rank."""

    def __init__(self, router: nn.Module, bias_is_parameter: bool) -> None:
        super().__init__()
        self.top_k, self.weight = router.top_k, router.weight
        bias = torch.zeros(1, router.num_experts, dtype=torch.float64)
        if bias_is_parameter:  # as AFMoE's and Ernie's
            self.e_score_correction_bias = nn.Parameter(bias, requires_grad=False)
        else:
            self.register_buffer(NAME, bias[0])

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = nn.functional.linear(hidden.flatten(0, -2), self.weight)
        scores = logits.sigmoid()
        chosen = torch.topk(scores + self.e_score_correction_bias, self.top_k).indices
        weights = scores.gather(1, chosen)
        return logits, weights / weights.sum(dim=-1, keepdim=True), chosen


def deepseek(bias_is_parameter: bool = False, num_experts: int = 8) -> nn.Module:
    model = hugging_face_model("deepseek_v3", num_experts).double()
    for layer in model.model.layers:
        if hasattr(layer.mlp, "gate"):
            layer.mlp.gate = Router(layer.mlp.gate, bias_is_parameter)
    return model


def biases_of(model: nn.Module) -> list[Tensor]:
    return [getattr(owner, name) for owner, name in RouterBiases(model)._owners.values()]


EVER_MORE = torch.arange(8).repeat(2, 1)
"""Load of two layers: each expert has more than the one before."""


def balancer_after(model: nn.Module, load_YL: Tensor) -> ExpertLoadBalancer:
    """A balancer whose latest step had this load."""
    balancer, none_Y = ExpertLoadBalancer(model), torch.zeros(len(load_YL))
    (name,) = balancer.models
    balancer.last_step = StepStats(load_YL, none_Y, none_Y, name=name)
    return balancer


def test_update_moves_biases_by_rate_towards_even_load() -> None:
    model = hugging_face_model("deepseek_v3")
    parallelize_experts(model)
    load_YL = torch.tensor([[1, 3, 2, 2, 2, 2, 2, 2], [0, 0, 0, 0, 0, 0, 0, 8]])
    RouterBiases(model).update(balancer_after(model, load_YL), update_rate=0.25)
    first, second = biases_of(model)
    assert first.tolist() == [0.25, -0.25, 0, 0, 0, 0, 0, 0]
    assert second.tolist() == [0.25] * 7 + [-0.25]


def test_update_in_16_bits_keeps_bias_in_float32() -> None:
    model = hugging_face_model("deepseek_v3").bfloat16()
    parallelize_experts(model)
    biases, balancer = RouterBiases(model), balancer_after(model, EVER_MORE)
    for _ in range(300):
        biases.update(balancer, update_rate=1e-3)
    for bias in biases_of(model):
        assert bias.dtype == torch.float32
        assert bias.abs() == pytest.approx(torch.full((8,), 0.3), abs=1e-5)
    assert model(torch.zeros(1, 8, dtype=torch.long)).logits.isfinite().all()
    assert biases.largest() == pytest.approx(0.3, abs=1e-5)


def test_biases_of_model_with_own_name_are_found() -> None:
    model = deepseek()
    gates = [module for module in model.modules() if NAME in dict(module.named_buffers(recurse=False))]
    for gate in gates:
        gate.register_buffer("my_bias", torch.zeros(8))
    parallelize_experts(model)
    RouterBiases(model, "my_bias").update(balancer_after(model, EVER_MORE), update_rate=1.0)
    for gate in gates:
        assert gate.my_bias.tolist() == [1.0] * 4 + [-1.0] * 4
        assert not getattr(gate, NAME).any()


def test_biases_of_frozen_layer_stay() -> None:
    model = deepseek()
    parallelize_experts(model)
    model.model.layers[1].requires_grad_(False)
    RouterBiases(model).update(balancer_after(model, EVER_MORE), update_rate=1.0)
    frozen, trained = (model.model.layers[i].mlp.gate for i in (1, 2))
    assert not getattr(frozen, NAME).any()
    assert getattr(trained, NAME).all()


def with_trained_bias(model: nn.Module) -> nn.Module:
    gate = model.model.layers[1].mlp.gate
    delattr(gate, NAME)
    gate.register_parameter(NAME, nn.Parameter(torch.zeros(8)))
    return model


def with_two_biases(model: nn.Module) -> nn.Module:
    model.model.layers[1].mlp.register_buffer(NAME, torch.zeros(8))
    return model


@pytest.mark.parametrize(
    ("change", "model", "words"),
    [
        (lambda model: model, "mixtral", r"bias_name=None: no trained MoE layer has a buffer e_score_correction_bias"),
        (lambda model: model.requires_grad_(False), "deepseek_v3", r"no trained MoE layer"),
        (with_trained_bias, "deepseek_v3", r"layers.1.mlp.gate.e_score_correction_bias is trained by the optimizer"),
        (with_two_biases, "deepseek_v3", r"layers.1.mlp has several router biases: .*layers.1.mlp.e_score"),
    ],
)
def test_biases_of_other_models_raise(change: Callable[..., nn.Module], model: str, words: str) -> None:
    changed = change(hugging_face_model(model))
    parallelize_experts(changed)
    with pytest.raises(ValueError, match=words):
        RouterBiases(changed)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"update_rate": 0}, ValueError, r"update_rate=0 must be greater than 0"),
        ({"update_rate": float("nan")}, ValueError, r"update_rate=nan must be greater than 0"),
        ({"update_rate": "fast"}, TypeError, r"update_rate='fast' must be a number"),
        ({"bias_name": 3}, TypeError, r"bias_name=3 must be the name of an attribute"),
    ],
)
def test_callback_with_wrong_argument_raises(arguments: dict[str, Any], error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        RouterBiasCallback(**arguments)


@pytest.mark.parametrize("callbacks", [[], [EPLBCallback()]])
def test_callback_without_counts_before_it_raises(callbacks: list[Any]) -> None:
    trainer = trainer_for(1, callbacks=[RouterBiasCallback(), *callbacks], max_steps=1)
    with pytest.raises(ValueError, match=r"needs an EPLBCallback before it"):
        trainer.fit(LanguageModel(deepseek(), "adamw"), loader(token_batches(2), 1))


def families() -> list[str]:
    """Families of transformers whose source has such a bias."""
    import transformers

    files = (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")
    assigned = re.compile(r"(e_score_correction_bias|expert_bias)\s*=")
    return sorted({file.parent.name for file in files if assigned.search(file.read_text())})


NOT_BUILT = {"dots1", "inkling", "lfm2_moe"}
"""Their default configs build no model on the meta device."""


@pytest.mark.parametrize("family", families())
def test_biases_of_family_are_found_by_structure(family: str) -> None:
    """All of transformers; layers of DeepSeek-V4 that route by hash have none."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    if family in NOT_BUILT | {"longcat_flash"}:  # whose experts work otherwise
        pytest.skip("no model of default config, or not supported")
    config = AutoConfig.for_model(family)
    for part in (config, getattr(config, "text_config", config)):
        part.num_hidden_layers = min(6, getattr(part, "num_hidden_layers", 6))
        for lists in ("layer_types", "mlp_layer_types"):
            if isinstance(getattr(part, lists, None), list):
                setattr(part, lists, getattr(part, lists)[:6])
    is_text = type(config) in AutoModelForCausalLM._model_mapping
    with torch.device("meta"):
        model = (AutoModelForCausalLM if is_text else AutoModelForImageTextToText).from_config(config)
    parallelize_experts(model)
    layers = list(expert_layers(model))
    assert len(biases_of(model)) == (len(layers) // 2 if family == "deepseek_v4" else len(layers)) > 0


def count_tokens(count_L: Tensor, experts: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    count_L += torch.bincount(inputs[1].flatten(), minlength=len(count_L))


@lru_cache
def reference() -> tuple[list[float], dict[str, Tensor]]:
    """Losses and weights of one process, plain PyTorch, the unmodified model, and counts of its own."""
    model, losses = deepseek(), []
    optimizer = optimizer_of("adamw", model)
    blocks = [layer.mlp for layer in model.model.layers if hasattr(layer.mlp, "experts")]
    counts = {id(block): torch.zeros(8, dtype=torch.float64) for block in blocks}
    for block in blocks:
        block.experts.register_forward_pre_hook(partial(count_tokens, counts[id(block)]))
    for i, batch in enumerate(token_batches(STEPS * ACCUMULATION * SEQUENCES).split(SEQUENCES)):
        loss = language_loss(model, batch)
        losses.append(loss.item())
        (loss / ACCUMULATION).backward()
        if (i + 1) % ACCUMULATION == 0:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
            for block in blocks:
                count = counts[id(block)]
                getattr(block.gate, NAME).add_(RATE * torch.sign(count.mean() - count))
                count.zero_()
    return losses, {name: tensor.clone() for name, tensor in model.state_dict().items()}


def train(
    kind: str, ranks: int, ep_size: int | None, folder: str, steps: int, ckpt_path: str | None = None
) -> tuple[list[float], dict[str, Tensor], dict[str, float]]:
    """Experts are shuffled after every step, with a validation between steps."""
    model = deepseek(bias_is_parameter=kind == "sharded parameters")
    module, strategy, plugins = LanguageModel(model, "adamw"), None, []
    if kind.startswith("sharded"):
        module, strategy = ShardedLanguageModel(model, "adamw", 2), ExpertParallelStrategy(ep_size)
    if kind == "fsdp1":
        strategy, plugins = fsdp1(sharding_strategy="FULL_SHARD"), [DoublePrecision()]
    redundant = 0 if ep_size == 1 else 2
    eplb = EPLBCallback(redundant, ep_size, ShufflePolicy(), step_interval=1)
    checkpoint = ModelCheckpoint(folder, "half", every_n_train_steps=STEPS // 2, save_top_k=1, monitor=None)
    trainer = trainer_for(
        ranks,
        strategy,
        plugins=plugins,
        max_steps=steps,
        accumulate_grad_batches=ACCUMULATION,
        gradient_clip_val=0.5,
        callbacks=[eplb, RouterBiasCallback(RATE), checkpoint],
        enable_checkpointing=True,
        val_check_interval=4,
        log_every_n_steps=1,
    )
    size = SEQUENCES // ranks
    tokens = token_batches(STEPS * ACCUMULATION * SEQUENCES)
    trainer.fit(module, loader(tokens, size), loader(token_batches(8, seed=7), 2), ckpt_path=ckpt_path)
    if kind == "fsdp1":
        weights, _ = full_state(trainer)
    else:
        weights = {name: whole(tensor) for name, tensor in module.model.state_dict().items()}
    logged = {name: float(trainer.callback_metrics[name]) for name in ("eplb/router_bias", "eplb/max_violation")}
    return module.losses, weights, logged


@pytest.mark.parametrize(
    ("kind", "ranks", "ep_size"),
    [
        ("ddp", 2, 2),
        ("ddp", 2, 1),
        pytest.param("sharded", 4, 2, marks=pytest.mark.slow),
        ("sharded parameters", 2, 2),
        pytest.param("fsdp1", 2, 2, marks=pytest.mark.slow),
    ],
)
def test_training_with_bias_and_resume_equals_one_process(
    kind: str, ranks: int, ep_size: int, workers: Workers, tmp_path: Path
) -> None:
    losses, weights = reference()
    halves = []
    for steps, ckpt_path in ((STEPS // 2, None), (STEPS, str(tmp_path / "half.ckpt"))):
        halves.append(workers.run(ranks, train, kind, ranks, ep_size, str(tmp_path), steps, ckpt_path, seconds=120))
    ours = np.concatenate([np.mean([rank[0] for rank in half], axis=0) for half in halves])
    assert np.abs(ours - np.array(losses)).max() < TOLERANCE
    for _, weights_of_rank, logged in halves[-1]:
        assert set(weights_of_rank) == set(weights)
        for name, tensor in weights.items():
            assert float((weights_of_rank[name].view(tensor.shape) - tensor).abs().max()) < TOLERANCE, name
        largest = max(float(tensor.abs().max()) for name, tensor in weights.items() if name.endswith(NAME))
        assert logged["eplb/router_bias"] == pytest.approx(largest)
        assert logged["eplb/max_violation"] > 0
    biases = [tensor for name, tensor in weights.items() if name.endswith(NAME)]
    assert all(len(bias.unique()) > 2 for bias in biases)  # of several updates that differ by expert


def test_training_with_other_rate_differs_from_reference(workers: Workers, tmp_path: Path) -> None:
    """The comparison can fail: without the bias the losses are others."""
    losses, _ = reference()
    module = LanguageModel(deepseek(), "adamw")
    trainer: Trainer = trainer_for(
        1, max_steps=STEPS, accumulate_grad_batches=ACCUMULATION, gradient_clip_val=0.5, callbacks=[EPLBCallback()]
    )
    trainer.fit(module, loader(token_batches(STEPS * ACCUMULATION * SEQUENCES), SEQUENCES))
    assert np.abs(np.array(module.losses) - np.array(losses)).max() > 1e-4


class TwoModels(LanguageModel):
    """Two models with different numbers of experts, which have windows of their own."""

    def __init__(self) -> None:
        super().__init__(nn.ModuleList([deepseek(), deepseek(num_experts=16)]), "adamw")

    def training_step(self, batch: tuple[Tensor], batch_idx: int) -> Tensor:
        return language_loss(self.model[0], batch[0]) + language_loss(self.model[1], batch[0])


def test_callback_with_two_models_moves_biases_of_both() -> None:
    module = TwoModels()
    callbacks = [EPLBCallback(), RouterBiasCallback(RATE)]
    trainer_for(1, max_steps=2, callbacks=callbacks).fit(module, loader(token_batches(8), 4))
    biases = biases_of(module)
    assert sorted(len(bias) for bias in biases) == [8, 8, 16, 16]
    assert all(bias.any() for bias in biases)
