"""Redundant experts' weights are sent one layer ahead, where it is known before the tokens are which ones they are."""

from collections.abc import Callable
from typing import TypeAlias

from lightning_eplb.parallel.redundancy import CopyRoutes
from lightning_eplb.parallel.rows import RowsUnderway

SendAhead: TypeAlias = "Callable[[], tuple[CopyRoutes, RowsUnderway] | None]"
"""Sends a layer's copies off, if these are known: which way they go, and their rows."""


class CopiesAhead:
    """What a model's layers share to send the copies of the next while one computes. All EP ranks use it alike.

    The order of layers is learnt from the forward before. Copies that were sent ahead are used if the very next layer
    that is called is theirs and they are still to go the same way; otherwise they are dropped, and sent as if they had
    not been. Nothing is sent ahead from the last layer to the first, as weights may change between two forwards.
    """

    def __init__(self) -> None:
        self._following: dict[int, tuple[int, SendAhead]] = {}
        self._last: int | None = None
        self._sent: tuple[int, CopyRoutes, RowsUnderway] | None = None

    def __deepcopy__(self, memo: dict) -> "CopiesAhead":
        return type(self)()  # what is under way is the original's

    def take(self, layer: int, routes: CopyRoutes, send_ahead: SendAhead) -> RowsUnderway | None:
        """The rows that were sent ahead along ``routes`` for a layer that is called now; ``None`` if none were.

        Args:
            layer: Its index.
            routes: Of this forward.
            send_ahead: To be called in the next forward, when the layer before this one was called.
        """
        if self._last is not None and self._last < layer:
            self._following[self._last] = layer, send_ahead
        self._last = layer
        sent, self._sent = self._sent, None
        if sent is None or (sent[0] == layer and sent[1] is routes):
            return sent[2] if sent is not None else None
        sent[2].discard()
        return None

    def send_next(self, layer: int) -> None:
        """Send the copies off of what is called behind ``layer``."""
        if layer in self._following:
            following, send_ahead = self._following[layer]
            if (sent := send_ahead()) is not None:
                self._sent = following, *sent

    def discard(self) -> None:
        """Drop what was sent ahead: weights or places are about to change."""
        if self._sent is not None:
            self._sent[2].discard()
            self._sent = None
