"""Fused experts against the modules that they replace, in Triton's interpreter or on a GPU."""

import copy
import logging
import os
import weakref
from collections.abc import Callable, Sequence

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

from lightning_eplb import EPLBCallback, ExpertLoadBalancer, fully_shard_moe, parallelize_experts
from lightning_eplb.parallel import forward, fused_kernels
from lightning_eplb.parallel import fused_experts as fused_module
from lightning_eplb.parallel.expert_layer import ExpertLayer
from lightning_eplb.parallel.fused_choice import choose
from lightning_eplb.parallel.fused_experts import compute_tokens, fused_experts, warm_up
from lightning_eplb.parallel.fused_form import FusedForm, recognize
from lightning_eplb.parallel.parallelize import expert_layers
from tests.models import LanguageModel, hugging_face_model, language_loss, token_batches
from tests.workers import Workers

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
FAMILIES = ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss"]
EXPERTS, WIDTH = 8, 16


def experts_of(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    model = hugging_face_model(name, num_experts=EXPERTS, layers=1).to(DEVICE, dtype)
    return next(module for module in model.modules() if type(module).__name__.endswith("Experts"))


def form_of(module: nn.Module) -> FusedForm:
    form = recognize(module)
    assert isinstance(form, FusedForm)
    return form


def gradients(output: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    slopes = torch.linspace(-1, 1, output.numel(), dtype=output.dtype, device=output.device).view(output.shape)
    return list(torch.autograd.grad(output, inputs, slopes))


def routed(tokens: int, top_k: int, dtype: torch.dtype, experts: int = EXPERTS) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, WIDTH, generator=generator, dtype=torch.float64)
    scores = torch.rand(tokens, experts, generator=generator, dtype=torch.float64)
    weights, index = scores.topk(top_k, dim=-1)
    return hidden.to(DEVICE, dtype), index.to(DEVICE), weights.to(DEVICE, dtype)


def compare(module: nn.Module, index: Tensor, dtype: torch.dtype, tolerance: float) -> None:
    """Outputs and all gradients of :func:`compute_tokens` against the module's own forward in float64."""
    hidden, _, weights = routed(*index.shape, dtype)
    exact = copy.deepcopy(module).double()
    inputs = [hidden.double().requires_grad_(), weights.double().requires_grad_()]
    ids = index.where((index >= 0) & (index < EXPERTS), 0)
    mask = (index >= 0) & (index < EXPERTS)
    expected = exact(inputs[0], ids, inputs[1] * mask)
    expected = [expected, *gradients(expected, [*inputs, *exact.parameters()])]
    inputs = [hidden.requires_grad_(), weights.requires_grad_()]
    output, counts = compute_tokens(form_of(module), list(module.parameters()), inputs[0], index, inputs[1])
    assert output.dtype == dtype
    assert torch.equal(counts, torch.bincount(index[mask], minlength=EXPERTS))
    found = [output, *gradients(output, [*inputs, *module.parameters()])]
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.double() - theirs).norm() <= tolerance * theirs.norm()
    assert (found[2][~mask] == 0).all()


@pytest.mark.parametrize("name", FAMILIES)
def test_fused_experts_in_float64_compute_as_the_module(name: str):
    compare(experts_of(name), routed(9, 3, torch.float64)[1], torch.float64, 1e-13)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_fused_experts_in_lower_precision_are_within_rounding(name: str, dtype: torch.dtype, tolerance: float):
    compare(experts_of(name, dtype), routed(9, 3, dtype)[1], dtype, tolerance)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_fused_experts_with_ids_of_no_expert_add_nothing(name: str):
    index = routed(9, 3, torch.float64)[1]
    index[0], index[3, 1], index[index == 2], index[8, 0] = EXPERTS, -1, EXPERTS + 3, 2**40
    compare(experts_of(name), index, torch.float64, 1e-13)


