"""Canaries: private APIs of other libraries exist, and do what the package takes them to do.

A failure here tells which name an update of torch, Lightning or transformers took away, before anything else fails.
"""

import ast
import importlib
import inspect
import pickle
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import ModelPruning
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.checkpoint import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import prune, spectral_norm, weight_norm
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import lightning_eplb
from lightning_eplb import _compat
from tests.fresh_interpreter import FreshInterpreter
from tests.models import hugging_face_model
from tests.workers import Workers

PACKAGE = Path(lightning_eplb.__file__).parent
COMPAT = PACKAGE / "_compat.py"

INHERITED = {
    "ExpertLoad": {"_forward_cache", "_is_synced", "_load_from_state_dict", "_update_count"},
    "ExpertParallelStrategy": {
        "_data_parallel_size",
        "_device_mesh",
        "_save_distributed_checkpoint",
        "_setup_distributed",
    },
}
"""Private attributes that subclasses of other libraries' classes use of themselves."""


# No private name outside of the module


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def private_uses(source: str) -> list[str]:
    """Private attributes, modules and names of modules that a source uses of others than ``self`` and itself."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            is_own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            is_super = isinstance(node.value, ast.Call) and ast.unparse(node.value) == "super()"
            if not (is_own or is_super or node.attr in ("_replace", "_asdict", "_fields")):  # NamedTuple's are public
                found.append(f"{node.lineno}: {ast.unparse(node)}")
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names]
            modules = names if isinstance(node, ast.Import) else [node.module or ""]
            if modules[0].partition(".")[0] in {"lightning_eplb", *sys.stdlib_module_names}:
                continue
            if any(is_private(part) for name in {*names, *modules} for part in name.split(".")):
                found.append(f"{node.lineno}: {ast.unparse(node)}")
        elif isinstance(node, ast.Call):
            function = ast.unparse(node.func)
            named = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
            if function in ("getattr", "setattr", "hasattr", "delattr", "operator.attrgetter"):
                found += [f"{node.lineno}: {ast.unparse(node)}" for name in named if is_private(name)]
            found += [f"{node.lineno}: {each.arg}=" for each in node.keywords if each.arg and is_private(each.arg)]
    return found


def test_scan_of_package_finds_private_names_in_compat_alone() -> None:
    uses = {
        str(path.relative_to(PACKAGE)): found
        for path in sorted(PACKAGE.rglob("*.py"))
        if path != COMPAT and (found := private_uses(path.read_text(encoding="utf-8")))
    }
    assert uses == {}


@pytest.mark.parametrize(
    "source",
    [
        "ddp._comm_hooks",
        "self.ddp._comm_hooks",
        "module._modules['x']",
        "getattr(config, '_experts_implementation', None)",
        "part.__dict__.update(_buffers={})",
        "import torch._dynamo",
        "from torch.distributed.tensor._utils import compute_local_shape_and_global_offset",
        "from torch.utils.checkpoint import _CachingTorchDispatchMode",
    ],
)
def test_scan_of_private_name_finds_it(source: str) -> None:
    assert len(private_uses(source)) == 1


@pytest.mark.parametrize(
    "source", ["self._groups", "load._replace(x=1)", "from lightning_eplb import _compat", "x.__dict__"]
)
def test_scan_of_own_or_public_name_finds_nothing(source: str) -> None:
    assert private_uses(source) == []


def package_classes() -> list[type]:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        if name.endswith(("__main__", ".kernels")):  # kernels are of Triton, which needs a GPU
            continue
        module = importlib.import_module(name)
        found += [c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == name]
    return found


def test_scan_of_subclasses_finds_listed_names_alone() -> None:
    """``self._y`` in a subclass of another library's class, where that class knows ``_y``, too."""
    found: dict[str, set[str]] = {}
    for each in package_classes():
        theirs = [c for c in each.__mro__ if c.__module__.partition(".")[0] in ("torch", "torchmetrics", "lightning")]
        sources = "\n".join(inspect.getsource(c) for c in theirs if not c.__module__.startswith("torch._C"))
        own = inspect.getsource(each)
        names = {*re.findall(r"\b(?:self|super\(\))\.(_[a-z]\w*)", own), *re.findall(r"def (_[a-z]\w*)", own)}
        if used := {name for name in names if re.search(rf"\b{name}\b", sources)}:
            found[each.__name__] = used
    assert found == INHERITED


