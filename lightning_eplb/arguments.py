"""Checks that arguments of several classes have in common."""

from typing import Any


def check_whole_numbers(**arguments: Any) -> None:
    """Raise ``ValueError`` for the first argument that is no whole number, before it is compared with any."""
    for name, value in arguments.items():
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise ValueError(f"{name}={value!r} must be a whole number, an int")
