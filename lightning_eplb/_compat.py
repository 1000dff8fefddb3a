"""Private APIs of torch, Lightning, torchmetrics and transformers. No other module of the package names any.

Every function stands for one private name, or for a few that belong together. Where a release lacks the name, the
function falls back to a public API or raises ``NotImplementedError`` with the supported releases. Nothing private is
touched at import. ``tests/test_compat.py`` has a canary test for each function.
"""

import copy
import functools
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

_Function = TypeVar("_Function", bound=Callable[..., Any])

TESTED = {"torch": "2.10 to 2.13", "lightning": "2.6.4 to 2.6.6", "transformers": "5.20 to 5.24"}
"""Releases with all private names of this module."""

PRIVATE_NAMES: dict[str, tuple[str, ...]] = {}
"""Private names by the function of this module that uses them."""


def _uses(library: str, *names: str) -> Callable[[_Function], _Function]:
    """Register the private names that a function uses, and explain the error if a release lacks one."""

    def decorate(function: _Function) -> _Function:
        PRIVATE_NAMES[function.__name__] = names
        attributes = {part for name in names for part in name.split(".")}

        @functools.wraps(function)
        def call(*args: Any) -> Any:
            try:
                return function(*args)
            except AttributeError as error:
                if error.name not in attributes:
                    raise
                raise _missing(library, names) from error
            except ImportError as error:
                raise _missing(library, names) from error

        return cast(_Function, call)

    return decorate


def _missing(library: str, names: Sequence[str]) -> NotImplementedError:
    try:
        installed = f"{library} {version(library)}"
    except PackageNotFoundError:
        installed = library
    return NotImplementedError(
        f"{installed} lacks {' or '.join(names)}, a private API that lightning-eplb relies on. Use {library}"
        f" {TESTED[library]}, or a newer lightning-eplb."
    )


# torch.nn.Module


class Registered(NamedTuple):
    """Dictionaries in which a module keeps its own parameters, buffers and children."""

    parameters: dict[str, nn.Parameter | None]
    buffers: dict[str, Tensor | None]
    children: dict[str, nn.Module | None]


WRAPPER_NAMES = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
"""Parts of parameters' names that FSDP1, activation checkpointing and ``torch.compile`` insert."""

REGISTRIES = ("_parameters", "_buffers", "_modules")
"""Names of these dictionaries in ``vars(module)``."""


@_uses("torch", *(f"nn.Module.{name}" for name in REGISTRIES))
def registered(module: nn.Module) -> Registered:
    """Return a module's own dictionaries, not copies."""
    return Registered(module._parameters, module._buffers, module._modules)


def replace_registered(
    module: nn.Module,
    parameters: dict[str, Any] | None = None,
    buffers: dict[str, Any] | None = None,
    children: dict[str, Any] | None = None,
) -> None:
    """Give a module other dictionaries, without registering their values one by one."""
    given = zip(REGISTRIES, (parameters, buffers, children), strict=True)
    module.__dict__.update({name: values for name, values in given if values is not None})


@_uses("torch", "nn.Module._forward_pre_hooks")
def forward_pre_hooks(module: nn.Module) -> list[Callable[..., Any]]:
    """Return the hooks that a module calls before its forward."""
    return list(module._forward_pre_hooks.values())


@_uses("torch", *(f"nn.Module._{name}_hooks" for name in ("forward", "forward_pre", "backward", "backward_pre")))
def has_call_hooks(module: nn.Module) -> bool:
    """Return ``True`` if calling ``module`` runs more than its forward, now or in the backward pass."""
    ahead = module._forward_pre_hooks or module._backward_pre_hooks
    return bool(ahead or module._forward_hooks or module._backward_hooks)


@_uses("torch", "nn.Module._non_persistent_buffers_set")
def non_persistent_buffers(module: nn.Module) -> set[str]:
    """Return the names of a module's own buffers that its state dict leaves out."""
    return module._non_persistent_buffers_set


@_uses("torch", "nn.Module._apply")
def apply_to_tensors(module: nn.Module, function: Callable[[Tensor], Tensor]) -> None:
    """Replace all parameters, gradients and buffers of a module and its children by ``function`` of each."""
    module._apply(function)


@_uses("torch", "nn.Module._compiled_call_impl")
def call_without_hooks(module: nn.Module) -> None:
    """Let ``module(...)`` call its forward alone, as a compiled module does."""
    _ = module._compiled_call_impl  # raises if it has another name
    module.__dict__["_compiled_call_impl"] = module.forward


