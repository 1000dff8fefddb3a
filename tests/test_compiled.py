"""Compiled code must not outlive the code that it was compiled from."""

import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lightning_eplb import _compiled as compiled


@pytest.fixture(autouse=True)
def folder_is_computed_anew() -> Iterator[None]:
    compiled.folder.cache_clear()
    yield
    compiled.folder.cache_clear()


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the package that :func:`compiled.folder` looks at, older than the import."""
    package = tmp_path / "package"
    shutil.copytree(compiled.PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    for path in package.rglob("*.py"):
        set_time(path, -1)
    monkeypatch.setattr(compiled, "PACKAGE", package)
    return package


def set_time(path: Path, seconds: float) -> None:
    time = compiled._IMPORT_SECONDS + seconds
    os.utime(path, (time, time))


def append(path: Path, seconds: float) -> None:
    """Append a comment to a file as if ``seconds`` after the import."""
    with path.open("a") as file:
        file.write("# another\n")
    set_time(path, seconds)


def test_folder_after_change_of_a_loop_is_another(package: Path) -> None:
    before = compiled.folder()
    assert before is not None
    append(package / "callback.py", 1)
    compiled.folder.cache_clear()
    assert compiled.folder() == before
    append(package / "policies/pack.py", -1)
    compiled.folder.cache_clear()
    assert compiled.folder() not in (None, before)


def test_folder_with_loop_newer_than_import_is_none(package: Path) -> None:
    append(package / "policies/pack.py", 1)
    assert compiled.folder() is None
    assert not compiled.is_on_disk(compiled.compiled(double))


def test_compiled_when_only_decorated_reads_no_sources() -> None:
    loop = compiled.compiled(double)
    assert compiled.folder.cache_info().currsize == 0
    assert loop(3) == 6
    assert compiled.folder.cache_info().currsize == 1


def test_compiled_with_loops_newer_than_import_keeps_nothing(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled.numba.config, "CACHE_DIR", str(tmp_path / "cache"))
    append(package / "policies/pack.py", 1)
    assert compiled.compiled(double)(3) == 6
    assert not (tmp_path / "cache").exists()


def test_is_on_disk_of_loop_is_true_after_first_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "folder", lambda: tmp_path / "cache/compiled-1")
    loop = compiled.compiled(double)
    assert not compiled.is_on_disk(loop)
    assert loop(2) == 4
    assert compiled.is_on_disk(loop)
    assert not compiled.is_on_disk(compiled.compiled(triple))


def test_compiled_when_first_called_in_threads_computes_in_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "folder", lambda: tmp_path)
    before = compiled.numba.config.CACHE_DIR
    loops = [compiled.compiled(function) for function in (double, triple)]
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(lambda i: loops[i % 2](i), range(16))) == [(2 + i % 2) * i for i in range(16)]
    assert all(map(compiled.is_on_disk, loops))
    assert before == compiled.numba.config.CACHE_DIR


def test_compiled_in_next_process_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "folder", lambda: tmp_path)
    hits = []
    for _ in range(2):  # another dispatcher knows as little as another process
        loop = compiled.compiled(double)
        assert loop(2) == 4
        hits.append(sum(loop.stats.cache_hits.values()))
    assert hits == [0, 1]


def double(number):
    return 2 * number


def triple(number):
    return 3 * number


def test_compiled_where_nothing_can_be_written_compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cannot_cache(loop: object) -> None:
        raise RuntimeError("cannot cache function: no locator available")

    def twice(number):
        return 2 * number

    loop = compiled.compiled(twice)
    monkeypatch.setattr(type(loop), "enable_caching", cannot_cache)
    assert loop(21) == 42
    assert loop(1.5) == 3.0
