"""Expert gradients averaged over the ranks that hold the same slots, while the backward pass goes on."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_eplb import _compat
from lightning_eplb.parallel.groups import ExpertGroups

BUCKET_BYTES = 25 * 2**20
"""Gradients are averaged together up to this size. A larger one is averaged alone and in place."""


class ReplicaAverage:
    """Averages the gradients of experts over the EP groups, as ``DistributedDataParallel`` does those of all else.

    A bucket of gradients is sent off as soon as the backward pass has accumulated the last of them; when the backward
    pass ends, all have arrived. As averages of averages stay what they are, each backward pass may average what was
    accumulated so far, and one that is :attr:`blocked` may leave it to the next: the sums are the same.

    All ranks of ``groups.replicas`` must run the same layers forward and backward, as replicas under DDP do. Gradients
    that ``torch.autograd.grad`` returns are this EP group's alone: it accumulates nothing.

    Args:
        groups: With more than one EP group.
        bucket_bytes: Upper bound of a bucket.
    """

    def __init__(self, groups: ExpertGroups, bucket_bytes: int = BUCKET_BYTES) -> None:
        self.blocked: Callable[[], bool] = _never
        """Asked in the backward pass: whether gradients are only accumulated, as under DDP's ``no_sync()``."""
        self._groups = groups
        self._bucket_bytes = bucket_bytes
        self._parameters: dict[int, list[nn.Parameter]] = {}
        self._hooks: dict[int, list[Any]] = {}
        self._buckets: list[list[nn.Parameter]] | None = None
        self._next_bucket = 0
        self._accumulated: dict[int, nn.Parameter] = {}
        self._underway: list[_BucketUnderway] = []
        self._task = -1

    def __deepcopy__(self, memo: dict[int, Any]) -> "ReplicaAverage":
        """Hooks are not copied with parameters: the copy sets its own."""
        return type(self)(self._groups, self._bucket_bytes)

    def watch(self, layer: int, parameters: Sequence[nn.Parameter]) -> None:
        """Average the gradients of a layer's parameters from now on. Called in each forward: they may be others.

        A model that was built on the meta device gets new parameters, and some are frozen or trained again.
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

    def _add(self, parameter: Tensor) -> None:
        assert isinstance(parameter, nn.Parameter)
        self._accumulated[id(parameter)] = parameter
        if self.blocked():
            return
        task = _compat.backward_id()
        if task != self._task:  # reentrant checkpointing runs a backward pass within the backward pass
            self._task = task
            _compat.call_after_backward(self._finish)
        if self._buckets is None:
            self._buckets = self._fill_buckets()
        # In the order of buckets, never of arrival, which may be another on another rank.
        while self._next_bucket < len(self._buckets) and self._send(self._next_bucket, only_whole=True):
            self._next_bucket += 1

    def _finish(self) -> None:
        """At the end of a backward pass: send what layers without a gradient held up, and wait for all."""
        for index in range(len(self._buckets or [])):
            self._send(index, only_whole=False)
        for bucket in self._underway:
            bucket.arrive()
        self._underway, self._next_bucket, self._task = [], 0, -1

    def _send(self, index: int, only_whole: bool) -> bool:
        assert self._buckets is not None
        bucket = self._buckets[index]
        ready = [parameter for parameter in bucket if id(parameter) in self._accumulated]
        if not ready or (only_whole and len(ready) < len(bucket)):
            return False
        for parameter in ready:
            del self._accumulated[id(parameter)]
        with_grad = [parameter for parameter in ready if parameter.grad is not None]
        if with_grad:  # else they were zeroed since a blocked backward pass, on all ranks
            self._underway.append(_BucketUnderway(with_grad, self._groups))
        return True

    def _fill_buckets(self) -> list[list[nn.Parameter]]:
        """The last layer's parameters first, as the backward pass comes to them first."""
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


class _BucketUnderway:
    """Gradients that are being summed over the replicas; taken out of the parameters until they arrive.

    So a gradient that is accumulated meanwhile, by another nested backward pass, is not overwritten.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], groups: ExpertGroups) -> None:
        self._parameters = parameters
        self._num_replicas = groups.num_replicas
        self._grads: list[Tensor] = []
        for parameter in parameters:
            assert parameter.grad is not None
            self._grads.append(parameter.grad)
            parameter.grad = None
        alone = self._grads[0]
        self._in_place = len(parameters) == 1 and alone.is_contiguous()
        self._flat = alone.view(-1) if self._in_place else torch.cat([grad.reshape(-1) for grad in self._grads])
        work = dist.all_reduce(self._flat, group=groups.replicas, async_op=True)
        assert work is not None
        self._work = work

    def arrive(self) -> None:
        """Wait, and give the parameters their averages."""
        self._work.wait()
        self._flat /= self._num_replicas
        parts = self._flat.split([grad.numel() for grad in self._grads])
        for parameter, grad, average in zip(self._parameters, self._grads, parts, strict=True):
            if not self._in_place:
                grad.copy_(average.view_as(grad))
            parameter.grad = grad if parameter.grad is None else parameter.grad.add_(grad)


def _never() -> bool:
    return False
