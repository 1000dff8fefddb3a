"""``dashboard``: make a workspace in Weights & Biases for the scalars and pictures of ``EPLBCallback``."""

import argparse

from lightning_eplb.cli.terminal import CommandError

HELP = "make a dashboard in Weights & Biases"
DESCRIPTION = """\
Save a workspace in a project of Weights & Biases, with what EPLBCallback logs
there: sections Balance, Experts and Cost. Runs that are there already show in
it as well as those to come. Log in before with `wandb login`."""
EPILOG = """\
for example:
  pip install 'lightning-eplb[dashboard]'
  %(prog)s --entity my-team --project my-model
"""
NOT_IN_NAMES = frozenset("/\\#?%:")
"""Characters that Weights & Biases does not allow in names of projects."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--entity", required=True, help="the user or team that the project is of")
    parser.add_argument("--project", required=True, help="as in WandbLogger(project=...)")
    parser.add_argument("--name", default="Expert load", help="of the workspace (Expert load)")


def run(arguments: argparse.Namespace) -> int:
    for name in ("entity", "project", "name"):
        value = getattr(arguments, name)
        if not value.strip() or not value.isprintable():
            raise ValueError(f"--{name} {value!r} must be a name")
    for name in ("entity", "project"):
        if wrong := sorted(NOT_IN_NAMES.intersection(getattr(arguments, name))):
            raise ValueError(f"--{name} {getattr(arguments, name)!r} must not have {' '.join(wrong)} in it")
    try:
        from lightning_eplb.logging.dashboard import build_dashboard

        workspace = build_dashboard(arguments.entity, arguments.project, arguments.name)
    except ImportError as error:
        raise CommandError(f"{error.name} is missing; pip install 'lightning-eplb[dashboard]' brings it") from error
    try:
        workspace.save()
    except Exception as error:  # of W&B, of its HTTP client, of the network
        raise CommandError(f"Weights & Biases did not take the dashboard: {error}") from error
    print(workspace.url)
    return 0
