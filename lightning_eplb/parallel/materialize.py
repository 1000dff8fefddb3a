"""Materialization of a model that was parallelized on the meta device: memory and initial weights."""

from collections.abc import Collection
from itertools import chain

import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_eplb import _compat
from lightning_eplb.parallel.dtensor import local_shard
from lightning_eplb.parallel.expert_layer import ExpertLayer
from lightning_eplb.parallel.gradient_hooks import has_hooks
from lightning_eplb.parallel.parallelize import expert_layers


def materialize(model: nn.Module, device: torch.device | str | None = None) -> nn.Module:
    """Allocate and initialize this rank's part of what is on the meta device. Every rank must call it.

    For a model that was built under ``torch.device("meta")`` and parallelized, so that no rank ever holds all experts.
    ``ExpertParallelStrategy`` calls it, and so does ``EPLBCallback`` for a model that was built in
    ``LightningModule.__init__``. Under DDP call it in ``configure_model``. To start from existing weights call
    :func:`~lightning_eplb.load_weights` instead.

    Modules initialize themselves by ``initialize_weights``, as Hugging Face's models do, or ``reset_parameters``, as
    PyTorch's do. Ranks draw different numbers for their experts and shards. Tensors that several ranks hold are the
    same on all of them afterwards.

    Example::

        def configure_model(self):
            with torch.device("meta"):
                self.model = MixtralForCausalLM(config)
            parallelize_experts(self.model, num_redundant_experts=8)
            materialize(self.model)

    Args:
        model: Model. Tensors that are not on the meta device stay as they are.
        device: Device of the tensors. Defaults to that of the mesh of a sharded model, else to PyTorch's default
            device, which is this rank's own within ``configure_model``.

    Returns:
        ``model``.

    Raises:
        ValueError: ``device`` is the meta device.
    """
    device = memory_device(model, device)
    empty = allocate(model, device)
    if not empty:
        return model
    initialize(model, empty, device)
    clear_phantoms(model)
    broadcast_replicated(model, empty)
    return model


def memory_device(model: nn.Module, device: torch.device | str | None) -> torch.device:
    """Return ``device``, or the default device of :func:`materialize`."""
    if device is None:
        meshes = (p.device_mesh for p in model.parameters() if isinstance(p, DTensor))
        mesh = next(meshes, None)
        device = mesh.device_type if mesh is not None else torch.get_default_device()
    device = torch.device(device)
    if device.type == "meta":
        raise ValueError(
            f"device={str(device)!r} has no memory. Leave `with torch.device('meta')` first, or pass another device."
        )
    return torch.empty(0, device=device).device  # with the index of the present one


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by name, tied ones under each of their names."""
    return dict(chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)))


def allocate(model: nn.Module, device: torch.device) -> set[str]:
    """Replace tensors on the meta device by uninitialized ones. Tied parameters stay tied.

    Returns:
        Names of the replaced tensors.
    """
    before = named_tensors(model)
    empty = {name for name, tensor in before.items() if tensor.is_meta}
    if hooked := next((name for name in sorted(empty) if has_hooks([before[name]])), None):
        raise ValueError(
            f"{hooked} is on the meta device and has a gradient hook, which would be lost, since materialize()"
            " replaces the parameter. Register hooks afterwards, as in on_fit_start."
        )
    if not empty:
        return empty
    _compat.apply_to_tensors(
        model, lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor
    )
    first_name: dict[int, str] = {}
    for name, tensor in before.items():
        first = first_name.setdefault(id(tensor), name)
        if first != name and name in empty and isinstance(tensor, nn.Parameter):
            module, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(module), attribute, model.get_parameter(first))
    return empty


def initialize(model: nn.Module, names: Collection[str], device: torch.device) -> None:
    """Let modules initialize their tensors named ``names``.

    Each rank draws different numbers, unless DTensors draw by position in the whole tensor from one seed on all ranks,
    as they do on GPUs. Hugging Face's models leave all other tensors alone. A module with ``reset_parameters`` alone
    initializes all of its tensors.
    """
    if not names:
        return
    forgotten = set(names)
    seed = int(torch.randint(2**62, (), device="cpu"))  # advances the default generator as on the other ranks
    draws_by_place = device.type != "cpu" and any(isinstance(p, DTensor) for p in model.parameters())
    if dist.is_available() and dist.is_initialized() and not draws_by_place:
        seed += dist.get_rank()
    devices = {} if device.type == "cpu" else {"devices": [device.index], "device_type": device.type}
    with torch.no_grad(), torch.random.fork_rng(**{"devices": [], **devices}):
        torch.manual_seed(seed)
        _initialize(model, "", set(names), forgotten)
    if forgotten:
        rank_zero_warn(
            f"{sorted(forgotten)[0]} was built on the meta device, and its module has no reset_parameters() to"
            f" initialize it; {len(forgotten)} such tensors hold anything at all until weights are loaded into them"
        )


def _initialize(module: nn.Module, prefix: str, names: set[str], forgotten: set[str]) -> None:
    if callable(initialize_weights := getattr(module, "initialize_weights", None)):
        inside = {name for name in names if name.startswith(prefix)}
        if inside:
            _initialize_hugging_face(module, {name.removeprefix(prefix) for name in inside})
            initialize_weights()  # with all that is inside
            forgotten -= inside
        return
    for name, child in module.named_children():
        _initialize(child, f"{prefix}{name}.", names, forgotten)
    own = {prefix + name for name, _ in chain(module.named_parameters("", False), module.named_buffers("", False))}
    if own & names and callable(reset := getattr(module, "reset_parameters", None)):
        reset()
        forgotten -= own


def _initialize_hugging_face(module: nn.Module, names: set[str]) -> None:
    """Mark tensors that Hugging Face's models are to initialize, and those that they are not."""
    for name, tensor in named_tensors(module).items():
        _compat.mark_initialized(tensor, name not in names)
        if name in names:
            _compat.mark_initialized(module.get_submodule(name.rpartition(".")[0]), False)


def clear_phantoms(model: nn.Module) -> None:
    """Set the rows of phantom experts to zero. Needs no communication."""
    with torch.no_grad():
        for layer, module in expert_layers(model):
            for parameter in module.parameters(recurse=False):
                local_shard(parameter)[layer.num_filled :] = 0


def broadcast_replicated(model: nn.Module, names: Collection[str]) -> None:
    """Broadcast these tensors from the lowest of the ranks that hold them. Collective."""
    layers = list(expert_layers(model))
    if not layers or layers[0].layer.groups.cpu_group is None:
        return  # one rank, or no expert parallelism, and DDP broadcasts its parameters
    groups = layers[0].layer.groups
    layer_of = {id(tensor): each.layer for each in layers for tensor in each.parameters.values()}
    tensors = named_tensors(model)
    with torch.no_grad():
        for name in sorted(names):
            tensor = tensors[name]
            if isinstance(tensor, DTensor):
                for dim, placement in enumerate(tensor.placements):
                    if placement.is_replicate():
                        dist.broadcast(local_shard(tensor), group=tensor.device_mesh.get_group(dim), group_src=0)
            elif not _is_distributed(layer_of.get(id(tensor))):
                dist.broadcast(tensor.data, 0, group=groups.cpu_group)
            elif groups.edp_group is not None:
                dist.broadcast(tensor.data, group=groups.edp_group, group_src=0)


def _is_distributed(layer: ExpertLayer | None) -> bool:
    return layer is not None and layer.groups.size > 1
