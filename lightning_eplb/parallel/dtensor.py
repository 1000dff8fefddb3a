"""Experts as DTensors: sharded over the ``ep`` dimension of a mesh by dimension 0, and by ``fully_shard`` beyond it."""

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from lightning_eplb import _compat

EP, EFSDP, REPLICATE = "ep", "efsdp", "replicate"
"""Mesh dimensions: ranks that share the experts of a layer, that share each expert, that hold the same shards."""


def local_shard(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a DTensor, or a plain tensor as it is, without a copy and without a graph.

    The shard of an expert parameter has this rank's rows, ``[n, ...]``, each cut as on the other EP ranks.
    """
    with torch.no_grad():
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def with_local(tensor: DTensor, local: Tensor, num_rows: int | None = None) -> DTensor:
    """Return a DTensor like ``tensor`` with the local shard ``local``, and with ``num_rows`` rows if given."""
    shape = tensor.shape if num_rows is None else torch.Size((num_rows, *tensor.shape[1:]))
    return DTensor.from_local(
        local, tensor.device_mesh, tensor.placements, run_check=False, shape=shape, stride=tensor.stride()
    )


def distribute_rows(module: nn.Module, ep_mesh: DeviceMesh) -> None:
    """Replace a module's parameters, this rank's rows, by DTensors over the ranks of a mesh, by dimension 0."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        rows = DTensor.from_local(parameter.detach(), ep_mesh, [Shard(0)], run_check=False)
        setattr(module, name, nn.Parameter(rows, requires_grad=parameter.requires_grad))


def sharded_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Return the sharded parameters of a module under ``fully_shard``, or an empty list.

    Within a forward pass the module itself has unsharded parameters.
    """
    return _compat.fsdp2_parameters(module) if isinstance(module, FSDPModule) else []


def as_distributed(rows: Tensor, group: dist.ProcessGroup) -> DTensor:
    """Return a DTensor over the ranks of ``group`` whose local shard, by dimension 0, is ``rows``."""
    return DTensor.from_local(rows, DeviceMesh.from_group(group, rows.device.type), [Shard(0)], run_check=False)


def check_mesh(mesh: DeviceMesh, model: nn.Module, world_size: int) -> None:
    """Raise ``ValueError`` unless experts of ``model`` can be sharded over ``mesh``. Needs no communication."""
    names = mesh.mesh_dim_names or ()
    if EP not in names:
        raise ValueError(
            f"group: the mesh has dimensions {names}. It must have one named 'ep', the ranks that share the experts,"
            " as the mesh of ExpertParallelStrategy."
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
                f"{name} is a DTensor already. Call parallelize_experts before fully_shard, and without tensor"
                " parallelism."
            )
