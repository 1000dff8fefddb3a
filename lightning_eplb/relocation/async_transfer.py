"""Asynchronous transfer of primaries: the rows of a few layers overlap with each training step."""

from collections import deque
from collections.abc import Callable, Sequence

import torch.distributed as dist
from torch import Tensor

from lightning_eplb.parallel.groups import ExpertGroups
from lightning_eplb.relocation.plan import LayerMoves
from lightning_eplb.relocation.transfer import LayerTransfer, relocate

MAX_BYTES_IN_FLIGHT = 256 * 2**20
"""Upper bound of a rank's send buffers, and of its receive buffers, beyond one layer's rows."""


class AsyncTransfer:
    """Relocation of primaries while training goes on. All ranks of the EP group call its methods alike.

    Weights and optimizer state do not change from one optimizer step to the next. So their rows are read right after a
    step, travel on a process group of their own during the next forward and backward passes, and are committed before
    the next step. Gradients are computed meanwhile. Their rows move right before the step, when nothing changes them
    anymore: a loss scaler, a hook and ``grad.data`` change them unnoticed. Estimated, not measured: a step's rows have
    85 MiB of gradients a rank at most under AdamW, 0.4 ms at 200 GB/s. Comparing them with rows that were sent before
    would make the host wait for the backward pass, which takes longer.

    Args:
        plan: Moves, layer by layer.
        groups: Process groups of the layers.
        group: Process group of the same ranks as ``groups.ep_group``. Nothing else travels on it.
        max_bytes: Bytes that the fullest rank sends or receives between two optimizer steps. No further layer is sent
            beyond. The same on all ranks.
    """

    def __init__(
        self, plan: Sequence[LayerMoves], groups: ExpertGroups, group: dist.ProcessGroup, max_bytes: int
    ) -> None:
        self.num_bytes = 0
        """Bytes that crossed ranks so far, over all ranks of the EP group."""
        self._waiting = deque(plan)
        self._in_flight: list[LayerTransfer] = []
        self._groups, self._group = groups, group
        self._max_bytes = max_bytes

    @property
    def is_in_flight(self) -> bool:
        """``True`` if rows were sent and not committed."""
        return bool(self._in_flight)

    @property
    def layers_in_flight(self) -> list[int]:
        """Layers whose rows were sent and not committed."""
        return [moves.layer for transfer in self._in_flight for moves in transfer.moves]

    @property
    def is_done(self) -> bool:
        """``True`` if all rows are committed."""
        return not self._in_flight and not self._waiting

    def prepare(self, tensors_of: Callable[[int], list[Tensor]]) -> None:
        """Prepare the next layers for :meth:`send`, right after an optimizer step and after :meth:`commit`.

        Args:
            tensors_of: Returns a layer's weights and optimizer state, see :func:`~.transfer.tensors_to_move`.
        """
        assert not self._in_flight
        room = self._max_bytes
        while self._waiting and (not self._in_flight or room > 0):
            transfer = LayerTransfer(self._waiting, tensors_of, self._groups, self._group, room, overlaps_training=True)
            room -= transfer.max_rank_bytes
            self._in_flight.append(transfer)

    def send(self) -> None:
        """Send the prepared layers."""
        for transfer in self._in_flight:
            transfer.send()
            self.num_bytes += transfer.num_bytes

    def prepare_commit(self) -> None:
        """Prepare :meth:`commit` on the host, without waiting and without changing a row."""
        for transfer in self._in_flight:
            transfer.prepare_commit()

    def commit(self, gradients: dict[int, list[Tensor]]) -> list[int]:
        """Wait for the rows in flight and write them, and move their gradients. Call it before the optimizer step.

        Args:
            gradients: Gradients of each layer in flight, alike on all ranks.

        Returns:
            Layers whose primaries are now where the plan wants them.
        """
        for transfer in self._in_flight:
            transfer.commit()
        arrived = [moves for transfer in self._in_flight for moves in transfer.moves]
        self._in_flight = []
        with_gradients = [moves for moves in arrived if gradients[moves.layer]]
        self.num_bytes += relocate(with_gradients, gradients.__getitem__, self._groups)
        return [moves.layer for moves in arrived]

    def cancel(self) -> None:
        """Drop the rows in flight. Performs no communication.

        Ranks may have sent different numbers of rows, so ``group`` must not be used afterwards.
        """
        self._in_flight = []
