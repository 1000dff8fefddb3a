"""The program as it is started: help for a newcomer, exit statuses, and errors in one sentence."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_eplb.cli import COMMANDS, main

PROJECT = Path(__file__).parents[2] / "pyproject.toml"


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["--help"])
    assert raised.value.code == 0
    text = capsys.readouterr().out
    for name, command in COMMANDS.items():
        assert name in text
        assert command.HELP in " ".join(text.split())
    assert "exit status" in text


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_has_an_example_that_is_understood(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main([name, "--help"])
    assert raised.value.code == 0
    text = capsys.readouterr().out
    examples = re.findall(rf"^  lightning-eplb ({name} .*)$", text, re.MULTILINE)
    assert examples
    from lightning_eplb.cli import _parser

    for example in examples:
        _parser().parse_args(example.split())


@pytest.mark.parametrize("words", [[], ["nothing"], ["simulate", "--ep-size", "many"], ["dashboard"]])
def test_what_is_no_command_line_has_status_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(words)
    assert raised.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_as_a_program(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lightning_eplb", "inspect", str(tmp_path / "nowhere.ckpt")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: .*nowhere.ckpt.*\n", done.stderr)


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path: Path) -> None:
    program = f"{sys.executable} -m lightning_eplb simulate --synthetic zipf --steps 60 | true"
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stderr) == (0, "")


def test_it_is_installed_under_its_name() -> None:
    assert '[project.scripts]\nlightning-eplb = "lightning_eplb.cli:main"\n' in PROJECT.read_text()


def test_warnings_are_sentences(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--synthetic", "zipf", "--steps", "60", "--num-nodes", "2"]) == 0
    assert re.fullmatch(r"warning: DeepSeekPolicy .*\n", capsys.readouterr().err)


def test_progress_is_for_terminals(capsys: pytest.CaptureFixture[str]) -> None:
    from lightning_eplb.cli.terminal import progress

    with progress(10, "replaying") as bar:
        bar.update()
    assert capsys.readouterr().err == ""


def test_an_interruption_is_no_traceback(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(COMMANDS["simulate"], "run", interrupted)
    assert main(["simulate", "--synthetic", "zipf"]) == 1
    assert capsys.readouterr().err == "error: interrupted\n"
