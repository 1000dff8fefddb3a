"""Requirements of ``EPLBCallback`` on the trainer, its callbacks and the model, checked before any communication.

All checks raise ``ValueError``, on all ranks alike.
"""

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelPruning, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lightning_eplb import _compat
from lightning_eplb._validation import check_divides, check_multiple
from lightning_eplb.integrations.fsdp1 import check_fsdp
from lightning_eplb.parallel.communication_hooks import check_averages
from lightning_eplb.parallel.discovery import check_experts, find_experts
from lightning_eplb.parallel.groups import check_nodes
from lightning_eplb.parallel.parallelize import expert_layers
from lightning_eplb.strategies import ExpertParallelStrategy


def check_world_size(trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
    """Check that the trainer has as many ranks as a model that was converted before is spread over."""
    for layer, _ in expert_layers(pl_module):
        ranks = layer.groups.world_size
        if layer.groups.size > 1 and ranks != trainer.world_size:
            raise ValueError(
                f"the experts of {type(pl_module).__name__} are spread over {ranks} ranks, and this trainer has"
                f" {trainer.world_size}; run it on {ranks}, or load what was saved into a module that was just made"
            )


def check_trainer(trainer: "pl.Trainer", ep_size: int, num_redundant_experts: int) -> None:
    """Check the number of ranks, the strategy, its communication hook and the other callbacks of the trainer.

    Args:
        trainer: Trainer with its strategy.
        ep_size: Ranks of an EP group, as :func:`resolve_ep_size` returns it.
        num_redundant_experts: Redundant experts of each layer.
    """
    ranks = trainer.world_size
    check_divides(ep_size, ranks, f"ep_size={ep_size}", f"the {ranks} data-parallel ranks")
    check_multiple(
        num_redundant_experts, ep_size, f"num_redundant_experts={num_redundant_experts}", f"ep_size={ep_size}"
    )
    if isinstance(trainer.strategy, FSDPStrategy):
        check_fsdp(trainer.strategy)
    elif not isinstance(trainer.strategy, (DDPStrategy, SingleDeviceStrategy, ExpertParallelStrategy)):
        raise ValueError(
            f"strategy={type(trainer.strategy).__name__} is not supported by EPLBCallback; 'ddp', 'fsdp' or"
            " lightning_eplb.ExpertParallelStrategy() on several devices, or a single device, would do"
        )
    comm = _compat.comm_hook_of(trainer.strategy) if isinstance(trainer.strategy, DDPStrategy) else None
    if comm is not None and ep_size > 1 and type(comm.state).__name__ == "PostLocalSGDState":  # imported by its users
        raise ValueError(
            "DDPStrategy(ddp_comm_state=PostLocalSGDState(...)) is not supported by EPLBCallback: local SGD averages"
            " parameters over ranks, and each has other experts; leave its three arguments out"
        )
    if comm is not None and ep_size > 1 and comm.hook is not None:
        source = f"DDPStrategy(ddp_comm_hook={getattr(comm.hook, '__name__', repr(comm.hook))})"
        check_averages(source, comm.hook, comm.state, comm.wrapper)
    check_nodes(ep_size, trainer.num_devices)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if ep_size > 1 and isinstance(callback, (WeightAveraging, StochasticWeightAveraging)):
            raise ValueError(
                f"{type(callback).__name__} is not supported with EPLBCallback: it averages the rows of experts by"
                " their position, and experts change positions. Remove one of the two callbacks."
            )


def check_found_experts(pl_module: "pl.LightningModule", found: dict[str, nn.Module]) -> None:
    """Check that experts were found in a model that builds itself in ``setup``, which runs after that of callbacks."""
    has_any = any(type(getattr(module, "num_experts", None)) is int for module in pl_module.modules())
    if not found and not has_any and is_overridden("setup", pl_module):
        name = type(pl_module).__name__
        raise ValueError(
            f"no MoE layer found in {name}, whose setup() runs after that of EPLBCallback: build the model in"
            f" {name}.__init__, or build it in {name}.configure_model and call parallelize_experts(self) at its end"
        )


def check_other_parameters(pl_module: "pl.LightningModule", found: dict[str, nn.Module]) -> None:
    """Check that the model trains a parameter outside of experts, which DDP requires.

    Args:
        pl_module: Model that is not converted yet.
        found: Its expert modules by name.
    """
    experts = {id(parameter) for module in found.values() for parameter in module.parameters(recurse=False)}
    if not any(p.requires_grad and id(p) not in experts for p in pl_module.parameters()):
        raise ValueError(
            f"{type(pl_module).__name__} trains no parameter outside of experts, and DDP does not support such a model."
            " Let one other parameter require gradients, such as a norm's."
        )


def check_pruning(trainer: "pl.Trainer", pl_module: "pl.LightningModule", ep_size: int) -> None:
    """Check that Lightning's ``ModelPruning`` does not prune experts, which differ by rank."""
    if ep_size == 1:
        return
    experts = {id(module) for _, module in (*expert_layers(pl_module), *find_experts(pl_module))}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if not isinstance(callback, ModelPruning):
            continue
        for module, name in _compat.pruned_by(callback, pl_module):
            if id(module) in experts:
                raise ValueError(
                    f"{type(callback).__name__} prunes {name!r} of a {type(module).__name__}, and EPLBCallback spreads"
                    " experts over ranks, each of which would prune its own by themselves; leave experts out of"
                    " parameters_to_prune"
                )


def resolve_ep_size(trainer: "pl.Trainer", ep_size: int | None) -> int:
    """Return the ranks of an EP group: the argument, or else the strategy's, or all ranks."""
    if not isinstance(trainer.strategy, ExpertParallelStrategy):
        return trainer.world_size if ep_size is None else ep_size
    theirs = trainer.strategy.ep_size
    if ep_size not in (None, theirs):
        raise ValueError(
            f"ep_size={ep_size} must be that of ExpertParallelStrategy, which is {theirs}; leave it out here"
        )
    return theirs


def check_converted_model(
    trainer: "pl.Trainer", pl_module: "pl.LightningModule", ep_size: int, num_redundant_experts: int
) -> None:
    """Check that a model that ``configure_model`` converted fits the arguments and the strategy.

    Args:
        trainer: Trainer with its strategy.
        pl_module: Model after ``configure_model``.
        ep_size: Ranks of an EP group, as :func:`resolve_ep_size` returns it.
        num_redundant_experts: Redundant experts of each layer.
    """
    layers = [layer for layer, _ in expert_layers(pl_module)]
    is_sharded = isinstance(trainer.strategy, ExpertParallelStrategy)
    if not layers:
        check_experts(pl_module, dict(find_experts(pl_module)), ep_size, num_redundant_experts)
        call = "fully_shard_moe(self.model, self.device_mesh, " if is_sharded else "parallelize_experts(self, "
        raise ValueError(
            "configure_model built MoE layers and did not convert them; call"
            f" {call}num_redundant_experts={num_redundant_experts}) at its end"
        )
    for layer, module in expert_layers(pl_module):
        if is_sharded and layer.groups.num_ep_groups > 1 and not isinstance(module, FSDPModule):
            raise ValueError(
                f"{layer.name} was spread over a mesh and not sharded, so that nobody averages its gradients; call"
                " fully_shard_moe(model, mesh), or fully_shard(experts, mesh=mesh['efsdp'],"
                " shard_placement_fn=lambda parameter: Shard(1))"
            )
    if is_sharded and trainer.world_size > 1:
        _check_sharded(pl_module)
    if layers[0].groups.size == 1 < min(ep_size, trainer.world_size):
        raise ValueError(
            f"ep_size={ep_size}, and parallelize_experts was called before there were other ranks, in __init__; call it"
            " in configure_model, or leave a model that is built in __init__ to EPLBCallback"
        )
    for layer in layers:
        redundant = len(layer.physical_to_logical) - layer.num_logical_experts
        if layer.groups.size != ep_size or redundant != num_redundant_experts:
            raise ValueError(
                f"EPLBCallback has ep_size={ep_size} and num_redundant_experts={num_redundant_experts};"
                f" parallelize_experts was called for {layer.groups.size} ranks with"
                f" num_redundant_experts={redundant}; give both the same"
            )


def _check_sharded(module: nn.Module) -> None:
    """Check that ``fully_shard`` was called for all parameters, as the strategy averages no gradients itself."""
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and not isinstance(parameter, DTensor):
            raise ValueError(
                f"{name} was not sharded, so that nobody averages its gradient; under ExpertParallelStrategy"
                " configure_model must call fully_shard_moe(model, self.device_mesh), or fully_shard for all else"
            )


def keeps_gradients(module: "pl.LightningModule") -> bool:
    """Return ``True`` if gradients may be used after an optimizer step: Lightning's loop zeroes them before."""
    overridden = (is_overridden(name, module) for name in ("optimizer_step", "optimizer_zero_grad"))
    return not module.automatic_optimization or any(overridden)
