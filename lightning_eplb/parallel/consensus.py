"""Consensus of all ranks: broadcast rank 0's decision, and verify that all ranks are about to do the same."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_eplb.parallel.barrier import format_ranks, monitored_barrier
from lightning_eplb.parallel.groups import ExpertGroups
from lightning_eplb.placement import ExpertPlacement


def check_same_on_all_ranks(values: Mapping[str, object], reason: str, groups: ExpertGroups) -> None:
    """Verify that values are the same on all ranks. All ranks of the default group must call it.

    Args:
        values: Values by name. They are compared and shown as strings.
        reason: The API and its need, see :func:`~lightning_eplb.parallel.barrier.monitored_barrier`.
        groups: Process groups of the experts. Without process groups nothing is compared.

    Raises:
        ValueError: A rank has another value than rank 0. All ranks raise it.
    """
    if groups.cpu_group is None:
        return
    monitored_barrier(groups, reason)
    of_ranks: list[Any] = [None] * groups.world_size
    dist.all_gather_object(of_ranks, {name: str(value) for name, value in values.items()}, group=groups.cpu_group)
    for name in values:
        mismatched = [rank for rank, theirs in enumerate(of_ranks) if theirs[name] != of_ranks[0][name]]
        if mismatched:
            raise ValueError(
                f"{name}={of_ranks[0][name]} on rank 0 is not the same on {format_ranks(mismatched)}"
                f" ({of_ranks[mismatched[0]][name]} on rank {mismatched[0]}). Give all ranks the same."
            )


def decide_on_rank_zero(decide: Callable[[], Any], source: str, groups: ExpertGroups) -> Any:
    """Broadcast the result of ``decide`` on rank 0. All ranks of the default group must call it.

    Args:
        decide: Function that is called on rank 0 only.
        source: Name of the decider for error messages.
        groups: Process groups of the experts.

    Returns:
        Result of ``decide``, the same on every rank.

    Raises:
        ValueError: ``decide`` raised a ``ValueError``. All ranks raise it.
        RuntimeError: ``decide`` raised another exception. Rank 0 raises that exception itself.
    """
    decision: list[Any] = [None, None]
    failure: BaseException | None = None
    if dist.get_rank() == 0:
        try:
            decision[0] = decide()
        except BaseException as error:  # KeyboardInterrupt, too: the other ranks are waiting for the result
            failure = error
            decision[1] = isinstance(error, ValueError), f"{source} failed on rank 0: {_describe(error)}"
    dist.broadcast_object_list(decision, src=0, group=groups.cpu_group)
    if decision[1] is None:
        return decision[0]
    is_value_error, message = decision[1]
    if failure is not None and not is_value_error:
        raise failure
    raise (ValueError if is_value_error else RuntimeError)(message) from failure


def _describe(error: BaseException) -> str:
    """Return type and message of an exception, or the type alone if formatting the message raises."""
    try:
        return f"{type(error).__name__}: {error}"
    except BaseException:
        return type(error).__name__


def check_models(decided: Any, before: Mapping[str, ExpertPlacement]) -> Mapping[str, Any]:
    """Return ``decided`` if it has a value for each model of ``before``.

    Raises:
        ValueError: ``decided`` is no mapping, or has other models.
    """
    if not isinstance(decided, Mapping) or set(decided) != set(before):
        names = sorted(decided) if isinstance(decided, Mapping) else f"a {type(decided).__name__}"
        raise ValueError(f"rearrange_models() returned {names}; it must return a placement for each of {list(before)}")
    return decided


def check_successor(decided: Any, before: ExpertPlacement) -> ExpertPlacement:
    """Return ``decided`` if it is a placement that can follow ``before``.

    Raises:
        ValueError: ``decided`` is no placement, or has other layers, experts, slots or ranks.
    """
    if not isinstance(decided, ExpertPlacement):
        raise ValueError(f"it returned a {type(decided).__name__}, not an ExpertPlacement")
    if decided.physical_to_logical.shape != before.physical_to_logical.shape or (
        (decided.num_logical_experts, decided.num_ranks) != (before.num_logical_experts, before.num_ranks)
    ):
        raise ValueError(f"it returned {decided!r}, which can't follow {before!r}")
    return decided


class ConsensusCheck:
    """Asynchronous check that all ranks are about to move the same rows. All ranks must create it and :meth:`wait`.

    The digests of all ranks travel while the host prepares the transfer.

    Args:
        before: Placements of the models now.
        after: Placements afterwards.
        moved: Tensors to move, by layer.
        groups: Process groups of the experts. The check runs over all ranks of the default group.
        payload: Number that each rank sends along with its digest, ``0 ... 2**32 - 1``. Ranks may send different ones.
        names: Names of the optimizers and of their state in ``moved``.
    """

    def __init__(
        self,
        before: Sequence[ExpertPlacement],
        after: Sequence[ExpertPlacement],
        moved: Mapping[int, Sequence[Tensor]],
        groups: ExpertGroups,
        payload: int = 0,
        names: Sequence[str] = (),
    ) -> None:
        signature = [
            (layer, str(tensor.dtype), tuple(tensor.shape), tensor.requires_grad)
            for layer, tensors in moved.items()
            for tensor in tensors
        ]
        tensors = repr((signature, list(names))).encode()
        placements = b"".join(placement.digest() for placement in (*before, *after))
        digest = hashlib.sha256(placements + tensors).digest()
        self._sent = torch.frombuffer(bytearray(digest + payload.to_bytes(4, "little")), dtype=torch.uint8)
        self._received = [torch.empty_like(self._sent) for _ in range(groups.world_size)]
        self._work = dist.all_gather(self._received, self._sent, group=groups.cpu_group, async_op=True)

    def wait(self) -> list[int]:
        """Return the payloads of all ranks.

        Raises:
            RuntimeError: Placements, tensors' shapes, dtypes or ``requires_grad``, or state names differ between ranks.
                All ranks raise it.
        """
        assert self._work is not None
        self._work.wait()
        received = [bytes(each.tolist()) for each in self._received]
        digests = [each[:-4] for each in received]
        mismatched = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
        if mismatched:
            raise RuntimeError(
                f"ranks {mismatched} would move other rows than rank 0 (placement, optimizers, names or shapes of their"
                " state, gradients or what is frozen differ); nothing was moved"
            )
        return [int.from_bytes(each[-4:], "little") for each in received]
