"""What is compiled once must not outlive the code that it was compiled from."""

import shutil
from pathlib import Path

import pytest

from lightning_eplb import _compiled as compiled


def test_another_loop_means_another_folder_and_another_file_without_loops_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "package"
    shutil.copytree(compiled.PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(compiled, "PACKAGE", package)
    before = compiled._folder()
    assert before.name == compiled.FOLDER.name
    with (package / "callback.py").open("a") as file:
        file.write("# another\n")
    assert compiled._folder() == before
    with (package / "policies/pack.py").open("a") as file:
        file.write("# another\n")
    assert compiled._folder() != before


def test_is_on_disk_after_a_first_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "FOLDER", tmp_path / "cache/compiled-1")
    loop = compiled.compiled(double)
    assert not compiled.is_on_disk(loop)
    assert loop(2) == 4
    assert compiled.is_on_disk(loop)
    assert not compiled.is_on_disk(compiled.compiled(triple))


def double(number):
    return 2 * number


def triple(number):
    return 3 * number


def test_where_nothing_can_be_written_it_still_compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**options: bool) -> None:
        raise RuntimeError("cannot cache function: no locator available")

    def twice(number):
        return 2 * number

    njit = compiled.numba.njit
    monkeypatch.setattr(
        compiled.numba,
        "njit",
        lambda function=None, **options: refuse(**options) if "cache" in options else njit(function, **options),
    )
    assert compiled.compiled(twice)(21) == 42
