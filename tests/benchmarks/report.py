"""Arguments, tables and bars that all benchmarks have in common."""

import argparse
import importlib.metadata
import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Bar:
    """A figure and the limit that it has to keep.

    Attributes:
        name: What is measured.
        figure: What came out.
        bar: The limit.
        at_least: The limit is the lowest figure that meets it; otherwise the highest.
    """

    name: str
    figure: float
    bar: float
    at_least: bool = False

    @property
    def met(self) -> bool:
        return self.figure >= self.bar if self.at_least else self.figure <= self.bar

    def __str__(self) -> str:
        limit = "at least" if self.at_least else "at most"
        return f"{self.name}: {self.figure:.4f}, {limit} {self.bar:g}: {'met' if self.met else 'missed'}"


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser of ``--quick`` and ``--json FILE``."""
    parser = argparse.ArgumentParser(description=(description or "").split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="a smaller run, under 60 s on 2 cores")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures to this file")
    return parser


def parse_arguments(description: str | None, **files: str) -> argparse.Namespace:
    """``--quick`` and ``--json FILE``, and further files by the names of their options, with what is in them."""
    parser = make_parser(description)
    for name, help_text in files.items():
        parser.add_argument(f"--{name}", type=Path, metavar="FILE", help=help_text)
    return parser.parse_args()


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """The first column to the left, all others to the right."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    for row in [header, ["-" * width for width in widths], *rows]:
        first, *others = (
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join([first, *others]).rstrip())
    print()


def commit() -> str:
    """Describe the commit that was measured: ``$COMMIT`` for a copy that git does not know, or git's description.

    git appends ``-dirty`` if tracked files differ from the commit.
    """
    if given := os.environ.get("COMMIT"):
        return given
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def environment() -> dict[str, str]:
    """Return the commit, the device and the versions of what was measured."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    found = {"commit": commit(), "device": device}
    for package in ("torch", "triton", "transformers", "lightning"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "none"
    return found


def write_figures(bars: Sequence[Bar], figures: dict[str, Any], json_file: Path | None) -> None:
    """Write figures, bars and what was measured, if there is a file to write to."""
    if json_file is not None:
        verdicts = [{**asdict(bar), "met": bool(bar.met)} for bar in bars]
        json_file.write_text(json.dumps({**environment(), **figures, "bars": verdicts}, indent=1, default=float) + "\n")


def finish(bars: Sequence[Bar], figures: dict[str, Any], json_file: Path | None) -> int:
    """Write the file, print one line for each bar, and say with which status to exit."""
    write_figures(bars, figures, json_file)
    for bar in bars:
        print(bar)
    return 0 if all(bar.met for bar in bars) else 1
