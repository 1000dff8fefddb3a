"""When it is time to decide, and which steps to decide on."""

from collections import deque


class Schedule:
    """Counts optimizer steps and says after which of them the policy is asked.

    That is after a quarter of ``step_interval``, then every ``step_interval`` steps, and early when the load drifts
    away from the placement: when each step of the latest tenth of an interval was less balanced, by ``EARLY_DROP``,
    than those that followed the last decision. Not before a quarter of the interval has passed, though, and never
    where a tenth of it is less than two steps, as a single step may be a burst.

    All ranks that are given the same numbers come to the same answer: only single IEEE operations are used.

    Args:
        step_interval: Optimizer steps between decisions, at least 1.
    """

    EARLY_DROP = 0.1

    def __init__(self, step_interval: int) -> None:
        if step_interval < 1:
            raise ValueError(f"step_interval={step_interval} must be at least 1 step")
        self.step_interval = step_interval
        self.steps_to_go = max(1, step_interval // 4)
        self._few = step_interval // 10
        self._first: list[float] = []
        self._latest: deque[float] = deque(maxlen=max(self._few, 1))
        self._since_decision = 0
        self._has_decided = False
        self._is_early = False

    def step(self, balancedness: float) -> bool:
        """Close a step that was served with this balancedness. True if the policy is to be asked now."""
        self.steps_to_go -= 1
        self._since_decision += 1
        if len(self._first) < self._few:
            self._first.append(balancedness)
        self._latest.append(balancedness)
        self._is_early = self.steps_to_go > 0 and self._has_drifted()
        if self.steps_to_go > 0 and not self._is_early:
            return False
        self.steps_to_go = self.step_interval
        self._since_decision = 0
        self._has_decided = True
        self._first.clear()
        self._latest.clear()
        return True

    def look_back(self, in_window: int) -> int:
        """How many of the ``in_window`` steps to look back on: after a drift, not far beyond its start."""
        return min(in_window, 2 * self._few) if self._is_early else in_window

    def _has_drifted(self) -> bool:
        if not self._has_decided or self._few < 2 or self._since_decision < max(self.step_interval // 4, 2 * self._few):
            return False
        return max(self._latest) < sum(self._first) / self._few - self.EARLY_DROP
