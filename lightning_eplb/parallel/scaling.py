"""Documented path of ``share_overflow``."""

from lightning_eplb.parallel.clipping import share_overflow as share_overflow
