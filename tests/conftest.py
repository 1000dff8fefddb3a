"""Fixtures that tests share."""

import os
import warnings
from collections.abc import Iterator

import hypothesis
import pytest
import torch

from tests.fresh_interpreter import FreshInterpreter

if not torch.cuda.is_available():  # before any module imports triton
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
hypothesis.settings.register_profile("suite", deadline=None)  # machines are noisy
hypothesis.settings.load_profile("suite")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        if "workers" in fixtures:
            item.add_marker("distributed")
        if "browser" in fixtures:
            item.add_marker("browser")


@pytest.fixture(scope="session")
def workers() -> Iterator["object"]:
    from lightning_eplb import BalancedPolicy, ExpertPlacement
    from lightning_eplb.parallel import dispatch_plan
    from tests.workers import Workers

    # Compiled once and kept on disk, rather than by every worker at a time and against the clock.
    BalancedPolicy().warm_up(ExpertPlacement.initial(1, 4, 2, 2))
    dispatch_plan.warm_up()
    shared = Workers()
    yield shared
    shared.stop()


@pytest.fixture(scope="session")
def fresh_interpreter() -> Iterator[FreshInterpreter]:
    shared = FreshInterpreter()
    yield shared
    shared.stop()


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
