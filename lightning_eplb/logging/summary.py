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
        self._all = _Ends(num_steps)
        self._models = {model.name: _Ends(num_steps) for model in balancer.placed_models}

    @property
    def total(self) -> int:
        """Optimizer steps so far."""
        return self._all.total

    def add(self, step: StepStats) -> None:
        self._all.add(step.balancedness)
        for part in step.placed:
            if part.has_tokens:
                self._models[part.name].add(part.balancedness)

    def rows(self) -> list[tuple[str, str, str]]:
        """Return the rows of the table, the headings first."""
        first, last = self._all.parts()
        levels = self._all.levels()
        of_models = {
            f"balancedness of {name}": ends.levels()
            for name, ends in self._models.items()
            if len(self._models) > 1 and ends.total
        }
        rearrangements, rows, moved, seconds = (
            now - before for now, before in zip(_counts(self.balancer), self._before, strict=True)
        )
        return [
            ("", f"first {len(first)} steps", f"last {len(last)} steps"),
            ("balancedness", *(f"{level:.3f}" for level in levels)),  # type: ignore[list-item]
            *((name, f"{before:.3f}", f"{after:.3f}") for name, (before, after) in of_models.items()),
            ("fullest rank / mean rank", *(f"{1 / level:.2f}" for level in levels)),  # type: ignore[list-item]
            ("rearrangements", "", str(rearrangements)),
            ("experts that changed ranks", "", f"{rows:,}"),
            ("moved between ranks", "", f"{moved / 2**20:,.1f} MiB"),
            ("training waited for it", "", f"{seconds:.2f} s"),
        ]


class _Ends:
    """Balancedness of the first and of the last steps.

    Args:
        num_steps: Largest number of steps at each end. No step belongs to both.
    """

    def __init__(self, num_steps: int) -> None:
        self._num_steps = num_steps
        self.total = 0
        self._first: list[float] = []
        self._last: deque[float] = deque(maxlen=num_steps)

    def add(self, level: float) -> None:
        self.total += 1
        if len(self._first) < self._num_steps:
            self._first.append(level)
        self._last.append(level)

    def parts(self) -> tuple[list[float], list[float]]:
        """Return the values of the first and of the last steps."""
        most = max(1, min(self._num_steps, self.total // 2))
        return self._first[:most], list(self._last)[-most:]

    def levels(self) -> list[float]:
        """Return the means of the first and of the last steps."""
        return [sum(part) / len(part) for part in self.parts()]


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
