"""The command line: ``python -m lightning_eplb COMMAND``, also installed as ``lightning-eplb``."""

import argparse
import os
import sys
import warnings
from collections.abc import Sequence

from lightning_eplb.cli import dashboard, inspect_checkpoint, report, simulate
from lightning_eplb.cli.terminal import CommandError

COMMANDS = {"simulate": simulate, "report": report, "inspect": inspect_checkpoint, "dashboard": dashboard}
DESCRIPTION = "Look at the load of a Mixture-of-Experts model's experts, and at what balancing makes of it."
EPILOG = """\
where to start:
  train with EPLBCallback(trace="trace.npy"), then
    %(prog)s report trace.npy -o report.html        a page to look at
    %(prog)s simulate trace.npy --ep-size 32        the same load on a bigger cluster
  look into a checkpoint: %(prog)s inspect checkpoints/last.ckpt
  without a trace: %(prog)s simulate --synthetic lognormal-1.2
  %(prog)s COMMAND --help tells all about a command.

exit status: 0 done, 1 it could not be done, 2 an argument or a file that it names does not fit.
"""


def main(words: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        words: Command line without the program's name. Defaults to that of the process.

    Returns:
        Exit status: 0; 1 if the command failed; 2 for an argument, or a file that it names, that does not fit. Errors
        are one sentence on standard error.
    """
    arguments = _parser().parse_args(words)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            return arguments.run(arguments)
    except CommandError as error:
        return _fail(str(error), 1)
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (OSError, ValueError) as error:
        return _fail(str(error), 2)
    except KeyboardInterrupt:
        return _fail("interrupted", 1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-eplb",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")
    for name, command in COMMANDS.items():
        subparser = commands.add_parser(
            name,
            help=command.HELP,
            description=command.DESCRIPTION,
            epilog=command.EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        subparser.set_defaults(run=command.run)
        command.add_arguments(subparser)
    return parser


def _fail(sentence: str, status: int) -> int:
    print(f"error: {sentence}", file=sys.stderr)
    return status


def _warn(message: Warning | str, *where: object) -> None:
    print(f"warning: {message}", file=sys.stderr)