def test_fused_experts_with_only_ids_of_no_expert_return_zeros():
    module = experts_of("gpt_oss")
    hidden, index, weights = routed(4, 2, torch.float64)
    inputs = [hidden.requires_grad_(), weights.requires_grad_(), *module.parameters()]
    parameters = list(module.parameters())
    output, _ = compute_tokens(form_of(module), parameters, hidden, torch.full_like(index, EXPERTS), weights)
    assert not any(x.any() for x in (output, *gradients(output, inputs)))


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("counts", [[3, 2, 4, 1, 0, 2, 0, 1], [0, 0, 5, 0, 0, 0, 0, 0], [0] * EXPERTS])
@pytest.mark.parametrize("is_weighted", [True, False])
def test_fused_experts_of_sorted_rows_compute_as_the_module(name: str, counts: list[int], is_weighted: bool):
    module, form = experts_of(name), form_of(experts_of(name))
    slots = torch.repeat_interleave(torch.arange(EXPERTS), torch.tensor(counts)).to(DEVICE)
    ends = torch.tensor(counts, device=DEVICE).cumsum(0).to(torch.int32)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(len(slots), WIDTH, generator=generator, dtype=torch.float64).to(DEVICE).requires_grad_()
    weights = torch.rand(len(slots), generator=generator, dtype=torch.float64).to(DEVICE).requires_grad_()
    inputs = [rows, *module.parameters(), *([weights] if is_weighted else [])]
    given = weights if is_weighted else torch.ones_like(weights)
    expected = form.compute(list(module.parameters()), rows, slots[:, None], given[:, None])
    expected_grads = gradients(expected, inputs)
    found = fused_experts(form, list(module.parameters()), rows, ends, weights if is_weighted else None)
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(gradients(found, inputs), expected_grads, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_fused_experts_with_rows_of_no_expert_leave_gradients_alone(name: str):
    module, form = experts_of(name), form_of(experts_of(name))
    ends = torch.tensor([2, 3, 3, 4, 4, 4, 5, 6], dtype=torch.int32, device=DEVICE)
    rows = torch.randn(9, WIDTH, dtype=torch.float64, device=DEVICE)
    rows[6:] = float("nan")
    weights = torch.rand(9, dtype=torch.float64, device=DEVICE)
    weights[6:] = float("nan")
    results = []
    for used in (slice(None), slice(6)):
        inputs = [rows[used].clone().requires_grad_(), weights[used].clone().requires_grad_(), *module.parameters()]
        output = fused_experts(form, list(module.parameters()), inputs[0], ends, inputs[1])
        grad = torch.full_like(output, float("nan"))
        grad[:6] = 1.0
        grads = torch.autograd.grad(output, inputs, grad)
        results.append([output[:6], grads[0][:6], grads[1][:6], *grads[2:]])
        assert not grads[1][6:].any()
    for with_tail, without in zip(*results, strict=True):
        torch.testing.assert_close(with_tail, without)


def test_warm_up_of_sorted_rows_launches_every_kernel(monkeypatch: pytest.MonkeyPatch):
    def kernels_of(function: Callable[[], None]) -> set[tuple]:
        """Each kernel that is launched, with what it is compiled for."""
        launched: set[tuple] = set()

        def launch(kernel: object, grid: object, tensors: Sequence[Tensor], numbers: object, constants: tuple) -> None:
            launched.add((id(kernel), constants, *(tensor.dtype for tensor in tensors)))
            original(kernel, grid, tensors, numbers, constants)  # type: ignore[arg-type]

        monkeypatch.setattr(fused_kernels, "launch", launch)
        function()
        return launched

    original = fused_kernels.launch
    module, form = experts_of("gpt_oss", torch.bfloat16), form_of(experts_of("gpt_oss"))
    rows = torch.randn(6, WIDTH, dtype=torch.bfloat16, device=DEVICE)
    ends = torch.tensor([1, 2, 2, 4, 4, 4, 5, 6], dtype=torch.int32, device=DEVICE)

    def train() -> None:
        for weights in (None, torch.ones(6, device=DEVICE), torch.ones(6, device=DEVICE, requires_grad=True)):
            fused_experts(form, list(module.parameters()), rows, ends, weights).sum().backward()

    def few_experts() -> None:
        few = [parameter[:2] for parameter in module.parameters()]
        fused_experts(form, few, rows[:2], ends[:2], None).sum().backward()

    warm = kernels_of(lambda: warm_up(form, list(module.parameters()), [None, torch.float32]))
    assert kernels_of(train) <= warm
    assert kernels_of(few_experts) <= warm


@pytest.mark.parametrize("trained", range(6))
def test_fused_experts_partly_frozen_compute_only_trained_gradients(trained: int):
    module, form = experts_of("gpt_oss"), form_of(experts_of("gpt_oss"))
    hidden, index, weights = routed(5, 2, torch.float64)
    inputs = [hidden, weights, *(p.detach() for p in module.parameters())]
    everything = [x.clone().requires_grad_() for x in inputs]
    output, _ = compute_tokens(form, everything[2:], everything[0], index, everything[1])
    expected = gradients(output, everything)[trained]
    inputs[trained] = inputs[trained].clone().requires_grad_()
    output, _ = compute_tokens(form, inputs[2:], inputs[0], index, inputs[1])
    torch.testing.assert_close(gradients(output, [inputs[trained]])[0], expected)


@pytest.mark.parametrize("is_sorted", [True, False])
def test_fused_experts_with_retained_graph_compute_gradients_again(is_sorted: bool):
    module = experts_of("gpt_oss")
    form, parameters = form_of(module), list(module.parameters())
    hidden, index, weights = routed(5, 1, torch.float64)
    inputs = [hidden.requires_grad_(), weights.requires_grad_(), *parameters]
    if is_sorted:
        ends = torch.tensor([1, 2, 2, 4, 4, 4, 5, 5], dtype=torch.int32, device=DEVICE)
        output = fused_experts(form, parameters, hidden, ends, weights.view(-1))
    else:
        output, _ = compute_tokens(form, parameters, hidden, index, weights)
    first = torch.autograd.grad(output.sum(), inputs, retain_graph=True)
    second = torch.autograd.grad(output.sum(), inputs)
    assert all(map(torch.equal, first, second))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(output.sum(), inputs)


def test_fused_experts_in_backward_free_the_first_product_before_weight_gradients(monkeypatch: pytest.MonkeyPatch):
    module = experts_of("mixtral")
    hidden, index, weights = routed(5, 2, torch.float64)
    inner: list[weakref.ref[Tensor]] = []
    activate = fused_kernels.activate
    monkeypatch.setattr(fused_kernels, "activate", lambda *args: inner.append(weakref.ref(args[0])) or activate(*args))
    output, _ = compute_tokens(form_of(module), list(module.parameters()), hidden, index, weights)
    alive = []
    grouped = fused_module.grouped_gradient
    monkeypatch.setattr(fused_module, "grouped_gradient", lambda *args: alive.append(inner[0]()) or grouped(*args))
    output.sum().backward()
    assert alive == [None, None]


def test_fused_experts_with_second_derivatives_raise():
    module = experts_of("mixtral")
    hidden, index, weights = routed(5, 2, torch.float64)
    hidden.requires_grad_()
    output, _ = compute_tokens(form_of(module), list(module.parameters()), hidden, index, weights)
    with pytest.raises(RuntimeError, match=r"fused experts have no second derivatives.*fused_experts=False"):
        torch.autograd.grad(output.sum(), hidden, create_graph=True)


def test_fused_experts_under_autocast_compute_in_dtype_of_weights():
    module = experts_of("mixtral", torch.float32)
    hidden, index, weights = routed(5, 2, torch.float32)
    form, parameters = form_of(module), list(module.parameters())
    expected, _ = compute_tokens(form, parameters, hidden, index, weights)
    with torch.autocast(DEVICE, torch.bfloat16):
        found, _ = compute_tokens(form, parameters, hidden.bfloat16(), index, weights)
        assert found.dtype == torch.bfloat16
        again, _ = compute_tokens(form, parameters, hidden, index, weights)
    assert torch.equal(again, expected)
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05)


