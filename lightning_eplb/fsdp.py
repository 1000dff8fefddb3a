"""Lightning's ``FSDPStrategy`` (FSDP1): it shards everything but the experts."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn

from lightning_eplb.parallel.flat_parameters import prepare_for_flattening, spread_parameters


def check_fsdp(strategy: FSDPStrategy) -> None:
    """Raise ``ValueError`` for what can't be done while experts are spread over ranks. Needs no communication."""
    if strategy.cpu_offload.offload_params:
        raise ValueError(
            "FSDPStrategy(cpu_offload=True) is not supported by EPLBCallback, as experts stay on their device;"
            " a larger ep_size leaves fewer of them on each"
        )
    if not strategy.kwargs.get("use_orig_params"):
        raise ValueError(
            "FSDPStrategy(use_orig_params=False) is not supported by EPLBCallback, as an optimizer must hold experts"
            " beside what is sharded; leave the argument out"
        )
    ignored = list(strategy.kwargs.get("ignored_states") or ())
    if strategy.kwargs.get("ignored_modules") or any(isinstance(one, nn.Module) for one in ignored):
        raise ValueError(
            "FSDPStrategy ignores parameters or modules, not both, and with EPLBCallback it ignores those of experts;"
            " give ignored_states=[...] the parameters of your modules"
        )


class ExpertsLeftOut:
    """Keeps experts out of what ``FSDPStrategy`` wraps, and has them ready for it.

    That is done when the strategy asks the precision plugin to convert the model, the last thing before it wraps it:
    ``configure_model`` has run by then.

    Args:
        strategy: That of the trainer, before its ``setup``.
        module: Converted by then.
    """

    def __init__(self, strategy: FSDPStrategy, module: "pl.LightningModule") -> None:
        self._strategy, self._module = strategy, module
        self._precision = strategy.precision_plugin
        self._convert = self._precision.convert_module
        self._ignored = strategy.kwargs.get("ignored_states")
        self._precision.convert_module = self._convert_and_leave_out  # type: ignore[method-assign]

    def _convert_and_leave_out(self, module: nn.Module) -> nn.Module:
        converted = self._convert(module)
        mixed = self._strategy.mixed_precision_config
        compute_dtype = mixed.param_dtype if mixed is not None else None
        prepare_for_flattening(self._module, self._strategy.root_device, compute_dtype)
        if experts := list(spread_parameters(self._module).values()):
            self._strategy.kwargs["ignored_states"] = [*(self._ignored or ()), *experts]
        return converted

    def undo(self) -> None:
        """Leave strategy and plugin as they were."""
        vars(self._precision).pop("convert_module", None)
        kwargs: dict[str, Any] = self._strategy.kwargs
        kwargs.pop("ignored_states", None)
        if self._ignored is not None:
            kwargs["ignored_states"] = self._ignored
