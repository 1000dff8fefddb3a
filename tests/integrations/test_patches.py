"""Attributes that were replaced on one object, and restored."""

from dataclasses import dataclass

from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.strategies import SingleDeviceStrategy

from lightning_eplb.integrations.patches import call_before, replace, restore


class Plugin:
    def clip(self, value: float) -> str:
        return f"clip {value}"


def test_restore_after_two_replacements_restores_method_of_class() -> None:
    plugin, other = Plugin(), Plugin()
    replace(plugin, "clip", lambda value: "first")
    replace(plugin, "clip", lambda value: "second")
    assert (plugin.clip(1.0), other.clip(1.0)) == ("second", "clip 1.0")
    restore(plugin, "clip")
    assert plugin.clip(1.0) == "clip 1.0"
    assert vars(plugin) == {}


def test_restore_of_method_that_user_replaced_keeps_it() -> None:
    plugin = Plugin()
    plugin.clip = lambda value: "the user's"  # type: ignore[method-assign]
    replace(plugin, "clip", lambda value: "ours")
    restore(plugin, "clip")
    assert plugin.clip(1.0) == "the user's"


def test_restore_of_unreplaced_method_changes_nothing() -> None:
    plugin = Plugin()
    plugin.clip = lambda value: "the user's"  # type: ignore[method-assign]
    restore(plugin, "clip", "unknown")
    assert plugin.clip(1.0) == "the user's"


def test_restore_of_property_sets_its_value() -> None:
    plugin, ours = TorchCheckpointIO(), TorchCheckpointIO()
    strategy = SingleDeviceStrategy("cpu", checkpoint_io=plugin)
    replace(strategy, "checkpoint_io", ours)
    assert strategy.checkpoint_io is ours
    restore(strategy, "checkpoint_io")
    assert strategy.checkpoint_io is plugin


def test_call_before_with_arguments_passes_them_on() -> None:
    plugin, calls = Plugin(), []
    call_before(plugin, "clip", lambda: calls.append("before"))
    assert plugin.clip(value=2.0) == "clip 2.0"
    assert calls == ["before"]


def test_restore_of_equal_unhashable_objects_is_one_by_one() -> None:
    @dataclass
    class Plugin:
        def clip(self) -> str:
            return "own"

    first, second = Plugin(), Plugin()
    second.clip = lambda: "the user's"  # type: ignore[method-assign]
    for plugin in (first, second):
        replace(plugin, "clip", lambda: "ours")
    restore(second, "clip")
    assert (first.clip(), second.clip()) == ("ours", "the user's")
    restore(first, "clip")
    assert first.clip() == "own"
