"""Validation, testing and prediction in which ranks have different numbers of batches."""

from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch.nn.parallel import DistributedDataParallel

from lightning_eplb import _compat
from lightning_eplb.integrations.patches import call_before, restore
from lightning_eplb.parallel.groups import ExpertGroups
from lightning_eplb.parallel.join import ExpertJoin
from lightning_eplb.parallel.parallelize import expert_layers
from lightning_eplb.parallel.per_expert_state import CounterSync

_HAS_BATCH, _PAUSES, _IS_DONE = 0, 1, 2


class Evaluation:
    """One run of validation, testing or prediction in which some ranks may run out of batches before others.

    Under DDP a rank without further batches takes part in the expert layers of the others. FSDP gathers its parameters
    on all ranks for each batch: there all ranks raise an error at the first batch that some rank does not have. Ranks
    synchronize at the end of a dataloader, before Lightning reduces metrics over ranks.

    Every rank makes one when its evaluation starts. It ends with the trainer's loop, or by :meth:`stop` after an
    exception.

    Args:
        trainer: Trainer that is about to evaluate.
        module: Converted model.
    """

    def __init__(self, trainer: "pl.Trainer", module: "pl.LightningModule") -> None:
        self._trainer = trainer
        self._layers = list(expert_layers(module))
        self._uneven: ExpertJoin | None = None
        self._counted: list[CounterSync] = []
        self._control: dist.ProcessGroup | None = None
        self._num_batches, self._dataloader = 0, 0
        self._loop = _loop_of(trainer)
        self._replaced = ["on_run_end"]
        groups = {id(layer.groups): layer.groups for layer, _ in self._layers}
        if isinstance(trainer.strategy, (FSDPStrategy, ModelParallelStrategy)):
            self._control = next((each.cpu_group for each in groups.values()), None)
        elif len(groups) == 1:
            (of_all,) = groups.values()
            if of_all.size > 1:
                self._serve_uneven_calls(of_all)
        if self._control is None and self._uneven is None:
            return
        if (end := _compat.end_of_dataloader(self._loop)) is not None:
            self._replaced.append(end)
            call_before(self._loop, end, self._pause)
        call_before(self._loop, "on_run_end", self._finish)

    def start_batch(self, dataloader_idx: int) -> None:
        """Synchronize with the other ranks under FSDP. Every rank calls it before a batch.

        Raises:
            ValueError: On all ranks, if one has no batch.
        """
        self._meet(_HAS_BATCH)
        self._num_batches = self._num_batches + 1 if dataloader_idx == self._dataloader else 1
        self._dataloader = dataloader_idx

    def stop(self) -> None:
        """Restore the layers and the trainer's loop. Performs no communication."""
        for layer, _ in self._layers:
            layer.set_join(None)
        self._layers, self._uneven, self._control, self._counted = [], None, None, []
        restore(self._loop, *self._replaced)

    def _serve_uneven_calls(self, groups: ExpertGroups) -> None:
        named = [(layer.name, layer.num_logical_experts, module) for layer, module in self._layers]
        device = next(self._layers[0][1].parameters()).device
        self._uneven = ExpertJoin(named, groups, device)  # type: ignore[arg-type]
        for layer, _ in self._layers:
            layer.set_join(self._uneven)
        wrapped = self._trainer.strategy.model
        if isinstance(wrapped, DistributedDataParallel) and wrapped.will_sync_module_buffers():
            _compat.sync_buffers(wrapped)  # the first forward would, and a rank without any batch has none
            wrapped.require_forward_param_sync = False
        if groups.edp_group is not None:
            self._counted = [CounterSync(module, layer.per_expert.counters) for layer, module in self._layers]

    def _pause(self) -> None:
        if self._uneven is not None:
            self._uneven.pause()
        self._meet(_PAUSES)

    def _finish(self) -> None:
        if self._uneven is not None:
            self._uneven.finish()
        for counted, (layer, _) in zip(self._counted, self._layers, strict=False):
            assert layer.groups.edp_group is not None
            counted.all_reduce(layer.groups.edp_group)
        self._meet(_IS_DONE)
        self.stop()

    def _meet(self, mine: int) -> None:
        """Exchange under FSDP what each rank is about to do, and raise unless all ranks do the same."""
        if self._control is None:
            return
        gathered = [torch.empty(2, dtype=torch.int64) for _ in range(dist.get_world_size(self._control))]
        dist.all_gather(gathered, torch.tensor([mine, self._num_batches]), group=self._control)
        doing = [int(theirs[0]) for theirs in gathered]
        if len(set(doing)) == 1:
            return
        behind = [rank for rank, what in enumerate(doing) if what != _HAS_BATCH]
        counts = [int(gathered[rank][1]) for rank in behind]
        stage = self._trainer.state.stage
        assert stage is not None
        name = stage.dataloader_prefix
        remedy = f", or Trainer(limit_{name}_batches={min(counts)})" if min(counts) else ""
        raise ValueError(
            f"{name}_dataloader has unequal numbers of batches: ranks {behind} have none left after {counts}, and"
            f" {type(self._trainer.strategy).__name__} gathers parameters on all ranks for each batch. Use a sampler"
            f" that gives all ranks the same number of batches, such as DistributedSampler{remedy}."
        )


def _loop_of(trainer: "pl.Trainer") -> Any:
    if trainer.predicting:
        return trainer.predict_loop
    if trainer.testing:
        return trainer.test_loop
    is_within_fit = trainer.state.fn == TrainerFn.FITTING
    return trainer.fit_loop.epoch_loop.val_loop if is_within_fit else trainer.validate_loop
