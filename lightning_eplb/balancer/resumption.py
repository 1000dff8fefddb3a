"""Resumption of a run: its state in a checkpoint, and experts where the checkpoint had them."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_eplb.balancer.models import BalancedModels, ModelLayers
from lightning_eplb.balancer.saved_state import check_saved_state, load_windows, save_windows
from lightning_eplb.balancer.schedule import RearrangementState, Schedule
from lightning_eplb.balancer.step_stats import RearrangementResult, RunTotals
from lightning_eplb.parallel.barrier import monitored_barrier
from lightning_eplb.parallel.consensus import decide_on_rank_zero
from lightning_eplb.parallel.groups import ExpertGroups
from lightning_eplb.placement import ExpertPlacement
from lightning_eplb.relocation.mover import ExpertMover


class SavedPlacements(NamedTuple):
    """Placements in a balancer's state, as they were loaded and not checked yet.

    Attributes:
        slots: Logical expert of each slot, ``[Y, P]``, of each model by name, or of the only one under any name.
        num_ranks: Ranks that shared the experts.
        is_rearranging: A rearrangement was due, planned or in flight.
    """

    slots: dict[str, Any]
    num_ranks: Any
    is_rearranging: bool

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "SavedPlacements":
        """Take the placements from a state of ``ExpertLoadBalancer.state_dict()``."""
        saved = {"model": state} if "window" in state else state.get("models", {})
        slots = {name: its.get("physical_to_logical") for name, its in saved.items()}
        return cls(slots, state.get("num_ranks"), bool(state.get("is_rearranging", False)))


class Resumption(NamedTuple):
    """Rank 0's decision where experts go when a run resumes, the same on every rank.

    Attributes:
        placements: Saved placements in the order of models; ``None`` to plan by the windows.
        reason: Why they were not taken, in a sentence. Empty if they were.
        capacity: Share of the work that each EP rank gets; ``None``: equal shares.
    """

    placements: list[ExpertPlacement] | None
    reason: str
    capacity: tuple[float, ...] | None


def decide_resumption(
    saved: SavedPlacements, models: Sequence[ModelLayers], capacity: tuple[float, ...] | None, groups: ExpertGroups
) -> Resumption:
    """Check saved placements on rank 0 and broadcast the decision. Every rank of the default group must call it.

    Args:
        saved: Placements in the loaded state.
        models: Models of the balancer that are distributed.
        capacity: Share of the work for each EP rank. Rank 0's counts.
        groups: Process groups of the experts.
    """

    def decide() -> tuple[list[np.ndarray] | None, str, tuple[float, ...] | None]:
        slots = saved.slots if len(models) > 1 else {models[0].name: next(iter(saved.slots.values()), None)}
        try:
            placements = [_check_saved(slots.get(model.name), saved.num_ranks, model) for model in models]
        except (TypeError, ValueError, RuntimeError) as error:  # of a file that may hold anything
            return None, str(error), capacity
        return [placement.physical_to_logical for placement in placements], "", capacity

    monitored_barrier(groups, "resume_placement() moves experts between ranks")
    slots, reason, capacity = decide_on_rank_zero(decide, "resume_placement()", groups)
    if slots is None:
        return Resumption(None, reason, capacity)
    placements = [
        ExpertPlacement(slots_YP, model.placement.num_logical_experts, model.placement.num_ranks)
        for slots_YP, model in zip(slots, models, strict=True)
    ]
    return Resumption(placements, "", capacity)


def _check_saved(slots: Any, num_ranks: Any, model: ModelLayers) -> ExpertPlacement:
    """Return a saved placement, or raise ``ValueError`` if the model can't take it."""
    now = model.placement
    if slots is None or num_ranks is None:
        raise ValueError("the checkpoint has no placement")
    if num_ranks != now.num_ranks:
        raise ValueError(f"the checkpoint's experts were on {num_ranks} ranks, and these are {now.num_ranks}")
    if not isinstance(slots, Tensor) or slots.is_floating_point() or slots.ndim != 2:
        raise ValueError("the checkpoint's placement is damaged: it is no tensor [layers, slots] of whole numbers")
    if tuple(slots.shape) != now.physical_to_logical.shape:
        layers, width = now.physical_to_logical.shape
        raise ValueError(
            f"the checkpoint's placement has {slots.shape[0]} layers of {slots.shape[1]} slots, and this model has"
            f" {layers} of {width}"
        )
    try:
        placement = ExpertPlacement(slots.cpu().numpy(), now.num_logical_experts, now.num_ranks)
    except ValueError as error:
        raise ValueError(f"the checkpoint's placement is damaged: {error}") from None
    return placement.without_copies() if model.modules[0].layer.chooses_by_batch else placement