# What becomes of a missing name


def test_missing_name_raises_with_supported_releases() -> None:
    with pytest.raises(
        NotImplementedError, match=r"torch \S+ lacks DistributedDataParallel._comm_hooks, .* 2.10 to 2.13"
    ):
        _compat.ddp_comm_hooks(SimpleNamespace())  # type: ignore[arg-type]


def test_missing_module_raises_with_supported_releases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.distributed.algorithms._comm_hooks", None)
    with pytest.raises(NotImplementedError, match=r"lacks distributed.algorithms._comm_hooks"):
        _compat.fsdp1_averaging_hooks()


def test_other_attribute_error_is_raised_unchanged() -> None:
    def fails(_: Tensor) -> Tensor:
        raise AttributeError("of the function", name="other")

    with pytest.raises(AttributeError, match="of the function"):
        _compat.apply_to_tensors(nn.Linear(1, 1), fails)


def test_import_without_private_modules_succeeds(fresh_interpreter: FreshInterpreter) -> None:
    """A private module that a release renames breaks no import."""
    script = """
import sys
import lightning.pytorch, torch.distributed.tensor, torch.utils.checkpoint, torch.distributed.fsdp
import torch.distributed.algorithms.ddp_comm_hooks.default_hooks as _
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook, quantization_hooks
for name in ("torch.distributed.algorithms._comm_hooks", "torch.distributed.tensor._utils",
             "torch.utils._python_dispatch", "torch.distributed.algorithms.ddp_comm_hooks.mixed_precision_hooks"):
    sys.modules[name] = None
del torch.utils.checkpoint._CachingTorchDispatchMode
import lightning_eplb
"""
    fresh_interpreter.run(script)


# torch.nn.Module


def test_registered_of_module_are_its_own_dictionaries() -> None:
    module = nn.BatchNorm1d(3)
    module.child = nn.Linear(1, 1)
    parameters, buffers, children = _compat.registered(module)
    assert list(parameters) == ["weight", "bias"]
    assert list(buffers) == ["running_mean", "running_var", "num_batches_tracked"]
    assert list(children) == ["child"]
    del parameters["bias"]
    assert not hasattr(module, "bias")


def test_replace_registered_of_module_replaces_all() -> None:
    module, weight = nn.Linear(2, 2), torch.zeros(2, 2)
    _compat.replace_registered(module, {"weight": weight, "bias": None}, buffers={"extra": weight})
    assert module.weight is weight
    assert [name for name, _ in module.named_buffers()] == ["extra"]


def test_forward_pre_hooks_of_module_are_found() -> None:
    def hook(*_: Any) -> None: ...

    module = nn.Linear(1, 1)
    module.register_forward_pre_hook(hook)
    assert _compat.forward_pre_hooks(module) == [hook]


@pytest.mark.parametrize(
    "register", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"]
)
def test_has_call_hooks(register: str) -> None:
    def hook(*_: Any) -> None: ...

    module = nn.Linear(1, 1)
    assert not _compat.has_call_hooks(module)
    handle = getattr(module, f"register_{register}")(hook)
    assert _compat.has_call_hooks(module)
    handle.remove()
    assert not _compat.has_call_hooks(module)


def test_non_persistent_buffers_of_module_with_one_names_it() -> None:
    module = nn.Module()
    module.register_buffer("kept", torch.zeros(1))
    module.register_buffer("left_out", torch.zeros(1), persistent=False)
    assert _compat.non_persistent_buffers(module) == {"left_out"}


def test_apply_to_tensors_of_module_replaces_them() -> None:
    module = nn.Sequential(nn.Linear(1, 1, device="meta"))
    _compat.apply_to_tensors(module, lambda tensor: torch.ones_like(tensor, device="cpu"))
    assert torch.equal(module[0].weight, torch.ones(1, 1))


def test_call_without_hooks_of_module_calls_none() -> None:
    module, calls = nn.Linear(1, 1), []
    module.register_forward_hook(lambda *_: calls.append(1))
    _compat.call_without_hooks(module)
    module(torch.zeros(1))
    assert calls == []


