"""Synchronization of expert gradients over the expert data-parallel group, overlapped with the backward pass."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_eplb import _compat
from lightning_eplb.parallel.groups import ExpertGroups

BUCKET_BYTES = 25 * 2**20
"""Upper bound of gradients that share a collective. A larger gradient is averaged by itself and in place."""


class ExpertGradientSync:
    """Average of expert gradients over the EP groups, as ``DistributedDataParallel`` averages all other gradients.

    A bucket of gradients is sent once the backward pass has accumulated the last of them. All have arrived when the
    backward pass ends. An average of averages stays the same, so each backward pass may average what was accumulated
    so far, and one whose sync is blocked may leave it to the next.

    All ranks of ``groups.edp_group`` must run the same layers forward and backward, as under DDP. Gradients that
    ``torch.autograd.grad`` returns are not averaged, since it accumulates nothing.

    Args:
        groups: Process groups with more than one EP group.
        bucket_bytes: Upper bound of a bucket.
    """

    def __init__(self, groups: ExpertGroups, bucket_bytes: int = BUCKET_BYTES) -> None:
        self._is_blocked: Callable[[], bool] = _never
        self._groups = groups
        self._bucket_bytes = bucket_bytes
        self._parameters: dict[int, list[nn.Parameter]] = {}
        self._hooks: dict[int, list[Any]] = {}
        self._buckets: list[list[nn.Parameter]] | None = None
        self._next_bucket = 0
        self._accumulated: dict[int, nn.Parameter] = {}
        self._in_flight: list[_BucketInFlight] = []
        self._task = -1

    def __deepcopy__(self, memo: dict[int, Any]) -> "ExpertGradientSync":
        """Return a new one. Hooks are not copied with parameters, so the copy registers its own."""
        return type(self)(self._groups, self._bucket_bytes)

    def block_while(self, is_blocked: Callable[[], bool]) -> None:
        """Set the condition, asked in the backward pass, under which gradients are only accumulated.

        The counterpart of ``DistributedDataParallel.no_sync()``.
        """
        self._is_blocked = is_blocked

    def watch(self, layer: int, parameters: Sequence[nn.Parameter]) -> None:
        """Average the gradients of a layer's parameters from now on. Called in each forward pass.

        Parameters change when a model on the meta device is materialized, and when some are frozen or unfrozen.
        """
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        known = self._parameters.get(layer, [])
        if len(trained) == len(known) and all(ours is theirs for ours, theirs in zip(trained, known, strict=True)):
            return
        for hook in self._hooks.get(layer, []):
            hook.remove()
        self._parameters[layer] = trained
        self._hooks[layer] = [parameter.register_post_accumulate_grad_hook(self._add) for parameter in trained]
        self._buckets = None

    def close(self) -> None:
        """Average no gradients from now on. Performs no communication."""
        for hook in itertools.chain.from_iterable(self._hooks.values()):
            hook.remove()
        self._hooks, self._parameters, self._buckets = {}, {}, None
        self._accumulated.clear()

    def _add(self, parameter: Tensor) -> None:
        assert isinstance(parameter, nn.Parameter)
        self._accumulated[id(parameter)] = parameter
        if self._is_blocked():
            return
        task = _compat.backward_id()
        if task != self._task:  # reentrant checkpointing runs a backward pass within the backward pass
            self._task = task
            _compat.call_after_backward(self._finish)
        if self._buckets is None:
            self._buckets = self._fill_buckets()
        # In the order of buckets, never of arrival, which may differ between ranks.
        while self._next_bucket < len(self._buckets) and self._send(self._next_bucket, only_whole=True):
            self._next_bucket += 1

    def _finish(self) -> None:
        """Send buckets that layers without a gradient held up, and wait for all, as the backward pass ends."""
        for index in range(len(self._buckets or [])):
            self._send(index, only_whole=False)
        for bucket in self._in_flight:
            bucket.wait()
        self._in_flight, self._next_bucket, self._task = [], 0, -1

    def _send(self, index: int, only_whole: bool) -> bool:
        assert self._buckets is not None
        bucket = self._buckets[index]
        ready = [parameter for parameter in bucket if id(parameter) in self._accumulated]
        if not ready or (only_whole and len(ready) < len(bucket)):
            return False
        for parameter in ready:
            del self._accumulated[id(parameter)]
        with_grad = [parameter for parameter in ready if parameter.grad is not None]
        if with_grad:  # else they were zeroed on all ranks since a blocked backward pass
            self._in_flight.append(_BucketInFlight(with_grad, self._groups))
        return True

    def _fill_buckets(self) -> list[list[nn.Parameter]]:
        """Fill buckets from the last layer on, as the backward pass reaches it first."""
        buckets: list[list[nn.Parameter]] = []
        room, kind = 0, None
        for layer in sorted(self._parameters, reverse=True):
            for parameter in self._parameters[layer]:
                if kind != (kind := (parameter.dtype, parameter.device)) or parameter.nbytes > room:
                    buckets.append([])
                    room = self._bucket_bytes
                buckets[-1].append(parameter)
                room -= parameter.nbytes
        return buckets


class _BucketInFlight:
    """Gradients that are being summed over the expert data-parallel group.

    They are detached from the parameters meanwhile, so that a nested backward pass can accumulate others.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], groups: ExpertGroups) -> None:
        self._parameters = parameters
        self._num_ep_groups = groups.num_ep_groups
        self._grads: list[Tensor] = []
        for parameter in parameters:
            assert parameter.grad is not None
            self._grads.append(parameter.grad)
            parameter.grad = None
        alone = self._grads[0]
        self._in_place = len(parameters) == 1 and alone.is_contiguous()
        self._flat = alone.view(-1) if self._in_place else torch.cat([grad.reshape(-1) for grad in self._grads])
        work = dist.all_reduce(self._flat, group=groups.edp_group, async_op=True)
        assert work is not None
        self._work = work

    def wait(self) -> None:
        """Wait for the averages, and add them to the parameters' gradients."""
        self._work.wait()
        self._flat /= self._num_ep_groups
        parts = self._flat.split([grad.numel() for grad in self._grads])
        for parameter, grad, average in zip(self._parameters, self._grads, parts, strict=True):
            if not self._in_place:
                grad.copy_(average.view_as(grad))
            parameter.grad = grad if parameter.grad is None else parameter.grad.add_(grad)


def _never() -> bool:
    return False
