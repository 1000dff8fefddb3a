"""Run the tests at the lowest versions that ``pyproject.toml`` declares, in an environment of its own.

    python tests/minimum_versions.py                              # all tests
    python tests/minimum_versions.py tests/simulation/test_trace.py -x  # arguments of pytest

It installs several gigabytes where the lowest torch comes with CUDA, and keeps the environment for the next run.
``--python`` names another interpreter than the one that runs this, ``--environment`` another folder. Needs Python 3.11.
"""

import argparse
import re
import subprocess
import venv
from pathlib import Path

PROJECT = Path(__file__).parents[1]
LOWEST = re.compile(r"([\w-]+)(?:\[[\w,-]+\])?>=([\w.]+)")
"""A requirement with a lowest version."""


def constraints() -> str:
    """Pin each declared requirement to its lowest version, a line each, as pip's ``--constraint`` takes them."""
    import tomllib  # not in Python 3.10, which runs the other tests

    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    # What lints and checks types takes no part in the tests.
    declared = [*project["dependencies"], *(each for name in extras if name != "dev" for each in extras[name])]
    found = map(LOWEST.match, declared)
    return "".join(f"{match[1]}=={match[2]}\n" for match in found if match)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environment", type=Path, default=PROJECT / ".venv/minimum", help="where to install")
    parser.add_argument("--python", help="the interpreter of a new environment")
    arguments, for_pytest = parser.parse_known_args()
    python = arguments.environment.absolute() / "bin/python"
    if not python.exists():
        if arguments.python:
            subprocess.run([arguments.python, "-m", "venv", arguments.environment], check=True)
        else:
            venv.create(arguments.environment, with_pip=True)
    pins = arguments.environment / "lowest.txt"
    pins.write_text(constraints())
    print(pins.read_text())
    install = [python, "-m", "pip", "install", "--quiet", "--constraint", pins.absolute(), "--editable", ".[test]"]
    subprocess.run(install, cwd=PROJECT, check=True)
    return subprocess.run([python, "-m", "pytest", *for_pytest], cwd=PROJECT).returncode


if __name__ == "__main__":
    raise SystemExit(main())
