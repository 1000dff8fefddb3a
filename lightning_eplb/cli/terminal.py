"""Tables, progress bars and errors in a terminal."""

from collections.abc import Iterator, Sequence
from typing import Any

from tqdm import tqdm


class CommandError(Exception):
    """Failure of a command, as one sentence for its user. The exit status is 1."""


def aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield the lines of a table: the first column to the left, the others to the right, two spaces between."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for first, *others in rows:
        cells = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        yield "  ".join([first.ljust(widths[0]), *cells]).rstrip()


def progress(steps: int, words: str) -> "tqdm[Any]":
    """Return a bar on standard error that counts steps. It is hidden where standard error is not a terminal."""
    return tqdm(total=steps, desc=words, unit=" steps", leave=False, disable=None)
