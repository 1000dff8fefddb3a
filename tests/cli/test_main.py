"""The program as it is started: help for a newcomer, exit statuses, and errors in one sentence."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_eplb.cli import COMMANDS, main
from tests.fresh_interpreter import FreshInterpreter

PROJECT = Path(__file__).parents[2] / "pyproject.toml"


def test_help_without_command_names_all(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["--help"])
    assert raised.value.code == 0
    text = capsys.readouterr().out
    for name, command in COMMANDS.items():
        assert name in text
        assert command.HELP in " ".join(text.split())
    assert "exit status" in text


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_command_has_example_that_parses(name: str, capsys: pytest.CaptureFixture[str]) -> None:
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
def test_main_with_invalid_arguments_has_status_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(words)
    assert raised.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_module_run_as_program_has_exit_status(tmp_path: Path, fresh_interpreter: FreshInterpreter) -> None:
    program = f"""
import contextlib, io, runpy, sys
sys.argv, errors = ["lightning_eplb", "inspect", {str(tmp_path / "nowhere.ckpt")!r}], io.StringIO()
with contextlib.redirect_stderr(errors):
    try:
        runpy.run_module("lightning_eplb", run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        status = ended.code
print(status, errors.getvalue(), end="")
"""
    assert re.fullmatch(r"2 error: .*nowhere.ckpt.*\n", fresh_interpreter.run(program))


def test_program_with_closed_pipe_is_silent(tmp_path: Path) -> None:
    program = f"{sys.executable} -m lightning_eplb simulate --synthetic zipf --steps 60 | true"
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stderr) == (0, "")


def test_project_scripts_have_the_program() -> None:
    assert '[project.scripts]\nlightning-eplb = "lightning_eplb.cli:main"\n' in PROJECT.read_text()


def test_warnings_of_main_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--synthetic", "zipf", "--steps", "60", "--num-nodes", "2"]) == 0
    assert re.fullmatch(r"warning: DeepSeekPolicy .*\n", capsys.readouterr().err)


def test_progress_without_terminal_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    from lightning_eplb.cli.terminal import progress

    with progress(10, "replaying") as bar:
        bar.update()
    assert capsys.readouterr().err == ""


def test_main_when_interrupted_prints_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(COMMANDS["simulate"], "run", interrupted)
    assert main(["simulate", "--synthetic", "zipf"]) == 1
    assert capsys.readouterr().err == "error: interrupted\n"
