"""The documented path of :mod:`lightning_eplb.balancer.schedule`."""

from lightning_eplb.balancer.schedule import Schedule

__all__ = ["Schedule"]