def pruned_tensor(hook: Any) -> str:
    """Return the name of the tensor that a hook of ``torch.nn.utils`` computes: pruning, weight or spectral norm."""
    return getattr(hook, "_tensor_name", None) or hook.name


# torch.Tensor and autograd


@_uses("torch", "Tensor._version")
def version_of(tensor: Tensor) -> int:
    """Return the number of in-place changes of a tensor. Inference tensors have none."""
    return tensor._version


@_uses("torch", "Tensor._backward_hooks", "Tensor._post_accumulate_grad_hooks")
def gradient_hooks(tensor: Any) -> tuple[dict[int, Any] | None, dict[int, Any] | None]:
    """Return the dictionaries of hooks on a tensor's gradient, and of those after its accumulation."""
    return tensor._backward_hooks, tensor._post_accumulate_grad_hooks


@_uses("torch", "_C._current_graph_task_id")
def backward_id() -> int:
    """Return the number of the backward pass that runs on this thread; -1 outside of any."""
    return torch._C._current_graph_task_id()


@_uses("torch", "autograd.Variable._execution_engine")
def call_after_backward(function: Callable[[], None]) -> None:
    """Call ``function`` once the running backward pass is done. Called within a backward pass."""
    torch.autograd.Variable._execution_engine.queue_callback(function)  # type: ignore[attr-defined]


def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each source into its target, in one call where torch has one."""
    if (copy_ := getattr(torch.ops.aten, "_foreach_copy_", None)) is not None:
        copy_(targets, sources)
        return
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


def is_tensor_wrapper(tensor: Tensor) -> bool:
    """Return ``True`` for a tensor made of others, as DTensors and quantized weights are."""
    try:
        from torch.utils._python_dispatch import is_traceable_wrapper_subclass
    except ImportError:
        return hasattr(tensor, "__tensor_flatten__") and hasattr(tensor, "__tensor_unflatten__")
    return is_traceable_wrapper_subclass(tensor)


def keeps_outputs() -> bool:
    """Return ``True`` while selective checkpointing keeps some operations' outputs, or if that can't be told.

    Recomputation must then run the same operations.
    """
    try:
        from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
        from torch.utils.checkpoint import _CachingTorchDispatchMode
    except ImportError:
        return True
    return any(isinstance(mode, _CachingTorchDispatchMode) for mode in _get_current_dispatch_mode_stack())


# torch.optim and torch.amp


def is_hook_attribute(name: str) -> bool:
    """Return ``True`` for an attribute in which ``torch.optim.Optimizer`` keeps hooks."""
    return name.startswith("_optimizer_")


@_uses("torch", "amp.GradScaler._found_inf_per_device")
def found_overflow(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return one tensor for each device, not 0 if a gradient overflowed. They may be changed, after ``unscale_()``."""
    return list(scaler._found_inf_per_device(optimizer).values())


def unscales_in_step(optimizer: torch.optim.Optimizer) -> bool:
    """Return ``True`` for an optimizer that unscales gradients and looks for overflows in its step, as fused ones."""
    return getattr(optimizer, "_step_supports_amp_scaling", False)


# torch.nn.parallel.DistributedDataParallel

IGNORED_BY_DDP = "_ddp_params_and_buffers_to_ignore"
"""Attribute of a module: names of parameters and buffers that DDP leaves alone."""


@_uses("torch", "DistributedDataParallel._active_ddp_module")
def active_ddp() -> nn.parallel.DistributedDataParallel | None:
    """Return the DDP module whose forward runs."""
    return nn.parallel.DistributedDataParallel._active_ddp_module


@_uses("torch", "DistributedDataParallel._module_parameters")
def ddp_parameters(ddp: nn.parallel.DistributedDataParallel) -> list[nn.Parameter]:
    """Return the parameters whose gradients DDP averages."""
    return ddp._module_parameters


@_uses("torch", "DistributedDataParallel._comm_hooks")
def ddp_comm_hooks(ddp: nn.parallel.DistributedDataParallel) -> list[tuple[Callable[..., Any], object]]:
    """Return the registered communication hooks, each with its state."""
    return ddp._comm_hooks