def test_pruned_tensor_of_hook_is_its_name() -> None:
    weight = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
    prune.l1_unstructured(weight[0], "bias", 1)
    spectral_norm(weight[1], "weight")
    with pytest.warns(FutureWarning):
        weight_norm(weight[2], "weight")
    found = [_compat.pruned_tensor(hook) for module in weight for hook in _compat.forward_pre_hooks(module)]
    assert found == ["bias", "weight", "weight"]


def test_wrapper_names_are_those_of_torch() -> None:
    assert all(name.endswith(".") for name in _compat.WRAPPER_NAMES)
    compiled = torch.compile(nn.Linear(1, 1), backend="eager")
    assert [name for name, _ in compiled.named_parameters()] == ["_orig_mod.weight", "_orig_mod.bias"]
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    from torch.distributed.fsdp._common_utils import FSDP_PREFIX

    assert f"{FSDP_PREFIX}" in _compat.WRAPPER_NAMES
    # Names are without the prefix; only the wrapped attribute has it.
    assert "_checkpoint_wrapped_module." in {f"{name}." for name, _ in checkpoint_wrapper(nn.ReLU()).named_children()}


# torch.Tensor and autograd


def test_version_of_written_tensor_is_one_higher() -> None:
    tensor = torch.zeros(1)
    before = _compat.version_of(tensor)
    tensor.add_(1)
    assert _compat.version_of(tensor) == before + 1


def test_gradient_hooks_of_tensor_are_found() -> None:
    tensor = torch.zeros(1, requires_grad=True)
    assert _compat.gradient_hooks(tensor) == (None, None)
    tensor.register_hook(on_gradient := lambda grad: None)
    tensor.register_post_accumulate_grad_hook(after := lambda tensor: None)
    first, second = _compat.gradient_hooks(tensor)
    assert first is not None
    assert second is not None
    assert (list(first.values()), list(second.values())) == ([on_gradient], [after])


def test_backward_id_in_backward_is_set_and_call_comes_after() -> None:
    events: list[Any] = []
    tensor = torch.ones(1, requires_grad=True)

    def in_backward(grad: Tensor) -> None:
        events.append(_compat.backward_id())
        _compat.call_after_backward(lambda: events.append(tensor.grad))

    (2 * tensor).register_hook(in_backward)
    assert _compat.backward_id() == -1
    output = 2 * tensor
    output.register_hook(in_backward)
    output.backward()
    assert events[0] >= 0
    assert torch.equal(events[1], torch.tensor([2.0]))
    assert _compat.backward_id() == -1