class ResumableRun(BalancedModels, RunTotals):
    """State of a balancer that checkpoints hold, and its way back. Base class of ``ExpertLoadBalancer``."""

    groups: ExpertGroups
    step_interval: int
    capacity: tuple[float, ...] | None
    _mover: ExpertMover
    _schedule: Schedule
    _state: RearrangementState
    _saved: SavedPlacements | None = None

    def rearrange(self) -> RearrangementResult | None:
        """Rearrange by the window."""
        raise NotImplementedError

    def cancel_rearrangement(self) -> None:
        """Cancel the rearrangement in flight."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Return windows and counters as tensors and numbers, the same on every rank.

        :meth:`resume_placement` uses the placements on the same number of ranks.
        """
        return {
            "num_steps": self.num_steps,
            "steps_to_go": self._schedule.steps_to_go,
            "schedule": self._schedule.state_dict(),
            "num_rearrangements": self.num_rearrangements,
            "rearranged_rows": self.rearranged_rows,
            "rearranged_bytes": self.rearranged_bytes,
            "is_rearranging": self._state is not RearrangementState.IDLE,
            "num_ranks": self.groups.size,
            **save_windows(list(self.models.values())),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load windows and counters, also into windows of another size. Every rank must call it.

        Experts stay on their ranks until :meth:`resume_placement` is called. A rearrangement in flight is cancelled.

        Args:
            state: State as :meth:`state_dict` returns it, on any number of ranks; the same on all.

        Raises:
            ValueError: The state is of other models, layers or experts, or ranks were given different states. All ranks
                raise it, and nothing was loaded.
        """
        models = list(self.models.values())
        check_saved_state(state, models, self.groups)
        self.cancel_rearrangement()
        self._state = RearrangementState.IDLE
        load_windows(state, models)
        self.num_steps = state["num_steps"]
        self.num_rearrangements = state["num_rearrangements"]
        self.rearranged_rows = state.get("rearranged_rows", 0)  # earlier versions did not save it
        self.rearranged_bytes = state["rearranged_bytes"]
        self._schedule.steps_to_go = min(state["steps_to_go"], self.step_interval)
        if "schedule" in state:
            self._schedule.load_state_dict(state["schedule"])
        self._saved = SavedPlacements.from_state(state)

    def resume_placement(self) -> RearrangementResult | None:
        """Place experts after :meth:`load_state_dict`, before the first step. Every rank must call it.

        On as many ranks as they were saved on, and with as many redundant experts, they go where they were, so that the
        run goes on as if it had not stopped, bit for bit where kernels allow it. A rearrangement that was in flight is
        planned anew in the next step. Otherwise experts are rearranged by the saved window, if the saved run had
        rearranged, and a line in the log says why.

        Returns:
            Result of a rearrangement by the window. ``None`` if there was none.
        """
        saved, self._saved = self._saved, None
        if saved is None or self.groups.size == 1:
            return None
        placements, reason, capacity = decide_resumption(saved, self.placed_models, self.capacity, self.groups)
        if placements is None:
            if not self.num_rearrangements and not saved.is_rearranging:
                return None
            rank_zero_info(f"{reason}; experts are placed by the load of the saved window")
            return self.rearrange()
        self._mover.move(placements, capacity, with_gradients=True)
        self._state = RearrangementState.DUE if saved.is_rearranging else RearrangementState.IDLE
        return None