# Converted models on one rank


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of tokens of each call of the fused path."""
    counted: list[int] = []

    def compute(*args: object) -> tuple[Tensor, Tensor]:
        counted.append(len(args[2]))  # type: ignore[arg-type]
        return compute_tokens(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(forward, "compute_tokens", compute)
    return counted


def train_step(model: nn.Module, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor | None]]:
    model.zero_grad()
    loss = language_loss(model, tokens)
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def check_same(model: nn.Module, other: nn.Module) -> None:
    tokens = token_batches(2).to(DEVICE)
    (loss, grads), (expected, expected_grads) = train_step(model, tokens), train_step(other, tokens)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for name, grad in expected_grads.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", FAMILIES)
def test_fused_model_on_one_rank_computes_as_unmodified_and_counts_load(name: str, calls: list[int]):
    plain, fused = (hugging_face_model(name).to(DEVICE) for _ in range(2))
    parallelize_experts(fused, fused_experts=True)
    counting = parallelize_experts(hugging_face_model(name).to(DEVICE))
    balancers = [ExpertLoadBalancer(model) for model in (fused, counting)]
    check_same(fused, plain)
    train_step(counting, token_batches(2).to(DEVICE))
    assert len(calls) == len(list(expert_layers(fused)))
    stats = [balancer.step() for balancer in balancers]
    assert stats[0] is not None
    assert stats[1] is not None
    assert (stats[0].load == stats[1].load).all()
    assert stats[0].load.sum() == 2 * 8 * 2 * len(calls)


@pytest.mark.parametrize("reentrant", [True, False])
def test_fused_model_under_checkpointing_counts_tokens_once(reentrant: bool, calls: list[int]):
    plain, fused = (hugging_face_model("qwen3_moe").to(DEVICE) for _ in range(2))
    parallelize_experts(fused, fused_experts=True)
    fused.gradient_checkpointing_enable({"use_reentrant": reentrant})  # type: ignore[operator]
    fused.get_input_embeddings().register_forward_hook(lambda *args: args[-1].requires_grad_())  # type: ignore
    balancer = ExpertLoadBalancer(fused)
    check_same(fused, plain)
    assert len(calls) == 4  # two layers, forward and again
    stats = balancer.step()
    assert stats is not None
    assert stats.load.sum() == 2 * 8 * 2 * 2


def test_fused_model_under_selective_checkpointing_recomputes_only_what_is_not_kept():
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    def policy(_: object, operation: object, *args: object, **kwargs: object) -> CheckpointPolicy:
        keeps = "mm" in str(operation)
        return CheckpointPolicy.MUST_SAVE if keeps else CheckpointPolicy.PREFER_RECOMPUTE

    module, form = experts_of("gpt_oss"), form_of(experts_of("gpt_oss"))
    hidden, index, weights = routed(5, 2, torch.float64)
    inputs = [hidden.requires_grad_(), weights.requires_grad_(), *module.parameters()]

    def compute(*inputs: Tensor) -> Tensor:
        return compute_tokens(form, inputs[2:], inputs[0], index, inputs[1])[0]

    expected = gradients(compute(*inputs), inputs)
    contexts = lambda: create_selective_checkpoint_contexts(policy)  # noqa: E731
    output = checkpoint(compute, *inputs, use_reentrant=False, context_fn=contexts)
    for ours, theirs in zip(gradients(output, inputs), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_fused_model_in_evaluation_calls_the_kernels(mode: type, calls: list[int]):
    plain, fused = (hugging_face_model("mixtral").to(DEVICE).eval() for _ in range(2))
    parallelize_experts(fused, fused_experts=True)
    tokens = token_batches(2).to(DEVICE)
    with mode():
        torch.testing.assert_close(language_loss(fused, tokens), language_loss(plain, tokens), rtol=1e-12, atol=0)
    assert len(calls) == 2


def test_fused_model_with_frozen_experts_computes_no_gradient_of_them(calls: list[int]):
    plain, fused = (hugging_face_model("mixtral").to(DEVICE) for _ in range(2))
    parallelize_experts(fused, fused_experts=True)
    for model in (plain, fused):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("experts" not in name)
    check_same(fused, plain)
    assert len(calls) == 2


def test_fused_model_without_tokens_runs_the_module(calls: list[int]):
    module = converted(experts_of("qwen3_moe"))
    hidden, index, weights = routed(0, 2, torch.float64)
    assert module(hidden, index, weights).shape == (0, WIDTH)
    assert calls == []


def test_fused_model_when_compiled_calls_kernels_outside_of_graphs(calls: list[int]):
    plain, fused = (experts_of("qwen3_moe") for _ in range(2))
    converted(fused)
    inputs = routed(5, 2, torch.float64)
    compiled = torch.compile(fused, backend="eager")
    torch.testing.assert_close(compiled(*inputs), plain(*inputs))
    assert calls == [5]


# Choice between the kernels and the module's own forward


def converted(module: nn.Module, setting: bool | None = True) -> nn.Module:
    parallelize_experts(nn.ModuleList([module]), fused_experts=setting)
    return module


def layer_of(module: nn.Module) -> ExpertLayer:
    return module.expert_layer  # type: ignore[return-value]


@pytest.mark.parametrize("setting", [None, False])
def test_fused_setting_on_one_rank_fuses_only_if_true(setting: bool | None, calls: list[int]):
    module = converted(experts_of("qwen3_moe"), setting)
    module(*routed(5, 2, torch.float64))
    assert calls == []


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fused_setting_with_float8_keeps_the_modules_forward(dtype: torch.dtype):
    module = converted(experts_of("qwen3_moe"))
    weights = [parameter.detach().to(dtype) for parameter in module.parameters()]
    assert layer_of(module).fused_choice.form_for(module, weights, False) is None
    assert layer_of(module).fused_choice.reason == f"weights are {dtype}"


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU they are fused")
def test_fused_setting_on_several_cpu_ranks_fuses_only_if_true():
    module = experts_of("qwen3_moe", torch.bfloat16)
    choice = choose([module], None, 2)[0]
    assert choice.form_for(module, list(module.parameters()), False) is None
    assert choice.reason == "the kernels need a GPU and Triton"


def test_fused_setting_with_weights_on_cpu_of_a_gpu_machine_keeps_own_forward(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    module = experts_of("qwen3_moe", torch.bfloat16)
    choice = choose([module], None, 2)[0]
    assert choice.form is not None
    assert choice.form_for(module, list(module.parameters()), False) is None
    assert choice.reason == "the kernels need a GPU and Triton, and weights are on cpu"


@pytest.mark.parametrize(
    ("dtype", "implementation", "reason"),
    [
        (torch.bfloat16, "grouped_mm", None),
        (torch.float16, "grouped_mm", None),
        (torch.float32, "grouped_mm", "weights are torch.float32"),
        (torch.bfloat16, "eager", "its implementation is 'eager'"),
    ],
)
def test_fused_setting_on_several_gpu_ranks_fuses_what_is_fast(
    dtype: torch.dtype, implementation: str, reason: str | None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    module = experts_of("qwen3_moe", dtype)
    module.config._experts_implementation = implementation  # type: ignore[union-attr]
    choice = choose([module], None, 2)[0]
    weights = [OnGpu(dtype) for _ in module.parameters()]
    form = choice.form_for(module, weights, False)  # type: ignore[arg-type]
    assert choice.reason == reason
    assert (form is None) == (reason is not None)


class OnGpu:
    """Stands for a tensor on a GPU that need not be there."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.device, self.is_cuda = dtype, torch.device("cuda"), True