@pytest.mark.parametrize("has_foreach", [True, False])
def test_copy_all_with_or_without_foreach_copies(has_foreach: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hasattr(torch.ops.aten, "_foreach_copy_")
    if not has_foreach:
        monkeypatch.setattr(torch, "ops", SimpleNamespace(aten=SimpleNamespace()))
    targets, sources = [torch.zeros(2), torch.zeros(3)], [torch.ones(2), torch.full((3,), 2.0)]
    _compat.copy_all(targets, sources)
    assert torch.equal(torch.cat(targets), torch.cat(sources))


@pytest.mark.parametrize("is_renamed", [False, True])
def test_is_tensor_wrapper_of_subclass_is_true(is_renamed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    two = TwoTensor(torch.zeros(1), torch.zeros(1))
    importlib.import_module("torch.utils._python_dispatch")
    if is_renamed:
        monkeypatch.setitem(sys.modules, "torch.utils._python_dispatch", None)
    assert _compat.is_tensor_wrapper(two)
    assert not _compat.is_tensor_wrapper(torch.zeros(1))


def test_keeps_outputs_under_selective_checkpointing_is_true() -> None:
    seen = []

    def forward(x: Tensor) -> Tensor:
        seen.append(_compat.keeps_outputs())
        return x.sin()

    def contexts() -> Any:
        return create_selective_checkpoint_contexts(lambda *_, **__: CheckpointPolicy.MUST_SAVE)

    x = torch.ones(1, requires_grad=True)
    checkpoint(forward, x, use_reentrant=False)
    checkpoint(forward, x, use_reentrant=False, context_fn=contexts)
    assert seen == [False, True]


def test_keeps_outputs_without_private_module_is_true(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils._python_dispatch", None)
    assert _compat.keeps_outputs()


# torch.optim and torch.amp


def test_is_hook_attribute_of_optimizer_is_true() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    before = {key: len(value) for key, value in vars(optimizer).items() if _compat.is_hook_attribute(key)}
    optimizer.register_step_post_hook(lambda *_: None)
    optimizer.register_state_dict_post_hook(lambda *_: None)
    after = {key: len(value) for key, value in vars(optimizer).items() if _compat.is_hook_attribute(key)}
    assert sum(after.values()) == sum(before.values()) + 2


def test_found_overflow_after_unscale_is_what_step_reads() -> None:
    parameter = torch.ones(1, requires_grad=True)
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(parameter.sum() * torch.inf).backward()
    scaler.unscale_(optimizer)
    (found,) = _compat.found_overflow(scaler, optimizer)
    assert found.item() == 1.0
    found.fill_(0.0)
    scaler.step(optimizer)  # would be skipped
    assert parameter.item() == -torch.inf


def test_unscales_in_step_of_fused_optimizer_is_true() -> None:
    parameter = torch.zeros(1, requires_grad=True)
    assert _compat.unscales_in_step(torch.optim.AdamW([parameter], fused=True))
    assert not _compat.unscales_in_step(torch.optim.AdamW([parameter]))


# Process groups of one rank: DDP, FSDP and meshes


def ddp_answers() -> dict[str, Any]:
    seen = []

    class Model(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(_compat.active_ddp())
            return super().forward(x)

    model = Model(2, 2)
    model.register_buffer("counter", torch.zeros(1))
    setattr(model, _compat.IGNORED_BY_DDP, ["bias"])
    ddp = DistributedDataParallel(model)
    ddp(torch.zeros(1, 2))
    ddp.register_comm_hook(None, default_hooks.allreduce_hook)
    _compat.sync_buffers(ddp)
    return {
        "active_ddp": (seen[0] is ddp, _compat.active_ddp()),
        "ddp_parameters": [each is model.weight for each in _compat.ddp_parameters(ddp)],
        "ddp_comm_hooks": [hook is default_hooks.allreduce_hook for hook, _ in _compat.ddp_comm_hooks(ddp)],
    }


def fsdp1_answers() -> dict[str, Any]:
    kept = nn.Linear(2, 2)
    model = nn.Sequential(nn.Linear(2, 2), kept)
    wrapped = FullyShardedDataParallel(
        model, device_id=torch.device("cpu"), use_orig_params=True, ignored_states=list(kept.parameters())
    )
    flattened = {name: _compat.is_flattened(each) for name, each in model.named_parameters()}
    before = _compat.fsdp1_comm_hook(wrapped)
    hook = _compat.fsdp1_averaging_hooks()[0]
    wrapped.register_comm_hook(None, hook)
    return {"flattened": flattened, "hooks": (before, _compat.fsdp1_comm_hook(wrapped) is hook)}


def mesh_answers() -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (1, 1, 1), mesh_dim_names=("a", "b", "c"))
    _compat.flatten_mesh(mesh["a", "b"], "ab")
    model = fully_shard(nn.Linear(2, 2), mesh=mesh["ab"])
    empty = fully_shard(nn.Identity(), mesh=mesh["ab"])
    tensor = DTensor.from_local(torch.zeros(3, 2), mesh["ab"], [Shard(0)])
    return {
        "sharded": [isinstance(each, DTensor) for each in _compat.fsdp2_parameters(model)],
        "same": [id(each) for each in _compat.fsdp2_parameters(model)] == [id(each) for each in model.parameters()],
        "empty": _compat.fsdp2_parameters(empty),
        "flat": mesh["ab"].mesh_dim_names,
        "box": _compat.local_box(tensor.shape, tensor.device_mesh, tensor.placements),
    }


def test_ddp_functions_under_ddp_find_its_parts(workers: Workers) -> None:
    (answers,) = workers.run(1, ddp_answers)
    assert answers == {"active_ddp": (True, None), "ddp_parameters": [True], "ddp_comm_hooks": [True]}


def test_fsdp1_functions_under_fsdp1_find_its_parts(workers: Workers) -> None:
    (answers,) = workers.run(1, fsdp1_answers)
    assert list(answers["flattened"].values()) == [True, True, False, False]
    assert answers["hooks"] == (None, True)


def test_fsdp2_functions_under_fsdp2_find_its_parts(workers: Workers) -> None:
    (answers,) = workers.run(1, mesh_answers)
    assert answers == {
        "sharded": [True, True],
        "same": True,
        "empty": [],
        "flat": ("ab",),
        "box": (slice(0, 3), slice(0, 2)),
    }


def local_boxes() -> tuple[slice, ...]:
    mesh = init_device_mesh("cpu", (2,))
    tensor = DTensor.from_local(torch.zeros(2, 3), mesh, [Shard(0)])
    return _compat.local_box(tensor.shape, mesh, tensor.placements)


def test_local_box_of_sharded_tensor_is_that_of_rank(workers: Workers) -> None:
    assert workers.run(2, local_boxes) == [(slice(0, 2), slice(0, 3)), (slice(2, 4), slice(0, 3))]


def test_ddp_mixed_precision_hook_is_callable() -> None:
    assert callable(_compat.ddp_mixed_precision_hook())


# torch.distributed.checkpoint


def test_symmetric_memory_names_are_as_used() -> None:
    """Direct dispatch allocates, maps and waits by these names, on GPUs."""
    from torch.distributed import _symmetric_memory as symmetric_memory

    assert list(inspect.signature(symmetric_memory.rendezvous).parameters) == ["tensor", "group"]
    handle = torch._C._distributed_c10d._SymmetricMemory
    assert isinstance(handle.buffer_ptrs, property)
    assert "channel" in handle.barrier.__doc__
    assert "timeout_ms" in handle.barrier.__doc__
    with pytest.raises(RuntimeError):  # there is none on the CPU
        _compat.symmetric_empty(16, torch.device("cpu"))
    with pytest.raises((RuntimeError, TypeError)):
        _compat.symmetric_rendezvous(torch.zeros(16, dtype=torch.uint8), None)


def test_pickled_classes_of_index_are_all_listed(tmp_path: Path) -> None:
    found: set[tuple[str, str]] = set()

    class Recording(pickle.Unpickler):
        def find_class(self, module_name: str, global_name: str, /) -> Any:
            found.add((module_name, global_name))
            return super().find_class(module_name, global_name)

    save({"weight": torch.zeros(2), "step": 1}, checkpoint_id=tmp_path, no_dist=True)
    Recording((tmp_path / ".metadata").open("rb")).load()
    private = {name for name in found if is_private(name[1])}
    assert private <= _compat.PICKLED_CLASSES | _compat.PICKLED_CALLS
    assert ("torch.distributed.checkpoint.filesystem", "_StorageInfo") in private
    for module, name in _compat.PICKLED_CLASSES | _compat.PICKLED_CALLS:
        assert hasattr(importlib.import_module(module), name)


# Lightning


def test_comm_hook_of_ddp_strategy_is_its_hook() -> None:
    strategy = DDPStrategy(ddp_comm_hook=default_hooks.allreduce_hook, ddp_comm_state="state")  # type: ignore[arg-type]
    assert _compat.comm_hook_of(strategy) == ("state", default_hooks.allreduce_hook, None)


def test_saves_shards_of_fsdp1_strategy_is_its_setting() -> None:
    assert _compat.saves_shards(FSDPStrategy(state_dict_type="sharded"))
    assert not _compat.saves_shards(FSDPStrategy())


def test_cluster_environment_of_trainer_is_its_plugin() -> None:
    environment = LightningEnvironment()
    assert _compat.cluster_environment(pl.Trainer(accelerator="cpu", devices=1, plugins=[environment])) is environment


def test_set_device_mesh_of_module_sets_it() -> None:
    module, mesh = pl.LightningModule(), object()
    _compat.set_device_mesh(module, mesh)
    assert module.device_mesh is mesh


def test_pruned_by_callback_is_its_parameters() -> None:
    module = nn.Linear(2, 2)
    found = list(_compat.pruned_by(ModelPruning("l1_unstructured", [(module, "weight")]), module))
    assert found == [(module, "weight")]
    everything = list(_compat.pruned_by(ModelPruning("l1_unstructured", parameter_names=["bias"]), module))
    assert everything == [(module, "bias")]


def test_end_of_dataloader_of_evaluation_loops_is_found() -> None:
    trainer = pl.Trainer(accelerator="cpu", logger=False, barebones=False, enable_checkpointing=False)
    for loop in (trainer.validate_loop, trainer.test_loop, trainer.fit_loop.epoch_loop.val_loop):
        assert hasattr(loop, str(_compat.end_of_dataloader(loop)))
    trainer.predicting = True
    assert _compat.end_of_dataloader(trainer.predict_loop) is None


def test_fabric_strategy_of_wrapped_object_is_that_of_fabric() -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    module = nn.Linear(1, 1)
    wrapped, optimizer = fabric.setup(module, torch.optim.SGD(module.parameters()))
    assert _compat.fabric_strategy(wrapped) is fabric.strategy
    assert _compat.fabric_strategy(optimizer) is fabric.strategy


# transformers


def mixtral_experts() -> Any:
    model = hugging_face_model("mixtral", layers=1)
    return next(module for module in model.modules() if hasattr(module, "num_experts") and hasattr(module, "act_fn"))


def test_experts_implementation_of_copied_config_is_replaced() -> None:
    experts = mixtral_experts()
    assert _compat.experts_implementation(experts) == "eager"
    assert _compat.experts_implementation(nn.Linear(1, 1)) is None
    copied = _compat.with_experts_implementation(experts.config, "grouped_mm")
    assert _compat.experts_implementation(SimpleNamespace(config=copied)) == "grouped_mm"
    assert _compat.experts_implementation(experts) == "eager"


def test_with_experts_implementation_of_canary_computes_with_it() -> None:
    from transformers.integrations import moe

    experts, calls = mixtral_experts(), []

    def compute(module: Any, hidden_TD: Tensor, *_: Tensor) -> Tensor:
        calls.append(module)
        return hidden_TD

    moe.ALL_EXPERTS_FUNCTIONS.register("canary", compute)
    experts.config = _compat.with_experts_implementation(experts.config, "canary")
    experts(torch.zeros(1, 16, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1))
    assert calls == [experts]


def test_gates() -> None:
    experts = hugging_face_model("gpt_oss", layers=1).model.layers[0].mlp.experts  # type: ignore[union-attr]
    own = type(experts)._apply_gate
    assert _compat.gates(experts) == (own, None)
    experts._apply_gate = torch.relu
    assert _compat.gates(experts) == (own, torch.relu)
    assert _compat.gates(nn.Linear(1, 1)) == (None, None)


def test_apply_gate_of_mixtral_multiplies_activated_gate_with_up() -> None:
    gate_up = torch.randn(3, 48, dtype=torch.float64)
    gate, up = gate_up.chunk(2, dim=-1)
    torch.testing.assert_close(_compat.apply_gate(mixtral_experts(), gate_up), nn.functional.silu(gate) * up)


def test_grouped_linear_of_transformers_has_known_arguments() -> None:
    from transformers.integrations import moe

    linear = _compat.grouped_linear(moe)
    assert linear is not None
    assert list(inspect.signature(linear).parameters)[:5] == ["input", "weight", "offs", "bias", "is_transposed"]
    assert _compat.grouped_linear(SimpleNamespace()) is None


def test_mark_initialized_of_parameter_keeps_it() -> None:
    model = hugging_face_model("mixtral", layers=1)
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        _compat.mark_initialized(parameter, name != "lm_head.weight")
        _compat.mark_initialized(model.get_submodule(name.rpartition(".")[0]), name != "lm_head.weight")
    before = {name: parameter.clone() for name, parameter in parameters.items()}
    model.initialize_weights()  # type: ignore[operator]
    changed = [name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])]
    assert changed == ["lm_head.weight"]


def test_without_ignored_keys_of_model_leaves_them_out() -> None:
    model: Any = hugging_face_model("mixtral", layers=1)
    model._keys_to_ignore_on_load_missing, model._keys_to_ignore_on_load_unexpected = {"head"}, {"extra"}
    found = _compat.without_ignored_keys(model, {"lm_head.weight", "norm"}, {"extra.bias", "other"})
    assert found == ({"norm"}, {"other"})


# All of them


def test_functions_of_compat_have_canaries() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    tree = ast.parse(COMPAT.read_text(encoding="utf-8"))
    functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and not is_private(node.name)]
    assert [name for name in functions if f"_compat.{name}(" not in source] == []
    assert set(_compat.PRIVATE_NAMES) <= set(functions)
