"""The documented path of :mod:`lightning_eplb.policies.forecast`."""

from lightning_eplb.policies.forecast import Forecast, sub_windows

__all__ = ["Forecast", "sub_windows"]
