"""Replace methods and properties of single objects, and restore them."""

from collections.abc import Callable
from typing import Any

_BEFORE = "_lightning_eplb_before"
"""Attribute of an object with what was there before the first replacement, by name: a list with the value, an empty one
for what the class defines. It is kept on the object itself, as objects may be equal, or not hashable."""


def replace(owner: object, name: str, value: Any) -> None:
    """Replace an attribute of one object, such as a method of a trainer's strategy.

    Args:
        owner: Object of another library. Other objects of its class keep their attribute.
        name: Name of a method or of a property with a setter.
        value: New method, called without the object, or new value of the property.
    """
    is_property = isinstance(getattr(type(owner), name, None), property)
    before = [getattr(owner, name)] if is_property else [vars(owner)[name]] if name in vars(owner) else []
    vars(owner).setdefault(_BEFORE, {}).setdefault(name, before)
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
    replaced = vars(owner).get(_BEFORE, {})
    for name in filter(replaced.__contains__, names):
        before = replaced.pop(name)
        if before:
            setattr(owner, name, before[0])
        else:
            delattr(owner, name)
    if not replaced:
        vars(owner).pop(_BEFORE, None)
