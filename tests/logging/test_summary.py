"""Output in the terminal: balancedness in the bar, a line for each rearrangement, a table at the end."""

import io
import logging
import re
import sys
from contextlib import redirect_stderr, redirect_stdout
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from lightning.pytorch.callbacks import TQDMProgressBar
from rich.console import Console
from rich.progress import Progress

from lightning_eplb import EPLBCallback, ExpertPlacement
from lightning_eplb.balancer.step_stats import RearrangementResult
from lightning_eplb.logging.rearrangement import report_rearrangement
from lightning_eplb.logging.summary import print_table
from tests.fidelity import SEQUENCES, ShufflePolicy, trainer_for
from tests.models import LanguageModel, hugging_face_model, loader, token_batches
from tests.workers import Workers

ROWS = [("", "first 2 steps", "last 2 steps"), ("balancedness", "0.500", "1.000")]


def train(with_bar: bool) -> tuple[str, str, str]:
    """Output of a rank: to standard output, to standard error, to Lightning's log."""
    log = io.StringIO()
    handler = logging.StreamHandler(log)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addHandler(handler)
    bar: list[Any] = [TQDMProgressBar(leave=True)] if with_bar else []
    callback = EPLBCallback(2, policy=ShufflePolicy(), step_interval=4, window_size=3)
    with redirect_stdout(io.StringIO()) as output, redirect_stderr(io.StringIO()) as error:
        trainer = trainer_for(2, max_steps=6, callbacks=[callback, *bar], enable_progress_bar=with_bar)
        trainer.fit(LanguageModel(hugging_face_model("mixtral"), "adamw"), loader(token_batches(50), SEQUENCES))
    logging.getLogger("lightning.pytorch.utilities.rank_zero").removeHandler(handler)
    assert dist.is_initialized()
    return output.getvalue(), error.getvalue(), log.getvalue()


def test_training_with_progress_bar_prints_summary_table(workers: Workers) -> None:
    (output, error, log), (silent, _, silent_log) = workers.run(2, train, True)
    assert re.search(r"balancedness=[01]\.\d", output + error)
    lines = re.findall(
        r"step (\d+): \d+ experts? in \d layers? changed ranks, \d+ redundant slots? changed \(\d+ of \d+ filled now\),"
        r" [\d.]+ MiB in [\d.]+ s;"
        r" balancedness of the window [\d.]+ -> [\d.]+",
        log,
    )
    assert lines == ["1", "5"]
    for words in ("Expert load after 6 optimizer steps", "first 3 steps", "last 3 steps", "experts that changed ranks"):
        assert words in output
    assert re.search(r"rearrangements\W+2\W", output)
    assert "Expert load" not in silent
    assert silent_log == ""


@pytest.mark.parametrize("in_terminal", [True, False])
def test_report_rearrangement_in_terminal_prints_above_bar(
    in_terminal: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[str] = []
    bar = SimpleNamespace(print=told.append)
    trainer: Any = SimpleNamespace(progress_bar_callback=bar, global_step=4, is_global_zero=True)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: in_terminal, raising=False)
    placement = ExpertPlacement.initial(1, 4, 2)
    with caplog.at_level(logging.INFO):
        report_rearrangement(
            trainer, RearrangementResult(placement, placement, np.ones((1, 4))), {"model": ["experts"]}
        )
    line = "step 4: no expert moved, in no layer would it pay"
    assert told == [line] * in_terminal
    assert caplog.messages == [line] * (not in_terminal)


def test_training_without_progress_bar_prints_no_table(workers: Workers) -> None:
    (output, _, log), _ = workers.run(2, train, False)
    assert "Expert load" not in output
    assert "step 1: " in log


def test_print_table_with_rich_bar_stands_above_it() -> None:
    console = Console(file=io.StringIO(), force_terminal=True)
    with Progress(console=console) as progress:
        progress.add_task("steps")
        print_table("Expert load", ROWS, SimpleNamespace(progress=progress))  # type: ignore[arg-type]
    assert isinstance(console.file, io.StringIO)
    drawn = console.file.getvalue()
    assert 0 < drawn.index("balancedness") < drawn.rindex("steps")


def test_print_table_without_rich_logs_plain_text(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in [name for name in sys.modules if name == "rich" or name.startswith("rich.")]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        print_table("Expert load", ROWS)
    (record,) = caplog.records
    assert record.getMessage().splitlines() == [
        "Expert load",
        "              first 2 steps  last 2 steps",
        "balancedness          0.500         1.000",
    ]
