"""Attributes that were replaced on one object, and restored."""

from dataclasses import dataclass

from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.strategies import SingleDeviceStrategy

from lightning_eplb.integrations.patches import call_before, replace, restore


class Plugin:
    def clip(self, value: float) -> str:
        return f"clip {value}"


def test_replace_twice_restores_the_method_of_the_class() -> None:
    plugin, other = Plugin(), Plugin()
    replace(plugin, "clip", lambda value: "first")
    replace(plugin, "clip", lambda value: "second")
    assert (plugin.clip(1.0), other.clip(1.0)) == ("second", "clip 1.0")
    restore(plugin, "clip")
    assert plugin.clip(1.0) == "clip 1.0"
    assert vars(plugin) == {}


def test_restore_keeps_a_method_that_the_user_replaced() -> None:
    plugin = Plugin()
    plugin.clip = lambda value: "the user's"  # type: ignore[method-assign]
    replace(plugin, "clip", lambda value: "ours")
    restore(plugin, "clip")
    assert plugin.clip(1.0) == "the user's"


def test_restore_leaves_alone_what_was_not_replaced() -> None:
    plugin = Plugin()
    plugin.clip = lambda value: "the user's"  # type: ignore[method-assign]
    restore(plugin, "clip", "unknown")
    assert plugin.clip(1.0) == "the user's"


def test_restore_sets_a_property_to_its_value() -> None:
    plugin, ours = TorchCheckpointIO(), TorchCheckpointIO()
    strategy = SingleDeviceStrategy("cpu", checkpoint_io=plugin)
    replace(strategy, "checkpoint_io", ours)
    assert strategy.checkpoint_io is ours
    restore(strategy, "checkpoint_io")
    assert strategy.checkpoint_io is plugin


def test_call_before_calls_the_method_with_its_arguments() -> None:
    plugin, calls = Plugin(), []
    call_before(plugin, "clip", lambda: calls.append("before"))
    assert plugin.clip(value=2.0) == "clip 2.0"
    assert calls == ["before"]


def test_equal_objects_that_are_not_hashable_are_restored_one_by_one() -> None:
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
