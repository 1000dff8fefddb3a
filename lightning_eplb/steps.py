"""The documented path of :mod:`lightning_eplb.balancer.steps`."""

from lightning_eplb.balancer.steps import Rearrangement, StepLoad

__all__ = ["Rearrangement", "StepLoad"]
