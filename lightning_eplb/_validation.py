"""Checks that arguments of several classes have in common."""

from typing import Any


def check_whole_numbers(**arguments: Any) -> None:
    """Raise ``ValueError`` for the first argument that is no whole number, before it is compared with any."""
    for name, value in arguments.items():
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise ValueError(f"{name}={value!r} must be a whole number, an int")


def check_switches(**arguments: Any) -> None:
    """Raise ``ValueError`` for the first argument that is neither ``True`` nor ``False``."""
    for name, value in arguments.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name}={value!r} must be True or False")


def check_steps(**arguments: Any) -> None:
    """Raise ``ValueError`` for the first argument that is no number of optimizer steps."""
    check_whole_numbers(**arguments)
    for name, value in arguments.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1 optimizer step")


def check_redundancy(redundancy: str, min_tokens_per_copy: int | None) -> None:
    """Raise ``ValueError`` unless these fit by themselves."""
    if redundancy not in ("window", "batch"):
        raise ValueError(f"redundancy={redundancy!r} must be 'window' or 'batch'")
    if min_tokens_per_copy is not None and (type(min_tokens_per_copy) is not int or min_tokens_per_copy < 1):
        raise ValueError(
            f"min_tokens_per_copy={min_tokens_per_copy!r} must be a whole number from 1 up; None to measure it"
        )