def test_fused_model_changed_after_conversion_keeps_the_modules_forward(calls: list[int]):
    inputs = routed(5, 2, torch.float64)
    module = converted(experts_of("qwen3_moe"))
    handle = module.act_fn.register_forward_hook(lambda *_: None)  # type: ignore[operator]
    module(*inputs)
    assert layer_of(module).fused_choice.reason == "a submodule has hooks"
    handle.remove()
    module.config._experts_implementation = "deepgemm"  # type: ignore[union-attr]
    assert layer_of(module).fused_choice.form_for(module, list(module.parameters()), False) is None
    assert layer_of(module).fused_choice.reason == "its implementation is 'deepgemm'"
    module.config._experts_implementation = "eager"  # type: ignore[union-attr]
    module.act_fn = nn.Tanh()
    module(*inputs)
    assert layer_of(module).fused_choice.reason == "its activation was changed"
    assert calls == []


def test_fused_model_with_limit_changed_after_conversion_keeps_the_modules_forward(calls: list[int]):
    module = converted(experts_of("gpt_oss"))
    module.limit = 0.1
    expected = experts_of("gpt_oss")
    expected.limit = 0.1
    inputs = routed(5, 2, torch.float64)
    torch.testing.assert_close(module(*inputs), expected(*inputs))
    assert calls == []


