"""``report``: write a load and its replays as an HTML page."""

import argparse
from pathlib import Path

from lightning_eplb.cli.load_arguments import POLICIES, add_load_arguments, read_load, replay_policies, setting_of
from lightning_eplb.cli.terminal import CommandError, progress
from lightning_eplb.report import prepare, render
from lightning_eplb.report.content import last_steps, sizes_to_try, try_other_sizes
from lightning_eplb.simulation.trace_formats import FORMATS

HELP = "show a load, and what balancing makes of it, as a page for the browser"
DESCRIPTION = """\
Write one HTML file that shows a load that EPLBCallback(trace=...) or another
program recorded: over time by layer and by expert, how level the ranks are before and after
balancing, what it moves, and what other sizes of cluster would bring. The file
is complete in itself; nothing is fetched when it is opened."""
EPILOG = f"""\
TRACE is one of these:
{FORMATS}
for example:
  %(prog)s trace.npy -o report.html --ep-size 8 --num-redundant-experts 8
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("report.html"), metavar="FILE", help="where to (report.html)"
    )
    add_load_arguments(parser)
    parser.add_argument("--policy", nargs="+", choices=POLICIES, default=list(POLICIES), help="all, if not given")


def run(arguments: argparse.Namespace) -> int:
    _check_output(arguments.output, arguments.trace)
    load_WYL, source = read_load(arguments)
    steps, _, experts = load_WYL.shape
    sizes = sizes_to_try(experts, arguments.ep_size)
    others = len(sizes) + len({ranks for ranks, _ in sizes})
    wanted = list(dict.fromkeys(arguments.policy))
    with progress(
        steps * len({"static", *wanted}) + others * len(last_steps(load_WYL, arguments.step_interval)), "replaying"
    ) as bar:
        replays = replay_policies(load_WYL, arguments, wanted, bar.update)
        found = try_other_sizes(load_WYL, sizes, setting_of(arguments), bar.update)
    content = prepare(
        load_WYL,
        [replays[name] for name in wanted],
        replays["static"],
        source=Path(source).name,
        num_ranks=arguments.ep_size,
        other_sizes=found,
        num_redundant_experts=arguments.num_redundant_experts,
        num_nodes=arguments.num_nodes,
        window_size=arguments.window_size,
        step_interval=arguments.step_interval,
    )
    page = render(content)
    try:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(page, encoding="utf-8")
    except OSError as error:
        raise CommandError(f"{arguments.output} can't be written: {error.strerror}") from error
    print(f"{arguments.output}: {len(page.encode()) / 2**20:.2f} MiB, open it in a browser")
    return 0


def _check_output(output: Path, trace: str | None) -> None:
    """Raise ``ValueError`` if the page can't be written, or would replace its trace."""
    if output.is_dir():
        raise ValueError(f"-o {output} is a folder; name a file, such as {output / 'report.html'}")
    if trace is not None and output.exists() and Path(trace).exists() and output.samefile(trace):
        raise ValueError(f"-o {output} is the trace itself, and the page would replace it; name another file")
