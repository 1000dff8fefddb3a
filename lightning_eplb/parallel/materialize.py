"""Memory and initial weights for a model that was parallelized on the meta device."""

from collections.abc import Collection
from itertools import chain

import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_eplb import _compat
from lightning_eplb.parallel.convert import expert_layers
from lightning_eplb.parallel.experts import ExpertLayer
from lightning_eplb.parallel.hooks import has_hooks
from lightning_eplb.parallel.shards import local_shard


def materialize(model: nn.Module, device: torch.device | str | None = None) -> nn.Module:
    """Give what is on the meta device memory, for this rank's part only, and initialize it. Every rank must call it.

    For a model that was built under ``torch.device("meta")`` and parallelized, so that no rank ever holds all experts.
    ``ExpertParallelStrategy`` does it by itself, as ``EPLBCallback`` does for a model that was built in
    ``LightningModule.__init__``. Under DDP call it in ``configure_model``; to start from weights that exist call
    :func:`~lightning_eplb.load_weights` instead.

    Modules initialize themselves by ``initialize_weights``, as Hugging Face's models have it, or ``reset_parameters``,
    as PyTorch's have it. Ranks draw different numbers for their experts and shards, so that no two experts start alike;
    what several ranks hold is the same on all of them afterwards.

    Example::

        def configure_model(self):
            with torch.device("meta"):
                self.model = MixtralForCausalLM(config)
            parallelize_experts(self.model, num_redundant_experts=8)
            materialize(self.model)

    Args:
        model: One without a tensor on the meta device stays as it is; of others, those that are not stay.
        device: Where the memory is. ``None``: where the mesh of a sharded model is, else PyTorch's default device,
            which is this rank's own within ``configure_model``.

    Returns:
        ``model``.

    Raises:
        ValueError: ``device`` is the meta device.
    """
    device = memory_device(model, device)
    empty = give_memory(model, device)
    if not empty:
        return model
    initialize(model, empty, device)
    share_over_replicas(model, empty)
    return model


def memory_device(model: nn.Module, device: torch.device | str | None) -> torch.device:
    """``device``, or where :func:`materialize` puts tensors by default."""
    if device is None:
        meshes = (p.device_mesh for p in model.parameters() if isinstance(p, DTensor))
        mesh = next(meshes, None)
        device = mesh.device_type if mesh is not None else torch.get_default_device()
    device = torch.device(device)
    if device.type == "meta":
        raise ValueError(
            f"device={str(device)!r} has no memory; leave `with torch.device('meta')` before, or name another device"
        )
    return torch.empty(0, device=device).device  # with the index of the present one


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, those that have several names under each of them."""
    return dict(chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)))


def give_memory(model: nn.Module, device: torch.device) -> set[str]:
    """Replace tensors on the meta device by uninitialized ones. Parameters that were one and the same stay so.

    Returns:
        The names of what was replaced.
    """
    before = named_tensors(model)
    empty = {name for name, tensor in before.items() if tensor.is_meta}
    if hooked := next((name for name in sorted(empty) if has_hooks([before[name]])), None):
        raise ValueError(
            f"{hooked} is on the meta device and has a gradient hook, which would be lost: memory makes it another"
            " parameter. Register hooks once it has memory, as in on_fit_start"
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
    """Let modules initialize those of their tensors that are called ``names``.

    Each rank draws other numbers, unless DTensors draw them by the place in the whole tensor, as they do on GPUs, from
    one seed on all ranks. Hugging Face's models leave all other tensors alone; a module with ``reset_parameters`` only
    can't tell them apart.
    """
    if not names:
        return
    forgotten = set(names)
    seed = int(torch.randint(2**62, (), device="cpu"))  # of the generator that goes on as on the other ranks
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
    """Mark what is to be initialized, and what is not, in the way of Hugging Face's models."""
    for name, tensor in named_tensors(module).items():
        _compat.mark_initialized(tensor, name not in names)
        if name in names:
            _compat.mark_initialized(module.get_submodule(name.rpartition(".")[0]), False)


def share_over_replicas(model: nn.Module, names: Collection[str]) -> None:
    """Make those tensors the same on all ranks that hold them: the lowest rank's. Collective."""
    layers = list(expert_layers(model))
    if not layers or layers[0][0].groups.control is None:
        return  # of one rank; or no experts were spread, and DDP shares its parameters by itself
    groups = layers[0][0].groups
    layer_of = {id(tensor): layer for layer, module in layers for tensor in module.parameters(recurse=False)}
    tensors = named_tensors(model)
    with torch.no_grad():
        for name in sorted(names):
            tensor = tensors[name]
            if isinstance(tensor, DTensor):
                for dim, placement in enumerate(tensor.placements):
                    if placement.is_replicate():
                        dist.broadcast(local_shard(tensor), group=tensor.device_mesh.get_group(dim), group_src=0)
            elif not _is_spread(layer_of.get(id(tensor))):
                dist.broadcast(tensor.data, 0, group=groups.control)
            elif groups.replicas is not None:
                dist.broadcast(tensor.data, group=groups.replicas, group_src=0)


def _is_spread(layer: ExpertLayer | None) -> bool:
    return layer is not None and layer.groups.size > 1
