"""Brings the experts of all layers to where a placement wants them: at once, or behind the steps that follow."""

import time
from collections.abc import Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_eplb.parallel.consensus import ConsensusCheck
from lightning_eplb.parallel.experts import ExpertLayer
from lightning_eplb.parallel.groups import ExpertGroups
from lightning_eplb.placement import ExpertPlacement
from lightning_eplb.relocation.async_transfer import BackgroundRelocation
from lightning_eplb.relocation.optimizer_state import call_after_steps, has_rows, leaves, nested_optimizers, state_of
from lightning_eplb.relocation.plan import LayerMoves, plan_relocation
from lightning_eplb.relocation.transfer import gradients_to_move, relocate, tensors_to_move

_UNDERWAY: WeakKeyDictionary[ExpertLayer, BackgroundRelocation] = WeakKeyDictionary()
"""What moves behind training, by the model's first layer."""


class ExpertMover:
    """Moves primaries between ranks and switches the layers' maps. All ranks use it alike.

    A model has one: what another has under way in it, as after a failure, is abandoned.

    Args:
        modules: The converted modules, in the order of layers, each with what it knows.
        optimizers: Those that hold expert parameters: their state moves with the experts.
        use_async: Rows may move behind steps: the ranks get a process group for that.
    """

    def __init__(
        self, modules: Sequence[tuple[ExpertLayer, nn.Module]], optimizers: Iterable[Optimizer], use_async: bool
    ) -> None:
        self._modules = modules
        first_layer, _ = modules[0]
        self.groups: ExpertGroups = first_layer.groups
        self.placement = ExpertPlacement(
            np.stack([layer.physical_to_logical for layer, _ in modules]),
            first_layer.num_logical_experts,
            self.groups.size,
        )
        """Where experts are."""
        self.num_bytes = 0
        """What crossed ranks since the last start, over all ranks."""
        self.seconds = 0.0
        """What training waited for that, on this rank."""
        if (left_behind := _UNDERWAY.pop(first_layer, None)) is not None:
            left_behind.abandon()
        self._relocation_groups = self.groups.relocation_groups() if use_async and self.groups.size > 1 else None
        self._number_taken = 0
        self._relocation: BackgroundRelocation | None = None
        self._goal = self.placement
        self._has_stepped = False
        self._hooks: list[RemovableHandle] = []
        self.optimizers: list[Optimizer] = []
        self.watch(optimizers)
        self._capacity: tuple[float, ...] | None = None

    def watch(self, optimizers: Iterable[Optimizer]) -> None:
        """Move the state of these optimizers, and of those inside them, from now on; note when one of them steps."""
        for hook in self._hooks:
            hook.remove()
        self.optimizers = list(optimizers)
        self._all_optimizers = nested_optimizers(self.optimizers)
        self._hooks = call_after_steps(self._all_optimizers, self._note_step)

    def _note_step(self, *_: Any) -> None:
        self._has_stepped = True
        self._modules[0][0].ahead.discard()  # fused optimizers change weights without a new version of them

    @property
    def is_moving(self) -> bool:
        """Whether experts are still on their way, behind the steps."""
        return self._relocation is not None

    @property
    def goes_behind(self) -> bool:
        """Whether rows can move behind steps."""
        return self._relocation_groups is not None

    def tensors(self, layer_index: int, with_gradients: bool) -> list[Tensor]:
        """What moves with a layer's primaries, ``[n, ...]`` each."""
        return tensors_to_move(self._modules[layer_index][1], self._all_optimizers, with_gradients)

    def move(self, after: ExpertPlacement, capacity: tuple[float, ...] | None, with_gradients: bool) -> None:
        """Go to ``after`` now. Before the first row moves, all ranks compare what they are about to do.

        Args:
            capacity: How much work each EP rank gets from then on.
            with_gradients: Gradients move, too.

        Raises:
            RuntimeError: Ranks disagree. All raise it, and nothing was moved.
        """
        start = time.perf_counter()
        self._all_optimizers = nested_optimizers(self.optimizers)  # some are made in the first step
        plan = plan_relocation(self.placement, after)
        moved = {moves.layer: self.tensors(moves.layer, with_gradients) for moves in plan}
        ConsensusCheck(self.placement, after, moved, self.groups, names=self._names_of_state(moved)).wait()
        num_bytes = relocate(plan, moved.__getitem__, self.groups)
        self.num_bytes = num_bytes * self.groups.num_ep_groups
        self._capacity = capacity
        self._switch(after, range(after.num_layers))
        self.seconds = time.perf_counter() - start

    def begin(self, after: ExpertPlacement, capacity: tuple[float, ...] | None, most_bytes: int) -> None:
        """Go to ``after`` behind the steps that follow. Layers whose primaries stay follow it at once.

        Args:
            most_bytes: See :class:`~lightning_eplb.relocation.async_transfer.BackgroundRelocation`.

        Raises:
            RuntimeError: Ranks disagree. All raise it, and nothing was moved.
        """
        assert self._relocation_groups is not None
        start = time.perf_counter()
        self._all_optimizers = nested_optimizers(self.optimizers)  # some are made in the first step
        plan = plan_relocation(self.placement, after)
        moved = {moves.layer: self.tensors(moves.layer, with_gradients=False) for moves in plan}
        number = self._relocation_groups.first_free
        names = self._names_of_state(moved)
        check = ConsensusCheck(self.placement, after, moved, self.groups, number, names=names)
        relocation = self._prepared(plan, number, most_bytes) if number else None
        numbers = set(check.wait())
        if relocation is None or len(numbers) > 1:
            number = self._relocation_groups.add()
            relocation = self._prepared(plan, number, most_bytes)
        if plan:
            self._relocation_groups.acquire(number)
            self._number_taken = number
            self._relocation = _UNDERWAY[self._modules[0][0]] = relocation
            relocation.send()
        self._has_stepped = False
        self.num_bytes = 0
        self._goal, self._capacity = after, capacity
        self._switch(after, [layer for layer in range(after.num_layers) if layer not in moved])
        self.seconds = time.perf_counter() - start

    def go_on(self) -> None:
        """Right after an optimizer step: send the next layers off. Where no optimizer stepped, rows go on travelling.

        Raises:
            RuntimeError: An optimizer stepped, and those that were sent before are not in place.
        """
        if self._relocation is None or (self._relocation.is_underway and not self._has_stepped):
            return
        start = time.perf_counter()
        if self._relocation.is_underway:
            raise RuntimeError(
                "use_async=True, and before_optimizer_step() was not called before the optimizer's step: the rows that"
                " were under way are older than the weights; call it right before optimizer.step()"
            )
        if self._relocation.is_done:
            self._close()
        else:
            self._has_stepped = False
            self._relocation.prepare(self._weights_and_state)
            self._relocation.send()
        self.seconds += time.perf_counter() - start

    def put_in_place(self) -> None:
        """Right before an optimizer step: finish those that are under way, with the gradients that came to be.

        Raises:
            RuntimeError: Ranks have gradients for other parameters. All raise it, and nothing was put in place.
        """
        relocation = self._relocation
        if relocation is None or not relocation.is_underway:
            return
        start = time.perf_counter()
        gradients = {layer: gradients_to_move(self._modules[layer][1]) for layer in relocation.layers_underway}
        check = ConsensusCheck(self.placement, self._goal, gradients, self.groups)
        relocation.aim()
        check.wait()
        self._switch(self._goal, relocation.finish(gradients))
        self.num_bytes = relocation.num_bytes * self.groups.num_ep_groups
        self.seconds += time.perf_counter() - start

    def stop(self) -> None:
        """Put in place what is under way, and forget the rest."""
        self.put_in_place()
        if self._relocation is not None:
            self._close()

    def abandon(self) -> None:
        """Forget all that is not in place. Communicates with nobody."""
        if self._relocation is not None:
            self._relocation.abandon()
            _UNDERWAY.pop(self._modules[0][0], None)
        self._relocation = None

    def _prepared(self, plan: Sequence[LayerMoves], number: int, most_bytes: int) -> BackgroundRelocation:
        assert self._relocation_groups is not None
        relocation = BackgroundRelocation(plan, self.groups, self._relocation_groups[number], most_bytes)
        relocation.prepare(self._weights_and_state)
        return relocation

    def _close(self) -> None:
        """Nothing is under way any more: all that was sent has been received."""
        assert self._relocation_groups is not None
        self._relocation_groups.release(self._number_taken)
        _UNDERWAY.pop(self._modules[0][0], None)
        self._relocation = None

    def _weights_and_state(self, layer_index: int) -> list[Tensor]:
        return self.tensors(layer_index, with_gradients=False)

    def _names_of_state(self, layers: Iterable[int]) -> list[str]:
        """The optimizers by class, and by what names they keep rows of these layers' experts."""
        names = [type(optimizer).__qualname__ for optimizer in self._all_optimizers]
        for layer in layers:
            for parameter in self._modules[layer][1].parameters(recurse=False):
                for optimizer in self._all_optimizers:
                    state = state_of(optimizer, parameter)
                    kept = {key: sum(has_rows(each, len(parameter)) for each in leaves(state[key])) for key in state}
                    names += [f"{key}: {number}" for key, number in sorted(kept.items(), key=str) if number]
        return names

    def _switch(self, after: ExpertPlacement, layers: Iterable[int]) -> None:
        """Follow ``after`` in some layers, from the next forward on."""
        layers = list(layers)
        slots_YP = self.placement.physical_to_logical.copy()
        slots_YP[layers] = after.physical_to_logical[layers]
        self.placement = ExpertPlacement(slots_YP, after.num_logical_experts, after.num_ranks)
        for index in layers:
            self._modules[index][0].set_placement(self.placement, self._capacity)
