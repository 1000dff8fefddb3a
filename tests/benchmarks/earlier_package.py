"""The package as it was at another commit, beside this one in one process, so that both can take turns."""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

NAME = "lightning_eplb"


class EarlierPackage:
    """Modules of a checkout's ``lightning_eplb``, which are ``sys.modules``' only while :meth:`active`.

    Code of the package must run inside of :meth:`active`, the backward pass included, since functions import modules
    when they are called.

    Args:
        checkout: Folder that contains the package.

    Raises:
        ValueError: There is no package in ``checkout``.
    """

    def __init__(self, checkout: Path) -> None:
        if not (checkout / NAME / "__init__.py").is_file():
            raise ValueError(f"--before={checkout} must be a folder that contains the package {NAME}")
        self._checkout = str(checkout.resolve())
        self._modules: dict[str, ModuleType] = {}
        with self.active():
            self._package = importlib.import_module(NAME)
            # transformers has one registry of experts' implementations: this package's gets a name of its own there.
            importlib.import_module(f"{NAME}.parallel.grouped_mm").NAME += "_before"  # type: ignore[attr-defined]
        assert (self._package.__file__ or "").startswith(self._checkout), self._package.__file__

    def __getattr__(self, name: str) -> Any:
        """Return a public name of the package, to be called while :meth:`active`."""
        return getattr(self._package, name)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Make ``import lightning_eplb...`` mean this package."""
        others = _take_modules()
        sys.modules.update(self._modules)
        sys.path.insert(0, self._checkout)
        try:
            yield
        finally:
            sys.path.remove(self._checkout)
            self._modules = _take_modules()
            sys.modules.update(others)


def _take_modules() -> dict[str, ModuleType]:
    names = [name for name in sys.modules if name == NAME or name.startswith(f"{NAME}.")]
    return {name: sys.modules.pop(name) for name in names}
