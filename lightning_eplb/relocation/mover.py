"""Relocation of the experts of all models to new placements, at once or overlapped with training steps."""

import functools
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_eplb.parallel.consensus import ConsensusCheck
from lightning_eplb.parallel.expert_layer import ExpertLayer
from lightning_eplb.parallel.groups import ExpertGroups
from lightning_eplb.placement import ExpertPlacement
from lightning_eplb.relocation.async_transfer import AsyncTransfer
from lightning_eplb.relocation.optimizer_state import call_after_steps, has_rows, leaves, nested_optimizers, state_of
from lightning_eplb.relocation.placed_layers import PlacedLayers
from lightning_eplb.relocation.plan import LayerMoves, plan_relocations
from lightning_eplb.relocation.transfer import LayerTransfer, gradients_to_move, relocate, tensors_to_move

_IN_FLIGHT: WeakKeyDictionary[ExpertLayer, AsyncTransfer] = WeakKeyDictionary()
"""Transfers in flight by the first layer that their mover has."""


class ExpertMover:
    """Relocation of the primaries of one or more models, with their placements. All ranks call its methods alike.

    A model has one mover. A transfer of a former mover, as after a failure, is cancelled. Layers are numbered through:
    those of the first model, then those of the next.

    Args:
        models: Layers whose experts move, on the same process groups.
        optimizers: Optimizers of expert parameters, whose state moves with the experts.
        use_async: Allow transfers to overlap with training. Ranks get a process group for them.
    """

    def __init__(self, models: Sequence[PlacedLayers], optimizers: Iterable[Optimizer], use_async: bool) -> None:
        self._models = models
        self._modules = [each for model in models for each in model.modules]
        first_layer = self._modules[0].layer
        self.groups: ExpertGroups = first_layer.groups
        self.num_bytes = 0
        """Bytes that crossed ranks since the last relocation started, over all ranks."""
        self.seconds = 0.0
        """Seconds that training waited for it on this rank."""
        if (former := _IN_FLIGHT.pop(first_layer, None)) is not None:
            former.cancel()
        self._relocation_groups = self.groups.relocation_groups() if use_async and self.groups.size > 1 else None
        self._group_number = 0
        self._transfer: AsyncTransfer | None = None
        self._goal = self.placements
        self._has_stepped = False
        self._hooks: list[RemovableHandle] = []
        self.optimizers: list[Optimizer] = []
        self.watch(optimizers)
        self._capacity: tuple[float, ...] | None = None

    def watch(self, optimizers: Iterable[Optimizer]) -> None:
        """Move the state of these optimizers, and of those nested in them, from now on, and observe their steps."""
        for hook in self._hooks:
            hook.remove()
        self.optimizers = list(optimizers)
        self._all_optimizers = nested_optimizers(self.optimizers)
        self._hooks = call_after_steps(self._all_optimizers, self._on_step)

    def _on_step(self, *_: Any) -> None:
        self._has_stepped = True
        self.cancel_prefetch()  # fused optimizers don't increment the weights' versions

    def cancel_prefetch(self) -> None:
        """Drop prefetched weights, which are about to change unnoticed."""
        for prefetcher in {id(each.layer.prefetcher): each.layer.prefetcher for each in self._modules}.values():
            prefetcher.cancel()

    @property
    def placements(self) -> list[ExpertPlacement]:
        """Placements of the models now."""
        return [model.placement for model in self._models]

    @property
    def is_in_flight(self) -> bool:
        """``True`` while an asynchronous transfer is not done."""
        return self._transfer is not None

    @property
    def can_overlap(self) -> bool:
        """``True`` if transfers can overlap with training."""
        return self._relocation_groups is not None

    def layer_name(self, layer_index: int) -> str:
        """Return the name of a layer in its model."""
        return self._modules[layer_index].layer.name

    def tensors(self, layer_index: int, with_gradients: bool) -> list[Tensor]:
        """Return the tensors that move with a layer's primaries, ``[n, ...]`` each."""
        return tensors_to_move(self._modules[layer_index].module, self._all_optimizers, with_gradients)

    def move(self, after: Sequence[ExpertPlacement], capacity: tuple[float, ...] | None, with_gradients: bool) -> None:
        """Move to the placements ``after`` now. All ranks verify that they agree before the first row moves.

        Args:
            after: Placement to move to, for each model.
            capacity: Work that each EP rank gets from then on.
            with_gradients: Move gradients, too.

        Raises:
            RuntimeError: Ranks disagree. All raise it, and nothing was moved.
        """
        start = time.perf_counter()
        self._all_optimizers = nested_optimizers(self.optimizers)  # some are created in the first step
        plan = plan_relocations(self.placements, after)
        moved = {moves.layer: self.tensors(moves.layer, with_gradients) for moves in plan}
        ConsensusCheck(self.placements, after, moved, self.groups, names=self._names_of_state(moved)).wait()
        num_bytes = relocate(plan, moved.__getitem__, self.groups)
        self.num_bytes = num_bytes * self.groups.num_ep_groups
        self._capacity = capacity
        self._switch(after, range(len(self._modules)))
        self.seconds = time.perf_counter() - start

    def rehearse(self, with_gradients: bool, max_bytes: int, tell: Callable[[LayerTransfer], None]) -> None:
        """Exchange the rows of all primaries, each with the next rank, and drop them. Nothing changes.

        As many rows are in flight at a time as in a relocation.

        Args:
            with_gradients: Gradients move, too.
            max_bytes: Bytes a step if transfers overlap with training.
            tell: Function that is called before a transfer is sent.
        """
        self._all_optimizers = nested_optimizers(self.optimizers)  # some are created in the first step
        waiting = deque(plan_relocations(self.placements, [_rotated(placement) for placement in self.placements]))
        group, previous = self.groups.ep_group, None
        assert group is not None
        while waiting:
            tensors_of = functools.partial(self.tensors, with_gradients=with_gradients and not self.can_overlap)
            bound = max_bytes if self.can_overlap else math.inf
            transfer = LayerTransfer(waiting, tensors_of, self.groups, group, bound, self.can_overlap)
            tell(transfer)
            transfer.send()
            if previous is not None:
                previous.drain()
            previous = None if self.can_overlap else transfer
            if self.can_overlap:
                transfer.drain()
        if previous is not None:
            previous.drain()

    def start(self, after: Sequence[ExpertPlacement], capacity: tuple[float, ...] | None, max_bytes: int) -> None:
        """Start to move to ``after`` during the next steps. Layers whose primaries stay use it at once.

        Args:
            after: Placement to move to, for each model.
            capacity: Work that each EP rank gets from then on.
            max_bytes: Bytes a step, see :class:`~lightning_eplb.relocation.async_transfer.AsyncTransfer`.

        Raises:
            RuntimeError: Ranks disagree. All raise it, and nothing was moved.
        """
        assert self._relocation_groups is not None
        start = time.perf_counter()
        self._all_optimizers = nested_optimizers(self.optimizers)  # some are created in the first step
        plan = plan_relocations(self.placements, after)
        moved = {moves.layer: self.tensors(moves.layer, with_gradients=False) for moves in plan}
        number = self._relocation_groups.first_free
        names = self._names_of_state(moved)
        check = ConsensusCheck(self.placements, after, moved, self.groups, number, names=names)
        transfer = self._prepare(plan, number, max_bytes) if number else None
        numbers = set(check.wait())
        if transfer is None or len(numbers) > 1:
            number = self._relocation_groups.add()
            transfer = self._prepare(plan, number, max_bytes)
        if plan:
            self._relocation_groups.acquire(number)
            self._group_number = number
            self._transfer = _IN_FLIGHT[self._modules[0].layer] = transfer
            transfer.send()
        self._has_stepped = False
        self.num_bytes = 0
        self._goal, self._capacity = after, capacity
        self._switch(after, [layer for layer in range(len(self._modules)) if layer not in moved])
        self.seconds = time.perf_counter() - start

    def send_next(self) -> None:
        """Send the next layers, right after an optimizer step. Does nothing if no optimizer stepped.

        Raises:
            RuntimeError: An optimizer stepped before rows in flight were committed.
        """
        if self._transfer is None or (self._transfer.is_in_flight and not self._has_stepped):
            return
        start = time.perf_counter()
        if self._transfer.is_in_flight:
            raise RuntimeError(
                "use_async=True, and before_optimizer_step() was not called before the optimizer's step: the rows in"
                " flight are older than the weights; call it right before optimizer.step()"
            )
        if self._transfer.is_done:
            self._close()
        else:
            self._has_stepped = False
            self._transfer.prepare(self._weights_and_state)
            self._transfer.send()
        self.seconds += time.perf_counter() - start

    def commit(self) -> None:
        """Commit rows in flight with their gradients, right before an optimizer step.

        Raises:
            RuntimeError: Ranks have gradients for other parameters. All raise it, and nothing was committed.
        """
        transfer = self._transfer
        if transfer is None or not transfer.is_in_flight:
            return
        start = time.perf_counter()
        gradients = {layer: gradients_to_move(self._modules[layer].module) for layer in transfer.layers_in_flight}
        check = ConsensusCheck(self.placements, self._goal, gradients, self.groups)
        transfer.prepare_commit()
        check.wait()
        self._switch(self._goal, transfer.commit(gradients))
        self.num_bytes = transfer.num_bytes * self.groups.num_ep_groups
        self.seconds += time.perf_counter() - start

    def stop(self) -> None:
        """Commit rows in flight, and stop the relocation."""
        self.commit()
        if self._transfer is not None:
            self._close()

    def cancel(self) -> None:
        """Drop rows that are not committed. Performs no communication, so it is safe after a failure."""
        if self._transfer is not None:
            self._transfer.cancel()
            _IN_FLIGHT.pop(self._modules[0].layer, None)
        self._transfer = None

    def _prepare(self, plan: Sequence[LayerMoves], number: int, max_bytes: int) -> AsyncTransfer:
        assert self._relocation_groups is not None
        transfer = AsyncTransfer(plan, self.groups, self._relocation_groups[number], max_bytes)
        transfer.prepare(self._weights_and_state)
        return transfer

    def _close(self) -> None:
        """Release the process group, since all rows that were sent have been received."""
        assert self._relocation_groups is not None
        self._relocation_groups.release(self._group_number)
        _IN_FLIGHT.pop(self._modules[0].layer, None)
        self._transfer = None

    def _weights_and_state(self, layer_index: int) -> list[Tensor]:
        return self.tensors(layer_index, with_gradients=False)

    def _names_of_state(self, layers: Iterable[int]) -> list[str]:
        """Return the classes of the optimizers, and the names of their state with rows of these layers' experts."""
        names = [type(optimizer).__qualname__ for optimizer in self._all_optimizers]
        for layer in layers:
            for parameter in self._modules[layer].module.parameters(recurse=False):
                for optimizer in self._all_optimizers:
                    state = state_of(optimizer, parameter)
                    kept = {key: sum(has_rows(each, len(parameter)) for each in leaves(state[key])) for key in state}
                    names += [f"{key}: {number}" for key, number in sorted(kept.items(), key=str) if number]
        return names

    def _switch(self, after: Sequence[ExpertPlacement], layers: Iterable[int]) -> None:
        """Use ``after`` in some layers from the next forward pass on."""
        layers, first = list(layers), 0
        for model, goal in zip(self._models, after, strict=True):
            end = first + len(model.modules)
            if rows := [layer - first for layer in layers if first <= layer < end]:
                model.switch(goal, rows, self._capacity)
            first = end


def _rotated(placement: ExpertPlacement) -> ExpertPlacement:
    """Return a placement that has each primary on the next rank, and no redundant experts."""
    slots_YRS = np.roll(placement.without_copies().by_rank, 1, axis=1)
    slots_YP = slots_YRS.reshape(placement.physical_to_logical.shape)
    return ExpertPlacement(slots_YP, placement.num_logical_experts, placement.num_ranks)
