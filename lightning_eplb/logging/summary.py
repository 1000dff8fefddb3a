"""Table at the end of ``fit`` that compares the first and the last steps."""

from collections import deque

from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.utilities import rank_zero_info

from lightning_eplb.balancer import ExpertLoadBalancer
from lightning_eplb.balancer.step_stats import StepStats


class FitSummary:
    """Balancedness of the first and the last steps of a ``fit``.

    Args:
        num_steps: Largest number of optimizer steps at each end. No step belongs to both.
        balancer: Balancer of the run. Its earlier rearrangements do not count.
    """

    def __init__(self, num_steps: int, balancer: ExpertLoadBalancer) -> None:
        self.num_steps = num_steps
        self.balancer = balancer
        self._before = _counts(balancer)
        self.total = 0
        self.first: list[float] = []
        self.last: deque[float] = deque(maxlen=num_steps)

    def add(self, step: StepStats) -> None:
        level = step.balancedness
        self.total += 1
        if len(self.first) < self.num_steps:
            self.first.append(level)
        self.last.append(level)

    def rows(self) -> list[tuple[str, str, str]]:
        """Return the rows of the table, the headings first."""
        most = max(1, min(self.num_steps, self.total // 2))
        first, last = self.first[:most], list(self.last)[-most:]
        levels = [sum(part) / len(part) for part in (first, last)]
        rearrangements, rows, moved, seconds = (
            now - before for now, before in zip(_counts(self.balancer), self._before, strict=True)
        )
        return [
            ("", f"first {len(first)} steps", f"last {len(last)} steps"),
            ("balancedness", *(f"{level:.3f}" for level in levels)),  # type: ignore[list-item]
            ("fullest rank / mean rank", *(f"{1 / level:.2f}" for level in levels)),  # type: ignore[list-item]
            ("rearrangements", "", str(rearrangements)),
            ("experts that changed ranks", "", f"{rows:,}"),
            ("moved between ranks", "", f"{moved / 2**20:,.1f} MiB"),
            ("training waited for it", "", f"{seconds:.2f} s"),
        ]


def _counts(balancer: ExpertLoadBalancer) -> tuple[int, int, int, float]:
    return (
        balancer.num_rearrangements,
        balancer.rearranged_rows,
        balancer.rearranged_bytes,
        balancer.rearrange_seconds,
    )


def print_table(title: str, rows: list[tuple[str, str, str]], bar: ProgressBar | None = None) -> None:
    """Print a table on rank 0, with rich if it is installed, as Lightning's own callbacks do.

    Args:
        title: Title of the table.
        rows: Rows of :meth:`FitSummary.rows`.
        bar: Progress bar. The table is printed above it if it is rich's and still drawn.
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
