"""Experts as DTensors: dimension 0 over the ``ep`` dimension of a mesh, what ``fully_shard`` cuts beyond it."""

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from lightning_eplb import _compat

EP, EFSDP, REPLICATE = "ep", "efsdp", "replicate"
"""Dimensions of a mesh: ranks that share the experts of a layer; that share each expert; that hold the same shards."""


def local_shard(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, in the tensor's own memory and without a graph: all of one that is no DTensor.

    A DTensor of experts has this rank's rows in it, ``[n, ...]``, each cut as on the other ranks of the EP group.
    """
    with torch.no_grad():
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def with_local(tensor: DTensor, local: Tensor) -> DTensor:
    """A DTensor like ``tensor`` of which this rank holds ``local``."""
    return DTensor.from_local(
        local, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def spread_rows(module: nn.Module, ep_mesh: DeviceMesh) -> None:
    """Make the parameters of a module, this rank's rows of them, DTensors over the ranks of a mesh, by dimension 0."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        rows = DTensor.from_local(parameter.detach(), ep_mesh, [Shard(0)], run_check=False)
        setattr(module, name, nn.Parameter(rows, requires_grad=parameter.requires_grad))


def sharded_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that an optimizer has of a module that ``fully_shard`` was called for; else none.

    Within a forward the module itself has others, which are whole.
    """
    return _compat.fsdp2_parameters(module) if isinstance(module, FSDPModule) else []


def as_spread(rows: Tensor, group: dist.ProcessGroup) -> DTensor:
    """This rank's rows, in their own memory, as its part of a DTensor over the ranks of ``group``, by dimension 0."""
    return DTensor.from_local(rows, DeviceMesh.from_group(group, rows.device.type), [Shard(0)], run_check=False)


def expert_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The ranks that ``fully_shard`` spreads one EP rank's experts over; with replicas, two dimensions."""
    return mesh[REPLICATE, EFSDP] if REPLICATE in (mesh.mesh_dim_names or ()) else mesh[EFSDP]


def shard_dimension(shape: torch.Size, size: int) -> Shard | None:
    """The first dimension behind the experts' that ``size`` ranks can share evenly; ``None`` if there is none.

    Dimension 0 stays whole: a primary that changes its EP rank then moves between equal shards.
    """
    return next((Shard(dim) for dim in range(1, len(shape)) if shape[dim] % size == 0), None)


def check_mesh(mesh: DeviceMesh, model: nn.Module, world_size: int) -> None:
    """Raise ``ValueError`` unless experts of ``model`` can be spread over ``mesh``. Needs no communication."""
    names = mesh.mesh_dim_names or ()
    if EP not in names:
        raise ValueError(
            f"group: the mesh has dimensions {names}; it must have one named 'ep', the ranks that share the experts,"
            " as ExpertParallelStrategy makes it"
        )
    sizes = dict(zip(names, mesh.shape, strict=True))
    others = [name for name, size in sizes.items() if name not in (EP, EFSDP, REPLICATE) and size > 1]
    if others:
        raise ValueError(
            f"group: the mesh has {others[0]!r} of size {sizes[others[0]]}; its ranks would see the same tokens,"
            " and experts would count and compute each of them more than once. Experts take the dimensions 'replicate',"
            " 'efsdp' and 'ep'; every other must be of size 1"
        )
    if mesh.size() != world_size:
        raise ValueError(
            f"group: the mesh has {mesh.size()} ranks in dimensions {names} of sizes {tuple(mesh.shape)}; there are"
            f" {world_size} ranks, and each must be in it"
        )
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            raise ValueError(
                f"{name} is a DTensor already; call parallelize_experts before fully_shard, and without tensor"
                " parallelism"
            )
