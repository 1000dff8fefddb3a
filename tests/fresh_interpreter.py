"""A Python process in which the package was never imported, shared by tests of what an import brings.

To import Lightning takes seconds. It is imported once, and each program runs in a fork of that process.
"""

import json
import os
import subprocess
import sys
import traceback
from pathlib import Path


class FreshInterpreter:
    """Run programs where ``lightning.pytorch`` is imported and the package is not."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.fresh_interpreter"],
            cwd=Path(__file__).parents[1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, program: str) -> str:
        """Run a program in a fork of its own. Returns what it printed.

        Raises:
            RuntimeError: The program raised. The message has its traceback.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(program), file=self._process.stdin, flush=True)
        printed, error = json.loads(self._process.stdout.readline())
        if error:
            raise RuntimeError(error)
        return printed

    def stop(self) -> None:
        self._process.communicate()


def _run_in_fork(program: str) -> tuple[str, str]:
    """Return what the program printed, and the traceback if it raised."""
    read, write = os.pipe()
    if not (child := os.fork()):
        os.dup2(write, 1)
        status = 0
        try:
            exec(program, {"__name__": "__main__"})
        except BaseException:
            traceback.print_exc(file=sys.stdout)
            status = 1
        sys.stdout.flush()
        os._exit(status)
    os.close(write)
    with open(read) as pipe:
        printed = pipe.read()
    _, status = os.waitpid(child, 0)
    return ("", printed or f"the program ended with status {status}") if status else (printed, "")


def main() -> None:
    import lightning.pytorch  # noqa: F401

    for line in sys.stdin:
        print(json.dumps(_run_in_fork(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
