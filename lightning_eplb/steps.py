"""The documented path of :mod:`lightning_eplb.balancer.step_stats`."""

from lightning_eplb.balancer.step_stats import RearrangementResult, StepStats

Rearrangement = RearrangementResult
StepLoad = StepStats

__all__ = ["Rearrangement", "RearrangementResult", "StepLoad", "StepStats"]
