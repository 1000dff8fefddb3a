"""Lightning's ``FSDPStrategy`` (FSDP1), which shards everything but the experts."""

from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType

from lightning_eplb import _compat
from lightning_eplb.checkpoint.consolidate import INDEX, WEIGHTS_FSDP1
from lightning_eplb.checkpoint.distributed import load_distributed_checkpoint, save_folder
from lightning_eplb.integrations.patches import replace, restore
from lightning_eplb.parallel.fsdp1_parameters import prepare_for_flattening, spread_parameters
from lightning_eplb.parallel.parallelize import expert_layers


def check_fsdp(strategy: FSDPStrategy) -> None:
    """Raise ``ValueError`` for options that are not supported with expert parallelism. Performs no communication."""
    if strategy.cpu_offload.offload_params:
        raise ValueError(
            "FSDPStrategy(cpu_offload=True) is not supported by EPLBCallback, as experts stay on their device."
            " Use a larger ep_size for fewer experts on each."
        )
    if not strategy.kwargs.get("use_orig_params"):
        raise ValueError(
            "FSDPStrategy(use_orig_params=False) is not supported by EPLBCallback, as an optimizer must hold experts"
            " beside sharded parameters. Leave the argument out."
        )
    ignored = list(strategy.kwargs.get("ignored_states") or ())
    if strategy.kwargs.get("ignored_modules") or any(isinstance(one, nn.Module) for one in ignored):
        raise ValueError(
            "FSDPStrategy ignores parameters or modules, not both, and with EPLBCallback it ignores those of experts."
            " Use ignored_states=[...] with the parameters of your modules."
        )


def check_fsdp_hook(model: nn.Module | None) -> None:
    """Raise ``ValueError`` for a registered communication hook that may not average. Performs no communication."""
    hook = _compat.fsdp1_comm_hook(model) if isinstance(model, FullyShardedDataParallel) else None
    if hook is not None and hook not in (averaging := _compat.fsdp1_averaging_hooks()):
        name = getattr(hook, "__name__", repr(hook))
        raise ValueError(
            f"FullyShardedDataParallel.register_comm_hook(hook={name}) is not supported"
            " with experts that are spread over ranks: their gradients are averaged over all ranks, and so must all"
            f" others be. Use one of {', '.join(each.__name__ for each in averaging)} of"
            " torch.distributed.algorithms._comm_hooks.default_hooks, or none."
        )


class SpreadExperts:
    """Expert parallelism under an ``FSDPStrategy``, until :meth:`undo`.

    FSDP ignores the experts, which are prepared for that when the strategy asks the precision plugin to convert the
    model. That is the last call before FSDP wraps the model, after ``configure_model``. State dicts and checkpoints
    hold the experts in the same form as all other parameters. The strategy also resumes from distributed checkpoints
    of FSDP2.

    Args:
        strategy: Strategy of the trainer, before its ``setup``.
        module: Model, converted before the strategy wraps it.
    """

    def __init__(self, strategy: FSDPStrategy, module: "pl.LightningModule") -> None:
        self._strategy, self._module = strategy, module
        self._precision = strategy.precision_plugin
        self._convert, self._load = self._precision.convert_module, strategy.load_checkpoint
        self._ignored = strategy.kwargs.get("ignored_states")
        replace(self._precision, "convert_module", self._convert_and_leave_out)
        replace(strategy, "load_checkpoint", self._load_checkpoint)
        replace(strategy, "save_checkpoint", partial(_save_checkpoint, strategy))

    def _convert_and_leave_out(self, module: nn.Module) -> nn.Module:
        converted = self._convert(module)
        mixed = self._strategy.mixed_precision_config
        compute_dtype = mixed.param_dtype if mixed is not None else None
        prepare_for_flattening(self._module, self._strategy.root_device, compute_dtype)
        if experts := list(spread_parameters(self._module).values()):
            self._strategy.kwargs["ignored_states"] = [*(self._ignored or ()), *experts]
        for layer, _ in expert_layers(self._module):
            layer.save_shards_while(self._is_saved_in_shards)
        return converted

    def _is_saved_in_shards(self) -> bool:
        """Return ``True`` while FSDP makes sharded state dicts."""
        wrapped = self._strategy.model
        settings = FullyShardedDataParallel.get_state_dict_type(wrapped) if wrapped is not None else None
        return settings is not None and settings.state_dict_type == StateDictType.SHARDED_STATE_DICT

    def _load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        strategy = self._strategy
        path = strategy.broadcast(checkpoint_path)
        if not Path(path).is_dir():
            if Path(path).is_file():  # Lightning's reader runs the code in it: raise, as other strategies do
                torch.load(path, map_location="cpu", mmap=True, weights_only=weights_only)
            return self._load(path, weights_only=weights_only)
        assert strategy.model is not None
        fits = self._module.trainer.state.fn == TrainerFn.FITTING
        return load_distributed_checkpoint(
            path, strategy.model, strategy.optimizers if fits else (), self._module.strict_loading, weights_only
        )

    def undo(self) -> None:
        """Restore strategy and plugin. State dicts and checkpoints stay correct."""
        restore(self._precision, "convert_module")
        restore(self._strategy, "load_checkpoint")
        kwargs: dict[str, Any] = self._strategy.kwargs
        kwargs.pop("ignored_states", None)
        if self._ignored is not None:
            kwargs["ignored_states"] = self._ignored


def _save_checkpoint(
    strategy: FSDPStrategy, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
) -> None:
    """Save as the strategy does, but replace a folder in one step. May be called after ``fit``, too."""
    save = type(strategy).save_checkpoint
    if not _compat.saves_shards(strategy) or storage_options is not None:
        save(strategy, checkpoint, filepath, storage_options)
    elif save is FSDPStrategy.save_checkpoint:
        save_folder(strategy, checkpoint, filepath, WEIGHTS_FSDP1)
    else:  # a strategy of the user's, which may overwrite what is there: without its index nobody loads a mixture
        if strategy.is_global_zero:
            (Path(filepath) / INDEX).unlink(missing_ok=True)
        strategy.barrier()
        save(strategy, checkpoint, filepath, storage_options)
