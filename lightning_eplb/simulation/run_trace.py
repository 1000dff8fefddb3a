"""Traces that a run records: one file for each model."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_eplb.balancer import ExpertLoadBalancer
from lightning_eplb.balancer.saved_state import steps_of_model
from lightning_eplb.balancer.step_stats import StepStats
from lightning_eplb.logging.scalars import prefix_of
from lightning_eplb.simulation.trace import TraceWriter


class RunTrace:
    """Writers of the loads of a run. Only one rank makes it.

    The trace of the only model that is distributed is ``path``. Others have the name of the model in front of the
    suffix, such as ``trace.generator.npy``, and the steps in which that model got tokens.

    Args:
        path: File to write.
        balancer: Balancer of the run.
        saved_state: State of the balancer that the run resumes from, or an empty one. As many steps of an existing
            trace are kept as it counts.

    Raises:
        ValueError: As of :class:`~lightning_eplb.simulation.trace.TraceWriter`.
    """

    def __init__(self, path: str | os.PathLike, balancer: ExpertLoadBalancer, saved_state: Mapping[str, Any]) -> None:
        self._writers: dict[str, TraceWriter] = {}
        for name, model in balancer.models.items():
            file, is_only = Path(path), not prefix_of(balancer, model)
            if not is_only:
                file = file.with_name(f"{file.stem}.{name}{file.suffix}")
            keep = saved_state.get("num_steps", 0) if is_only else steps_of_model(saved_state, name)
            self._writers[name] = TraceWriter(file, keep=keep)

    def append(self, stats: StepStats) -> None:
        """Write an optimizer step of each model that got tokens. If writing fails, warn once and stop that trace."""
        for name, part in stats.models.items():
            if part.has_tokens:
                self._writers[name].append(part.load)

    def close(self) -> None:
        """Close all files."""
        for writer in self._writers.values():
            writer.close()
