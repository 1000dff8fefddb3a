"""Fixtures that tests share."""

import os
import warnings
from collections.abc import Iterator

import pytest

os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def workers() -> Iterator["object"]:
    from tests.workers import Workers

    shared = Workers()
    yield shared
    shared.stop()


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