def double(value: Tensor) -> Tensor:
    return 2 * value


@pytest.mark.parametrize(
    "change",
    [
        lambda module: vars(module.act_fn).update(approximate="tanh"),
        lambda module: vars(module.act_fn).update(forward=double),
        lambda module: vars(module).update(factor=2.0),
        lambda module: vars(module).update(after=double),
    ],
    ids=["in the activation", "forward of the activation", "attribute", "method"],
)
def test_attributes_changed_after_the_conversion_keep_the_modules_forward(
    change: Callable[[nn.Module], None], calls: list[int]
):
    module, expected = converted(WithFactor(1.0)), WithFactor(1.0)
    inputs = routed(5, 2, torch.float64)
    torch.testing.assert_close(module(*inputs), expected(*inputs))
    assert calls == [5]
    change(module)
    change(expected)
    torch.testing.assert_close(module(*inputs), expected(*inputs))
    assert calls == [5]


class WithFactor(nn.Module):
    """Experts whose outputs are multiplied by an attribute."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.num_experts, self.factor, self._factor = EXPERTS, 1.0, factor
        self.up_proj = nn.Parameter(torch.randn(EXPERTS, 12, WIDTH, dtype=torch.float64, device=DEVICE))
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, WIDTH, 12, dtype=torch.float64, device=DEVICE))
        self.act_fn = nn.GELU()

    def after(self, rows: Tensor) -> Tensor:
        return rows

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        output = torch.zeros_like(hidden)
        for expert in range(self.num_experts):
            token, k = torch.where(top_k_index == expert)
            rows = self.act_fn(hidden[token] @ self.up_proj[expert].t()) @ self.down_proj[expert].t()
            rows = self.after(rows) * self.factor * self._factor
            output = output.index_add(0, token, rows * top_k_weights[token, k, None])
        return output


def test_layers_that_differ_in_a_private_attribute_or_an_activation_are_tried_each():
    class Gate(nn.GELU):
        def extra_repr(self) -> str:
            return ""

    models = [WithFactor(1.0), WithFactor(0.5), WithFactor(1.0)]
    for model, approximate in zip(models, ("none", "none", "tanh"), strict=True):
        model.act_fn = Gate(approximate)
    forms = [choice.form for choice in choose(models, True, 1)]
    assert forms[0] is not None
    assert forms[1] is None
    assert forms[2] not in (None, forms[0])


def test_biases_in_another_layout_are_read_as_the_module_reads_them():
    module = experts_of("gpt_oss")
    for name in ("gate_up_proj_bias", "down_proj_bias"):
        bias = getattr(module, name).detach()
        setattr(module, name, nn.Parameter(bias.t().contiguous().t()))
    assert not module.down_proj_bias.is_contiguous()  # type: ignore[operator]
    compare(module, routed(9, 3, torch.float64)[1], torch.float64, 1e-13)


def test_fused_model_with_hook_on_module_passes_it_the_fused_output(calls: list[int]):
    module, seen = converted(experts_of("qwen3_moe")), []
    module.register_forward_hook(lambda *args: seen.append(args[-1]))
    output = module(*routed(5, 2, torch.float64))
    assert seen[0] is output
    assert calls == [5]


def test_fused_model_when_copied_is_fused(calls: list[int]):
    module = converted(experts_of("gpt_oss"))
    inputs = routed(5, 2, torch.float64)
    assert torch.equal(copy.deepcopy(module)(*inputs), module(*inputs))
    assert calls == [5, 5]


def test_fused_form_of_layers_that_differ_is_tried_for_each():
    first, second = experts_of("mixtral"), experts_of("mixtral")
    second.act_fn = nn.Mish()
    parallelize_experts(nn.ModuleList([first, second]), fused_experts=True)
    assert layer_of(first).fused_choice.form is not None
    assert layer_of(second).fused_choice.form is None


def test_fused_model_with_equal_layers_logs_the_path_once(caplog: pytest.LogCaptureFixture):
    model = parallelize_experts(hugging_face_model("qwen3_moe").to(DEVICE), fused_experts=True)
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            train_step(model, token_batches(2).to(DEVICE))
    told = [record.message for record in caplog.records if "experts of" in record.message]
    assert told == ["experts of model.layers.0.mlp.experts compute by fused kernels"]


def test_fused_setting_with_unknown_form_warns_why():
    model = hugging_face_model("qwen3_moe")
    for module in model.modules():
        if type(module).__name__ == "Qwen3MoeExperts":
            module.act_fn = nn.Mish()
    with pytest.warns(UserWarning, match="fused_experts=True has no effect: .* the forward of Qwen3MoeExperts, as its"):
        parallelize_experts(model, fused_experts=True)


@pytest.mark.parametrize("value", [1, "yes"])
def test_fused_setting_of_wrong_value_raises(value: object):
    with pytest.raises(ValueError, match=r"fused_experts=.* must be True or False"):
        parallelize_experts(hugging_face_model("mixtral"), fused_experts=value)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"fused_experts=.* must be True or False"):
        EPLBCallback(fused_experts=value)  # type: ignore[arg-type]


@pytest.mark.parametrize("converts", [True, False])
def test_fused_setting_of_callback_reaches_the_layers(converts: bool, calls: list[int], tmp_path: object):
    class Model(LanguageModel):
        def configure_model(self) -> None:
            if converts:
                parallelize_experts(self, fused_experts=False)

    losses = []
    for setting in (True, None):
        model = Model(hugging_face_model("mixtral"), "sgd")
        trainer = pl.Trainer(
            accelerator="cpu" if DEVICE == "cpu" else "gpu",
            devices=1,
            max_steps=2,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[EPLBCallback(fused_experts=setting)],
        )
        batches = torch.utils.data.TensorDataset(token_batches(4))
        trainer.fit(model, torch.utils.data.DataLoader(batches, batch_size=2))
        losses.append(model.losses)
        assert len(calls) == 4
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


# Over several ranks


def train_over_ranks(name: str, num_redundant_experts: int, by_batch: bool) -> tuple[float, dict, set]:
    """Loss, logical gradients and the reasons of layers that were not fused."""
    model = hugging_face_model(name)
    parallelize_experts(model, num_redundant_experts=num_redundant_experts, fused_experts=True)
    ExpertLoadBalancer(model, redundancy="batch" if by_batch else "window", min_tokens_per_copy=1 if by_batch else None)
    loss = language_loss(model, token_batches(4)[2 * dist.get_rank() :][:2])
    loss.backward()
    reasons = {layer.fused_choice.reason for layer, _ in expert_layers(model)}
    return loss.item(), logical_gradients(model), reasons


def logical_gradients(model: nn.Module) -> dict[str, Tensor]:
    gradients = {}
    for layer, module in expert_layers(model):
        for name, parameter in module.named_parameters(recurse=False):
            for row, expert in enumerate(layer.local_experts.tolist()):
                assert parameter.grad is not None
                gradients[f"{layer.name}.{name}.{expert}"] = parameter.grad[row]
    return gradients


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize(("num_redundant_experts", "by_batch"), [(0, False), (2, True)])
def test_fused_experts_over_ranks_compute_as_unmodified(
    workers: Workers, name: str, num_redundant_experts: int, by_batch: bool
):
    results = workers.run(2, train_over_ranks, name, num_redundant_experts, by_batch)
    plain = hugging_face_model(name)
    losses = [language_loss(plain, token_batches(4)[i : i + 2]) for i in (0, 2)]
    (sum(losses) / 2).backward()  # type: ignore[union-attr]
    expected = dict(plain.named_parameters())
    for loss, (found, gradients_of_rank, reasons) in zip(losses, results, strict=True):
        assert reasons == {None}
        assert found == pytest.approx(loss.item(), rel=1e-12)
        for key, gradient in gradients_of_rank.items():
            parameter, _, expert = key.rpartition(".")
            grad = expected[parameter].grad
            assert grad is not None
            torch.testing.assert_close(gradient, grad[int(expert)], rtol=1e-9, atol=1e-12)


def train_sharded(efsdp: int, ep: int, name: str) -> tuple[list[float], set]:
    """Losses of three steps under FSDP2 and the reasons of layers that were not fused."""
    mesh = init_device_mesh("cpu", (efsdp, ep), mesh_dim_names=("efsdp", "ep"))
    model = fully_shard_moe(hugging_face_model(name), mesh, fused_experts=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        loss = language_loss(model, token_batches(4)[2 * dist.get_rank() :][:2])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, {layer.fused_choice.reason for layer, _ in expert_layers(model)}


@pytest.mark.parametrize(("efsdp", "ep"), [(1, 2), (2, 1)])
def test_fused_experts_under_fsdp2_train_as_unmodified(workers: Workers, efsdp: int, ep: int):
    results = workers.run(2, train_sharded, efsdp, ep, "gpt_oss")
    plain = hugging_face_model("gpt_oss")
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for step in range(3):
        losses = [language_loss(plain, token_batches(4)[i : i + 2]) for i in (0, 2)]
        optimizer.zero_grad()
        (sum(losses) / 2).backward()  # type: ignore[union-attr]
        optimizer.step()
        for loss, (found, reasons) in zip(losses, results, strict=True):
            assert found[step] == pytest.approx(loss.item(), rel=1e-10)
            assert reasons == {None}