@_uses("torch", "DistributedDataParallel._sync_buffers")
def sync_buffers(ddp: nn.parallel.DistributedDataParallel) -> None:
    """Broadcast rank 0's buffers, as the first forward would. All ranks call it."""
    ddp._sync_buffers()


@_uses("torch", "distributed.algorithms.ddp_comm_hooks.mixed_precision_hooks._reducer_allreduce_and_upcast_hook")
def ddp_mixed_precision_hook() -> Callable[..., Any]:
    """Return the communication hook that DDP registers itself for its ``mixed_precision``."""
    from torch.distributed.algorithms.ddp_comm_hooks.mixed_precision_hooks import _reducer_allreduce_and_upcast_hook

    return _reducer_allreduce_and_upcast_hook


# FSDP, DTensor and DeviceMesh


@_uses("torch", "distributed.algorithms._comm_hooks")
def fsdp1_averaging_hooks() -> tuple[Callable[..., Any], ...]:
    """Return the communication hooks of FSDP1 that average over all ranks."""
    from torch.distributed.algorithms._comm_hooks import default_hooks as hooks

    return hooks.allreduce_hook, hooks.reduce_scatter_hook, hooks.fp16_compress_hook, hooks.bf16_compress_hook


@_uses("torch", "FullyShardedDataParallel._comm_hook")
def fsdp1_comm_hook(model: Any) -> Callable[..., Any] | None:
    """Return the communication hook that was registered with FSDP1."""
    return model._comm_hook


def is_flattened(parameter: nn.Parameter) -> bool:
    """Return ``True`` for a parameter that is part of a flat parameter of FSDP1, or one itself."""
    return getattr(parameter, "_fsdp_flattened", False)


@_uses("torch", "FSDPModule._get_fsdp_state", "FSDPState._fsdp_param_group")
def fsdp2_parameters(module: Any) -> list[nn.Parameter]:
    """Return the sharded parameters of a module that ``fully_shard`` was called for. Optimizers hold these."""
    group = module._get_fsdp_state()._fsdp_param_group
    return [parameter.sharded_param for parameter in group.fsdp_params] if group is not None else []


@_uses("torch", "distributed.tensor._utils.compute_local_shape_and_global_offset")
def local_box(shape: torch.Size, mesh: Any, placements: Sequence[Any]) -> tuple[slice, ...]:
    """Return this rank's part of a DTensor, a slice for each dimension."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sizes, offsets = compute_local_shape_and_global_offset(shape, mesh, placements)
    return tuple(slice(start, start + size) for start, size in zip(offsets, sizes, strict=True))


@_uses("torch", "DeviceMesh._flatten")
def flatten_mesh(mesh: Any, name: str) -> None:
    """Add a dimension to the root mesh of ``mesh``: all its dimensions as one, called ``name``."""
    mesh._flatten(name)


# torch.distributed._symmetric_memory


@_uses("torch", "distributed._symmetric_memory")
def symmetric_empty(num_bytes: int, device: torch.device) -> Tensor:
    """Allocate memory that other processes can map, ``[num_bytes]`` uint8."""
    from torch.distributed import _symmetric_memory as symmetric_memory

    return symmetric_memory.empty(num_bytes, dtype=torch.uint8, device=device)


@_uses("torch", "distributed._symmetric_memory")
def symmetric_rendezvous(tensor: Tensor, group: Any) -> Any:
    """Map the memory of all ranks of a group. Its ranks call it together.

    Returns:
        Handle with ``buffer_ptrs`` and ``barrier(channel, timeout_ms)``.
    """
    from torch.distributed import _symmetric_memory as symmetric_memory

    return symmetric_memory.rendezvous(tensor, group)


# torch.distributed.checkpoint

_DCP = "torch.distributed.checkpoint"
PICKLED_CLASSES = {
    (f"{_DCP}.metadata", "Metadata"),
    (f"{_DCP}.metadata", "MetadataIndex"),
    (f"{_DCP}.metadata", "StorageMeta"),
    (f"{_DCP}.metadata", "TensorStorageMetadata"),
    (f"{_DCP}.metadata", "TensorProperties"),
    (f"{_DCP}.metadata", "ChunkStorageMetadata"),
    (f"{_DCP}.metadata", "BytesStorageMetadata"),
    (f"{_DCP}.filesystem", "_StorageInfo"),
}
"""Dataclasses in the pickled index of a distributed checkpoint, beside plain Python: module and name."""
PICKLED_CALLS = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    (f"{_DCP}.metadata", "_MEM_FORMAT_ENCODING"),
}
"""Functions, and classes, that the index calls."""


# Lightning


class CommHook(NamedTuple):
    """Arguments of ``DDPStrategy``."""

    state: object | None
    hook: Callable[..., Any] | None
    wrapper: Callable[..., Any] | None


@_uses("lightning", *(f"DDPStrategy._ddp_comm_{name}" for name in CommHook._fields))
def comm_hook_of(strategy: Any) -> CommHook:
    """Return the communication hook that a ``DDPStrategy`` was made with."""
    return CommHook(strategy._ddp_comm_state, strategy._ddp_comm_hook, strategy._ddp_comm_wrapper)


@_uses("lightning", "FSDPStrategy._state_dict_type")
def saves_shards(strategy: Any) -> bool:
    """Return ``True`` for ``FSDPStrategy(state_dict_type="sharded")``."""
    return strategy._state_dict_type == "sharded"


@_uses("lightning", "Trainer._accelerator_connector")
def cluster_environment(trainer: Any) -> Any:
    """Return the cluster environment of a trainer. A strategy for one device has no attribute of that name."""
    return trainer._accelerator_connector.cluster_environment


@_uses("lightning", "LightningModule._device_mesh")
def set_device_mesh(module: Any, mesh: Any) -> None:
    """Set ``module.device_mesh``, as Lightning's own ``ModelParallelStrategy`` does."""
    _ = module._device_mesh  # raises if it has another name
    module._device_mesh = mesh


