"""The dashboard's definition, as W&B is given it."""

import json
from typing import Any

import pytest

from lightning_eplb.logging.loggers import HISTOGRAM, PICTURES, TABLE
from lightning_eplb.logging.scalars import SCALARS


@pytest.fixture(scope="module")
def sections() -> list[dict[str, Any]]:
    pytest.importorskip("wandb_workspaces", reason="the extra dashboard is not installed")
    from lightning_eplb.logging.dashboard import build_dashboard

    view = build_dashboard("team", "model")._to_model()
    assert (view.entity, view.project) == ("team", "model")
    return json.loads(view.spec.model_dump_json(by_alias=True))["section"]["panelBankConfig"]["sections"]


def test_dashboard_sections_are_balance_experts_cost(sections: list[dict[str, Any]]) -> None:
    assert [section["name"] for section in sections if section["panels"]] == ["Balance", "Experts", "Cost"]


def test_dashboard_panels_show_all_that_is_logged(sections: list[dict[str, Any]]) -> None:
    panels = [panel for section in sections for panel in section["panels"]]
    lines = {
        metric
        for panel in panels
        if panel["viewType"] == "Run History Line Plot"
        for metric in panel["config"].get("metrics") or [panel["config"]["metricRegex"]]
    }
    assert lines == {*SCALARS, HISTOGRAM, "eplb/balancedness_layers/.*"} - {"eplb/balancedness_layers/A-B"}
    pictures = {key for panel in panels for key in panel["config"].get("mediaKeys") or []}
    assert pictures == set(PICTURES)
    assert TABLE in json.dumps(panels)


def test_dashboard_lines_share_the_step_axis(sections: list[dict[str, Any]]) -> None:
    lines = [panel for section in sections for panel in section["panels"] if "Line" in panel["viewType"]]
    assert {panel["config"]["xAxis"] for panel in lines} == {"trainer/global_step"}
