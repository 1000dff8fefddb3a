"""Schedule of rearrangements: when one is due, and the states it goes through."""

from collections import deque
from collections.abc import Iterable, Mapping
from enum import Enum, auto
from typing import Any

from lightning_eplb._validation import check_steps


class RearrangementState(Enum):
    """State of the next or current rearrangement, the same on all ranks whenever a method of the balancer returns.

    A rearrangement that is due is planned and done in one ``step()``: ``IDLE -> DUE -> IDLE``. With ``use_async`` it is
    planned before the next optimizer step, and rows move during the steps that follow:
    ``IDLE -> DUE -> PLANNED -> IN_FLIGHT -> IDLE``. The next one may become due meanwhile:
    ``IN_FLIGHT -> IN_FLIGHT_AND_DUE -> DUE``.
    """

    IDLE = auto()
    DUE = auto()
    PLANNED = auto()
    IN_FLIGHT = auto()
    IN_FLIGHT_AND_DUE = auto()

    @property
    def is_in_flight(self) -> bool:
        return self in (RearrangementState.IN_FLIGHT, RearrangementState.IN_FLIGHT_AND_DUE)

    def when_due(self) -> "RearrangementState":
        """Return the state after the schedule asked for a rearrangement."""
        if self is RearrangementState.IDLE:
            return RearrangementState.DUE
        return RearrangementState.IN_FLIGHT_AND_DUE if self.is_in_flight else self

    def without_plan(self) -> "RearrangementState":
        """Return the state after the plan was carried out or cancelled."""
        if self in (RearrangementState.IDLE, RearrangementState.IN_FLIGHT):
            return RearrangementState.IDLE
        return RearrangementState.DUE


class Schedule:
    """Counts optimizer steps and tells after which of them a rearrangement is due.

    The first is due after a quarter of ``step_interval``, the others every ``step_interval`` steps, or early if the
    load drifts. It has drifted if every step of the latest tenth of an interval was less balanced, by ``EARLY_DROP``,
    than the mean of those right after the last rearrangement was due. An early one comes after a quarter of the
    interval at the soonest, and never if a tenth of it is less than two steps, as a single step may be a burst.

    Of several models each is compared with itself, in the steps in which it got tokens. One that drifts is enough.

    All ranks that are given the same numbers return the same: only single IEEE operations are used.

    Args:
        step_interval: Optimizer steps between rearrangements, at least 1.
        num_models: Models whose load may drift. Defaults to 1.
    """

    EARLY_DROP = 0.1
    """Drop in balancedness that counts as drift of the load."""

    def __init__(self, step_interval: int, num_models: int = 1) -> None:
        check_steps(step_interval=step_interval)
        self.step_interval = step_interval
        self.steps_to_go = max(1, step_interval // 4)
        self._few = step_interval // 10
        self._models = [_Drift(self._few) for _ in range(num_models)]
        self._steps_since_due = 0
        self._was_due = False
        self._drifted = [False] * num_models

    def step(self, *balancedness: float | None) -> bool:
        """Count a step, and return whether a rearrangement is due now.

        Args:
            *balancedness: Balancedness of each model in that step; ``None`` if it got no tokens.
        """
        self.steps_to_go -= 1
        self._steps_since_due += 1
        for model, level in zip(self._models, balancedness, strict=True):
            if level is not None:
                model.add(level)
        may_be_early = self.steps_to_go > 0 and self._may_be_early()
        self._drifted = [may_be_early and model.has_drifted(self.EARLY_DROP) for model in self._models]
        if self.steps_to_go > 0 and not any(self._drifted):
            return False
        self.steps_to_go = self.step_interval
        self._steps_since_due = 0
        self._was_due = True
        for model in self._models:
            model.clear()
        return True

    def look_back(self, num_steps: int, model: int = 0) -> int:
        """Return how many of a window's ``num_steps`` to plan with: after a drift, those since about its start.

        Args:
            num_steps: Steps in the model's window.
            model: Number of the model. Defaults to the first.
        """
        return min(num_steps, 2 * self._few) if self._drifted[model] else num_steps

    def state_dict(self) -> dict[str, Any]:
        """Return the counters, so that a resumed run decides after the same steps."""
        return {
            "step_interval": self.step_interval,
            "steps_since_due": self._steps_since_due,
            "was_due": self._was_due,
            "drifted": list(self._drifted),
            "models": [model.levels() for model in self._models],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the counters. Those of another interval, or of another number of models, are left out."""
        if state.get("step_interval") != self.step_interval or len(state["models"]) != len(self._models):
            return
        self._steps_since_due, self._was_due = state["steps_since_due"], state["was_due"]
        self._drifted = list(state["drifted"])
        for model, (first, latest) in zip(self._models, state["models"], strict=True):
            model.clear()
            model.restore(first, latest)

    def _may_be_early(self) -> bool:
        soonest = max(self.step_interval // 4, 2 * self._few)
        return self._was_due and self._few >= 2 and self._steps_since_due >= soonest


class _Drift:
    """Balancedness of a model's first and latest steps since a rearrangement was due.

    Args:
        few: Steps of each.
    """

    def __init__(self, few: int) -> None:
        self._few = few
        self._first: list[float] = []
        self._latest: deque[float] = deque(maxlen=max(few, 1))

    def add(self, balancedness: float) -> None:
        if len(self._first) < self._few:
            self._first.append(balancedness)
        self._latest.append(balancedness)

    def has_drifted(self, drop: float) -> bool:
        if len(self._first) < self._few or len(self._latest) < self._few:
            return False
        return max(self._latest) < sum(self._first) / self._few - drop

    def levels(self) -> list[list[float]]:
        return [list(self._first), list(self._latest)]

    def restore(self, first: Iterable[float], latest: Iterable[float]) -> None:
        self._first[:] = first
        self._latest.extend(latest)

    def clear(self) -> None:
        self._first.clear()
        self._latest.clear()
