"""The documented path of :mod:`lightning_eplb.balancer.step_stats`."""

from lightning_eplb.balancer.step_stats import Rearrangement, StepLoad

__all__ = ["Rearrangement", "StepLoad"]
