"""One decision on all ranks: rank 0 makes it, the others hear of it, and all compare what they are about to do."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_eplb.parallel.barrier import ranks_in_words, wait_for_all_ranks
from lightning_eplb.parallel.groups import ExpertGroups
from lightning_eplb.placement import ExpertPlacement


def check_same_on_all_ranks(values: Mapping[str, object], what: str, groups: ExpertGroups) -> None:
    """Compare values that must be the same on all ranks. All ranks of the default group must call this.

    Args:
        values: By name; compared and shown as ``str`` makes them.
        what: The call and its need, see :func:`~lightning_eplb.parallel.barrier.wait_for_all_ranks`.
        groups: Of the experts; without process groups nothing is compared.

    Raises:
        ValueError: On every rank, if some rank has another value than rank 0.
    """
    if groups.cpu_group is None:
        return
    wait_for_all_ranks(groups, what)
    of_ranks: list[Any] = [None] * groups.world_size
    dist.all_gather_object(of_ranks, {name: str(value) for name, value in values.items()}, group=groups.cpu_group)
    for name in values:
        odd = [rank for rank, theirs in enumerate(of_ranks) if theirs[name] != of_ranks[0][name]]
        if odd:
            raise ValueError(
                f"{name}={of_ranks[0][name]} on rank 0 is not the same on {ranks_in_words(odd)}"
                f" ({of_ranks[odd[0]][name]} on rank {odd[0]}). Give all ranks the same."
            )


def decided_by_rank_zero(decide: Callable[[], Any], source: str, groups: ExpertGroups) -> Any:
    """Return on every rank the result of ``decide`` on rank 0. All ranks of the default group must call this.

    Args:
        decide: Called on rank 0 only.
        source: Name of what decides, for the message of a failure.

    Raises:
        ValueError: On every rank, if ``decide`` raised one.
        RuntimeError: On the other ranks, if ``decide`` raised anything else. Rank 0 raises that itself.
    """
    decision: list[Any] = [None, None]
    failure: BaseException | None = None
    if dist.get_rank() == 0:
        try:
            decision[0] = decide()
        except BaseException as error:  # KeyboardInterrupt, too: the other ranks are waiting and must hear of it
            failure = error
            decision[1] = isinstance(error, ValueError), f"{source} failed on rank 0: {_in_words(error)}"
    dist.broadcast_object_list(decision, src=0, group=groups.cpu_group)
    if decision[1] is None:
        return decision[0]
    is_value_error, message = decision[1]
    if failure is not None and not is_value_error:
        raise failure
    raise (ValueError if is_value_error else RuntimeError)(message) from failure


def _in_words(error: BaseException) -> str:
    """Type and message of an exception, the type alone where making the message raises."""
    try:
        return f"{type(error).__name__}: {error}"
    except BaseException:
        return type(error).__name__


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
        names: Of the optimizers, and of the state that they keep in ``moved``.
    """

    def __init__(
        self,
        before: ExpertPlacement,
        after: ExpertPlacement,
        moved: Mapping[int, Sequence[Tensor]],
        groups: ExpertGroups,
        word: int = 0,
        names: Sequence[str] = (),
    ) -> None:
        signature = [
            (layer, str(tensor.dtype), tuple(tensor.shape), tensor.requires_grad)
            for layer, tensors in moved.items()
            for tensor in tensors
        ]
        tensors = repr((signature, list(names))).encode()
        mine = hashlib.sha256(before.digest() + after.digest() + tensors).digest()
        self._said = torch.frombuffer(bytearray(mine + word.to_bytes(4, "little")), dtype=torch.uint8)
        self._heard = [torch.empty_like(self._said) for _ in range(groups.world_size)]
        self._work = dist.all_gather(self._heard, self._said, group=groups.cpu_group, async_op=True)

    def wait(self) -> list[int]:
        """What each rank has to say besides.

        Raises:
            RuntimeError: On every rank, if one has other placements, or tensors of other shapes or dtypes, or frozen,
                or state of other names.
        """
        assert self._work is not None
        self._work.wait()
        heard = [bytes(each.tolist()) for each in self._heard]
        digests = [each[:-4] for each in heard]
        odd = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
        if odd:
            raise RuntimeError(
                f"ranks {odd} would move other rows than rank 0 (placement, optimizers, names or shapes of their state,"
                " gradients or what is frozen differ); nothing was moved"
            )
        return [int.from_bytes(each[-4:], "little") for each in heard]
