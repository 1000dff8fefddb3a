"""A process that compiles the planner for another processor: it starts first, to be done when its test comes."""

import tempfile
from subprocess import Popen

import pytest

from tests.policies.digest import printed_by, start_on_plain_processor

_FOLDER = pytest.StashKey[tempfile.TemporaryDirectory[str]]()
_PROCESS = pytest.StashKey[Popen[str]]()


def pytest_collection_finish(session: pytest.Session) -> None:
    asked_for = any("digest_on_plain_processor" in getattr(item, "fixturenames", ()) for item in session.items)
    if asked_for and not session.config.option.collectonly:
        session.config.stash[_FOLDER] = tempfile.TemporaryDirectory()
        session.config.stash[_PROCESS] = start_on_plain_processor(session.config.stash[_FOLDER].name)


def pytest_unconfigure(config: pytest.Config) -> None:
    if _PROCESS in config.stash:
        config.stash[_PROCESS].kill()
        config.stash[_PROCESS].wait()
        config.stash[_FOLDER].cleanup()


@pytest.fixture(scope="session")
def digest_on_plain_processor(pytestconfig: pytest.Config) -> str:
    return printed_by(pytestconfig.stash[_PROCESS])
