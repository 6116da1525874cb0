"""The buckets of a stage in the order in which its last weight gradients complete them, and their reduction one by one."""

from collections.abc import Collection
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from torch import nn


class Bucket:
    """Gradients that are summed together: one of DDP's bucket groups."""

    def __init__(self, group: Any, deferred: Collection[nn.Parameter]) -> None:
        self.group = group
        self.deferred = {parameter for parameter in group.params if parameter in deferred}  # what W computes of it


def bucket_order(chunk: DistributedDataParallel, deferred: Collection[nn.Parameter]) -> list[Bucket]:
    """The buckets of a stage, first that of its last layers: W goes through the layers as the backward does.

    The order follows from the model alone, so that all replicas of a stage have the same.
    """
    place = {parameter: index for index, parameter in enumerate(chunk.module.parameters())}
    buckets = [Bucket(group, deferred) for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups]
    return sorted(buckets, key=lambda bucket: -min(place[parameter] for parameter in bucket.deferred or bucket.group.params))


class BucketReduction:
    """Starts to sum the gradients of stages over their replicas. All replicas must begin, and start, their stages in one order."""

    def __init__(self) -> None:
        self._buckets: dict[DistributedDataParallel, list[Bucket]] = {}
        self._landing: Landing | None = None
        self.deferred: set[nn.Parameter] = set()
        """The weights whose gradients W computes; to be filled before a chunk's buckets are asked for."""

    def buckets(self, chunk: DistributedDataParallel) -> list[Bucket]:
        """In the order in which they are summed."""
        if chunk not in self._buckets:
            self._buckets[chunk] = bucket_order(chunk, self.deferred)
        return self._buckets[chunk]

    def expect_last(self, chunk: DistributedDataParallel) -> None:
        """From now on only the last W of a stage computes gradients of it: each bucket is summed as soon as it has all of them."""
        self._landing = Landing(self.buckets(chunk))

    def start(self, chunk: DistributedDataParallel) -> None:
        """Start to sum what is left of a stage's gradients; call after its last weight gradient. Asynchronous."""
        landing, self._landing = self._landing, None
        (landing or Landing(self.buckets(chunk))).start_all()

    def landed(self, parameter: nn.Parameter) -> None:
        """Called for every deferred weight gradient (see `install_deferral`)."""
        if self._landing is not None:
            self._landing.landed(parameter)

    def forget(self) -> None:
        """What an interrupted step left."""
        self._landing = None


class Landing:
    """The last W of a stage on its way. All gradients that it does not compute must be there; each of its own comes once."""

    def __init__(self, buckets: list[Bucket]) -> None:
        self._left = list(buckets)
        self._missing = {parameter for bucket in buckets for parameter in bucket.deferred}

    def landed(self, parameter: nn.Parameter) -> None:
        """A weight gradient is complete: starts to sum every bucket that now is, in their order."""
        if parameter in self._missing:
            self._missing.remove(parameter)
            while self._left and self._missing.isdisjoint(self._left[0].deferred):
                self._left.pop(0).group.start_grad_sync()

    def start_all(self) -> None:
        """The rest: buckets with an expert that got no token, and those without any weight gradient."""
        while self._left:
            self._left.pop(0).group.start_grad_sync()
