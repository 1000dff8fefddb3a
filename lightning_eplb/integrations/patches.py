"""Replace methods and properties of single objects, and restore them."""

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

_ABSENT = object()
_before: WeakKeyDictionary[object, dict[str, Any]] = WeakKeyDictionary()
"""Values before the first replacement, by object and name; ``_ABSENT`` for what the class defines."""


def replace(owner: object, name: str, value: Any) -> None:
    """Replace an attribute of one object, such as a method of a trainer's strategy.

    Args:
        owner: Object of another library. Other objects of its class keep their attribute.
        name: Name of a method or of a property with a setter.
        value: New method, called without the object, or new value of the property.
    """
    is_property = isinstance(getattr(type(owner), name, None), property)
    before = getattr(owner, name) if is_property else vars(owner).get(name, _ABSENT)
    _before.setdefault(owner, {}).setdefault(name, before)
    setattr(owner, name, value)


def call_before(owner: object, name: str, function: Callable[[], object]) -> None:
    """Let a method of one object call ``function`` first."""
    method = getattr(owner, name)

    def call_both(*args: Any, **kwargs: Any) -> Any:
        function()
        return method(*args, **kwargs)

    replace(owner, name, call_both)


def restore(owner: object, *names: str) -> None:
    """Undo all replacements of these attributes of an object. Does nothing for those that were not replaced."""
    replaced = _before.get(owner, {})
    for name in filter(replaced.__contains__, names):
        before = replaced.pop(name)
        if before is _ABSENT:
            delattr(owner, name)
        else:
            setattr(owner, name, before)
