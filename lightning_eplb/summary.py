"""What balancing did, for a reader at the end of ``fit``."""

from collections import deque

from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.utilities import rank_zero_info

from lightning_eplb.balancer import ExpertLoadBalancer
from lightning_eplb.steps import StepLoad


class FitSummary:
    """Remembers the first and the latest steps of a ``fit``, to compare them.

    Args:
        num_steps: How many optimizer steps are "first" and "last" at most; no step is both.
    """

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps
        self.total = 0
        self.first: list[float] = []
        self.last: deque[float] = deque(maxlen=num_steps)

    def add(self, step: StepLoad) -> None:
        level = step.balancedness
        self.total += 1
        if len(self.first) < self.num_steps:
            self.first.append(level)
        self.last.append(level)

    def rows(self, balancer: ExpertLoadBalancer) -> list[tuple[str, str, str]]:
        """The table, its first row the heads of the columns."""
        most = max(1, min(self.num_steps, self.total // 2))
        first, last = self.first[:most], list(self.last)[-most:]
        levels = [sum(part) / len(part) for part in (first, last)]
        return [
            ("", f"first {len(first)} steps", f"last {len(last)} steps"),
            ("balancedness", *(f"{level:.3f}" for level in levels)),  # type: ignore[list-item]
            ("fullest rank / mean rank", *(f"{1 / level:.2f}" for level in levels)),  # type: ignore[list-item]
            ("rearrangements", "", str(balancer.num_rearrangements)),
            ("experts that changed ranks", "", f"{balancer.rearranged_rows:,}"),
            ("moved between ranks", "", f"{balancer.rearranged_bytes / 2**20:,.1f} MiB"),
            ("training waited for it", "", f"{balancer.rearrange_seconds:.2f} s"),
        ]


def print_table(title: str, rows: list[tuple[str, str, str]], bar: ProgressBar | None = None) -> None:
    """To the terminal, as Lightning's own callbacks do: with rich where it is installed. On rank 0.

    Args:
        title: Above the table.
        rows: As :meth:`FitSummary.rows` gives them.
        bar: Where it is rich's and still drawn, the table stands above it.
    """
    try:
        from rich.console import Console
        from rich.progress import Progress
        from rich.table import Table
    except ImportError:
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = ("  ".join([row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in (1, 2))]) for row in rows)
        rank_zero_info("\n".join([title, *lines]))
        return
    table = Table(title=title, header_style="bold magenta")
    for i, head in enumerate(rows[0]):
        table.add_column(head, justify="right" if i else "left", no_wrap=True)
    for row in rows[1:]:
        table.add_row(*row)
    progress = getattr(bar, "progress", None)
    console = progress.console if isinstance(progress, Progress) else Console()
    console.print(table)
