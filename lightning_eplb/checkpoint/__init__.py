"""Logical model and optimizer state, distributed checkpoints, and loading weights."""

from lightning_eplb.checkpoint.logical import install_optimizer_hooks, logical_parameters

__all__ = ["install_optimizer_hooks", "logical_parameters"]
