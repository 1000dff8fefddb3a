"""The documented path of :mod:`lightning_eplb.simulation.replay`."""

from lightning_eplb.simulation.replay import Replay, Setting, replay

__all__ = ["Replay", "Setting", "replay"]
