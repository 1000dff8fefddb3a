"""The documented path of :mod:`lightning_eplb.policies.forecast`."""

from lightning_eplb.policies.forecast import Forecast, forecast, plain_mean, sub_windows

__all__ = ["Forecast", "forecast", "plain_mean", "sub_windows"]
