"""One decision on all ranks: rank 0 makes it, the others hear of it, and all compare what they are about to do."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_eplb.parallel.groups import ExpertGroups
from lightning_eplb.placement import ExpertPlacement


def decided_by_rank_zero(decide: Callable[[], Any], source: str, groups: ExpertGroups) -> Any:
    """What ``decide`` returns on rank 0, on every rank. All ranks of the default group must call this.

    Args:
        decide: Called on rank 0 only.
        source: Who decides, for the message of a failure.

    Raises:
        ValueError: On every rank, whatever ``decide`` raised.
    """
    decision: list[Any] = [None, None]
    failure: Exception | None = None
    if dist.get_rank() == 0:
        try:
            decision[0] = decide()
        except Exception as error:  # the other ranks are waiting: they must hear of it
            failure = error
            decision[1] = f"{source} failed: {type(error).__name__}: {error}"
    dist.broadcast_object_list(decision, src=0, group=groups.control)
    if decision[1] is not None:
        raise ValueError(decision[1]) from failure
    return decision[0]


def check_successor(decided: Any, before: ExpertPlacement) -> ExpertPlacement:
    """``decided``, if it is a placement that can follow ``before``.

    Raises:
        ValueError: It is something else, or has other layers, experts, slots or ranks.
    """
    if not isinstance(decided, ExpertPlacement):
        raise ValueError(f"it returned a {type(decided).__name__}, not an ExpertPlacement")
    if decided.physical_to_logical.shape != before.physical_to_logical.shape or (
        (decided.num_logical_experts, decided.num_ranks) != (before.num_logical_experts, before.num_ranks)
    ):
        raise ValueError(f"it returned {decided!r}, which can't follow {before!r}")
    return decided


class Agreement:
    """Makes sure that all ranks would move the same rows. All ranks of the default group make it, and :meth:`wait`.

    What this rank would do travels from when this is made; until it is waited for, the host can prepare to do it.

    Args:
        moved: The tensors that are to move, by layer.
        groups: Who agrees.
        word: What this rank has to say besides, 0 ... 2**32 - 1.
    """

    def __init__(
        self,
        before: ExpertPlacement,
        after: ExpertPlacement,
        moved: Mapping[int, Sequence[Tensor]],
        groups: ExpertGroups,
        word: int = 0,
    ) -> None:
        signature = [
            (layer, str(tensor.dtype), tuple(tensor.shape), tensor.requires_grad)
            for layer, tensors in moved.items()
            for tensor in tensors
        ]
        mine = hashlib.sha256(before.digest() + after.digest() + repr(signature).encode()).digest()
        self._said = torch.frombuffer(bytearray(mine + word.to_bytes(4, "little")), dtype=torch.uint8)
        self._heard = [torch.empty_like(self._said) for _ in range(groups.world_size)]
        self._work = dist.all_gather(self._heard, self._said, group=groups.control, async_op=True)

    def wait(self) -> list[int]:
        """What each rank has to say besides.

        Raises:
            RuntimeError: On every rank, if one has other placements, or tensors of other shapes or dtypes, or frozen.
        """
        assert self._work is not None
        self._work.wait()
        heard = [bytes(each.tolist()) for each in self._heard]
        digests = [each[:-4] for each in heard]
        odd = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
        if odd:
            raise RuntimeError(
                f"ranks {odd} would move other rows than rank 0 (placement, optimizer state, gradients"
                " or what is frozen differ); nothing was moved"
            )
        return [int.from_bytes(each[-4:], "little") for each in heard]
