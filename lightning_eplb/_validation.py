"""Checks of arguments that several classes share."""

import math
from collections.abc import Iterable
from typing import Any


def check_whole_numbers(**arguments: Any) -> None:
    """Raise ``ValueError`` for the first argument that is not an integer, before it is compared with any."""
    for name, value in arguments.items():
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise ValueError(f"{name}={value!r} must be a whole number, an int")


def check_positive(**arguments: Any) -> None:
    """Raise ``ValueError`` for the first argument that is not an integer of at least 1."""
    check_whole_numbers(**arguments)
    for name, value in arguments.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")


def check_not_negative(**arguments: Any) -> None:
    """Raise ``ValueError`` for the first argument that is not an integer of at least 0."""
    check_whole_numbers(**arguments)
    for name, value in arguments.items():
        if value < 0:
            raise ValueError(f"{name}={value} must not be negative")


def check_switches(**arguments: Any) -> None:
    """Raise ``ValueError`` for the first argument that is neither ``True`` nor ``False``."""
    for name, value in arguments.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name}={value!r} must be True or False")


def check_steps(**arguments: Any) -> None:
    """Raise ``ValueError`` for the first argument that is not a number of optimizer steps."""
    check_whole_numbers(**arguments)
    for name, value in arguments.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1 optimizer step")


def check_redundancy(redundancy: str, min_tokens_per_copy: int | None) -> None:
    """Raise ``ValueError`` for invalid values of these two arguments."""
    if redundancy not in ("window", "batch"):
        raise ValueError(f"redundancy={redundancy!r} must be 'window' or 'batch'")
    if min_tokens_per_copy is not None and (type(min_tokens_per_copy) is not int or min_tokens_per_copy < 1):
        raise ValueError(
            f"min_tokens_per_copy={min_tokens_per_copy!r} must be a whole number from 1 up; None to measure it"
        )


def check_multiple(value: int, factor: int, named: str, of: str) -> None:
    """Raise ``ValueError`` unless ``value`` is zero or a positive multiple of ``factor``.

    Args:
        value: Value to check.
        factor: Positive number.
        named: Value in the message, such as ``num_redundant_experts=6``.
        of: Factor in the message, such as ``ep_size=4``.
    """
    if value < 0 or value % factor:
        below = max(0, value // factor * factor)
        raise ValueError(f"{named} must be a multiple of {of}. Use {below} or {below + factor}.")


def check_divides(value: int, number: int, named: str, of: str) -> None:
    """Raise ``ValueError`` unless ``value`` divides ``number``.

    Args:
        value: Positive number to check.
        number: Positive number.
        named: Value in the message, such as ``ep_size=3``.
        of: Number in the message, such as ``the 8 experts``.
    """
    if number % value:
        raise ValueError(f"{named} must divide {of}. Use {one_of(divisors(number))}.")


def check_num_redundant(value: int, num_experts: int, num_ranks: int, named: str, of: str) -> None:
    """Raise ``ValueError`` if ranks can't hold so many redundant experts, since none holds an expert twice.

    Args:
        value: Redundant experts of a layer.
        num_experts: Logical experts of the layer, a multiple of ``num_ranks``.
        num_ranks: Ranks that share them.
        named: Value in the message, such as ``num_redundant_experts=10``.
        of: Ranks in the message, such as ``ep_size=2``.
    """
    most = max_redundant(num_experts, num_ranks)
    if value > most:
        raise ValueError(
            f"{named} is more than {of} can use. Use at most {most}, with which each rank holds a replica of every"
            " expert that is not its own."
        )


def max_redundant(num_experts: int, num_ranks: int) -> int:
    """Return how many redundant experts of a layer ranks can hold, since none holds an expert twice.

    Example:
        >>> max_redundant(8, 2)
        8
    """
    return (num_experts - num_experts // num_ranks) * num_ranks


def divisors(number: int) -> list[int]:
    """Return all divisors of a positive number, in ascending order.

    Example:
        >>> divisors(12)
        [1, 2, 3, 4, 6, 12]
    """
    low = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return sorted({*low, *(number // divisor for divisor in low)})


def one_of(values: Iterable[object]) -> str:
    """Return values as words of a sentence.

    Example:
        >>> one_of([1, 2, 4])
        '1, 2 or 4'
    """
    *others, last = map(str, values)
    return f"{', '.join(others)} or {last}" if others else last
