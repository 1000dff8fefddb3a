"""Dashboard in Weights & Biases for the scalars and pictures of ``EPLBCallback``.

Needs the extra ``dashboard``, so it is imported only on demand.
"""

import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws

STEP = "trainer/global_step"
"""Axis of all panels, which ``WandbLogger`` sets for everything that it logs."""


def build_dashboard(entity: str, project: str, name: str = "Expert load") -> ws.Workspace:
    """Define the workspace. Nothing is sent until its ``.save()`` is called.

    Args:
        entity: User or team of the project.
        project: Project, as in ``WandbLogger(project=...)``.
        name: Name of the workspace. Defaults to "Expert load".

    Returns:
        Workspace with the sections Balance (load of the ranks), Experts (hot experts and their places) and Cost (time
        and traffic of balancing, time saved).
    """
    balance = [
        _lines("Balancedness: mean rank over fullest rank", "balancedness", "predicted_balancedness", range_y=(0, 1)),
        _lines("Balancedness of the window", "window_balancedness", range_y=(0, 1)),
        _lines("Fullest rank over mean rank", "max_over_mean"),
        wr.LinePlot(title="Balancedness by layers", x=STEP, metric_regex="eplb/balancedness_layers/.*", range_y=(0, 1)),
        _lines("Tokens of the mean and of the fullest rank", "avg_tokens", "max_tokens"),
        _lines("Error of the forecast", "forecast_error"),
        _pictures("Ranks, before and after", "rank_load"),
    ]
    experts = [
        _lines("Hottest expert, times even", "hottest_expert"),
        _lines("Experts without a token in the window", "dead_experts"),
        _lines("Entropy of the experts' shares", "entropy", range_y=(0, 1)),
        _lines("Tokens of an expert, times even", "load_histogram"),
        _pictures("Experts of the model", "expert_load"),
        _pictures("Slots of the ranks, before and after", "slot_load"),
        wr.WeavePanelSummaryTable(table_name="eplb/placement"),
    ]
    cost = [
        _lines("Seconds saved in a step, estimated", "saved_seconds"),
        _lines("Rearrangements", "rearrangements"),
        _lines("Experts moved by the latest rearrangement", "rearranged_rows"),
        _lines("Bytes moved by it", "rearranged_bytes"),
        _lines("Seconds that it took", "rearrange_seconds", "rearrange_plan_seconds", "rearrange_exchange_seconds"),
        _lines("Redundant slots in use", "copies"),
        _lines("Bytes of redundant experts in a step", "copy_bytes"),
        _lines("Seconds of planning in a step", "plan_seconds"),
        _lines("Layers with direct dispatch", "direct_dispatch", range_y=(0, 1)),
    ]
    sections = {"Balance": balance, "Experts": experts, "Cost": cost}
    return ws.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=[ws.Section(name=title, panels=panels, is_open=True) for title, panels in sections.items()],
        settings=ws.WorkspaceSettings(x_axis=STEP, ignore_outliers=False),
    )


def _lines(title: str, *names: str, range_y: tuple[float | None, float | None] = (None, None)) -> wr.LinePlot:
    return wr.LinePlot(title=title, x=STEP, y=[f"eplb/{name}" for name in names], range_y=range_y)


def _pictures(title: str, name: str) -> wr.MediaBrowser:
    return wr.MediaBrowser(title=title, media_keys=[f"eplb/{name}"], num_columns=1)