@_uses("lightning", "ModelPruning._parameters_to_prune", "ModelPruning._parameter_names")
def pruned_by(callback: Any, module: Any) -> Iterable[tuple[nn.Module, str]]:
    """Return the modules, with the names of their parameters, that a ``ModelPruning`` callback is to prune."""
    return callback.sanitize_parameters_to_prune(module, callback._parameters_to_prune, callback._parameter_names)


@_uses("lightning", "_EvaluationLoop._store_dataloader_outputs")
def end_of_dataloader(loop: Any) -> str | None:
    """Return the name of the method in which an evaluation loop reduces the metrics of a dataloader over ranks.

    ``None`` for a prediction loop, which has no metrics.
    """
    if loop.trainer.predicting:
        return None
    _ = loop._store_dataloader_outputs
    return "_store_dataloader_outputs"


@_uses("lightning", "_FabricModule._strategy", "_FabricOptimizer._strategy")
def fabric_strategy(wrapped: Any) -> Any:
    """Return the strategy of a module or an optimizer that ``fabric.setup`` returned."""
    return wrapped._strategy


# transformers


def experts_implementation(module: Any) -> str | None:
    """Return the name of the implementation that an expert module of transformers computes with."""
    return getattr(getattr(module, "config", None), "_experts_implementation", None)


def with_experts_implementation(config: Any, name: str) -> Any:
    """Return a copy of a configuration of transformers that chooses another implementation of experts."""
    config = copy.copy(config)
    config._experts_implementation = name
    return config


def gates(experts: Any) -> tuple[Any, Any]:
    """Return the functions of an expert module's class, and of the module itself, for its gated activation."""
    return getattr(type(experts), "_apply_gate", None), vars(experts).get("_apply_gate")


@_uses("transformers", "_apply_gate")
def apply_gate(experts: Any, gate_up: Tensor) -> Tensor:
    """Return the gated activation of an expert module of transformers."""
    return experts._apply_gate(gate_up)


def grouped_linear(moe: Any) -> Callable[..., Tensor] | None:
    """Return the grouped product of ``transformers.integrations.moe``; ``None`` where a release has none."""
    return getattr(moe, "_grouped_linear", None)


def mark_initialized(initialized: Any, value: bool) -> None:
    """Tell ``PreTrainedModel.initialize_weights`` to leave a tensor or a module alone, or not to."""
    initialized._is_hf_initialized = value


@_uses("transformers", "PreTrainedModel._adjust_missing_and_unexpected_keys")
def without_ignored_keys(model: Any, missing: set[str], unexpected: set[str]) -> tuple[set[str], set[str]]:
    """Return the missing and the unexpected keys of a checkpoint without those that the model ignores."""
    info = SimpleNamespace(missing_keys=missing, unexpected_keys=unexpected)
    model._adjust_missing_and_unexpected_keys(info)
    return info.missing_keys, info.unexpected_keys
