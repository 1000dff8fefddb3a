"""The documented path of :mod:`lightning_eplb.logging.scalars`."""

from lightning_eplb.logging.scalars import SCALARS

__all__ = ["SCALARS"]
