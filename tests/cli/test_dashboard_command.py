"""``dashboard`` saves the workspace, and says what to do where it can't."""

import sys

import pytest

from lightning_eplb.cli import main

WORDS = ["dashboard", "--entity", "team", "--project", "model"]


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch) -> list:
    from wandb_workspaces.workspaces import Workspace

    workspaces: list = []
    monkeypatch.setattr(Workspace, "save", lambda workspace: workspaces.append(workspace))
    monkeypatch.setattr(Workspace, "url", "https://address.of/the-workspace")
    return workspaces


def test_dashboard_when_saved_prints_its_address(saved: list, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*WORDS, "--name", "MoE"]) == 0
    assert [(each.entity, each.project, each.name) for each in saved] == [("team", "model", "MoE")]
    assert capsys.readouterr().out == "https://address.of/the-workspace\n"


def test_dashboard_without_access_prints_error(
    saved: list, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from wandb_workspaces.workspaces import Workspace

    def refuse(workspace: Workspace) -> None:
        raise PermissionError("no access to team")

    monkeypatch.setattr(Workspace, "save", refuse)
    assert main(WORDS) == 1
    assert capsys.readouterr().err == "error: Weights & Biases did not take the dashboard: no access to team\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--entity", "", "--project", "model"], "--entity '' must be a name"),
        (["--entity", "team", "--project", "a\nb"], r"--project 'a\nb' must be a name"),
        (["--entity", "team", "--project", "team/model"], "--project 'team/model' must not have / in it"),
        (["--entity", "team", "--project", "model", "--name", " "], "--name ' ' must be a name"),
    ],
)
def test_dashboard_with_invalid_name_prints_error(
    saved: list, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["dashboard", *words]) == 2
    assert capsys.readouterr().err == f"error: {message}\n"
    assert saved == []


def test_dashboard_without_extra_prints_install_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "lightning_eplb.logging.dashboard", raising=False)
    for name in ("wandb_workspaces", "wandb_workspaces.reports.v2", "wandb_workspaces.workspaces"):
        monkeypatch.setitem(sys.modules, name, None)
    assert main(WORDS) == 1
    assert "pip install 'lightning-eplb[dashboard]'" in capsys.readouterr().err
