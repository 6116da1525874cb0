"""Which gradients of a rank's stages are still to come, and the sums of those that are complete, bucket by bucket.

A bucket that is summed too early is the worst of faults: what comes afterwards stays on its rank, and no error tells of it. So
every gradient is accounted for, in every step: those that W computes are owed from the backward on until they land, and autograd
tells of its own.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from torch import nn


class Bucket:
    """Gradients that are summed together: one of DDP's bucket groups. name: of its first parameter."""

    def __init__(self, name: str, group: Any) -> None:
        self._name, self.group = name, group
        self.parameters: list[nn.Parameter] = list(group.params)
        self.owed = 0
        """Gradients that W has still to compute."""
        self.closed = False
        """Whether its sum has begun."""

    def open(self) -> None:
        """A new step."""
        self.owed, self.closed = 0, False

    def comes(self, *_: Any) -> None:
        """A gradient for it is there, or will be."""
        assert not self.closed, f"a gradient for the bucket of {self._name} comes after its sum has begun"

    def close(self) -> None:
        """Its sum begins."""
        assert not self.closed, f"the bucket of {self._name} is summed twice in a step"
        assert not self.owed, f"the bucket of {self._name} is summed before {self.owed} of its gradients are there"
        self.closed = True

    def start(self) -> None:
        """Starts to sum it over its replicas. Asynchronous."""
        self.close()
        self.group.start_grad_sync()

    def end(self) -> None:
        """The end of a step."""
        assert self.closed, f"the bucket of {self._name} is not summed"


def bucket_order(chunk: DistributedDataParallel) -> list[Bucket]:
    """The buckets of a stage, first that of its last layers: W goes through the layers as the backward does.

    The order follows from the model alone, so that all replicas of a stage have the same.
    """
    named = list(chunk.module.named_parameters())
    place = {parameter: index for index, (_, parameter) in enumerate(named)}
    groups = chunk.bucket_groups + chunk.expert_parallel_bucket_groups
    firsts = [(min(place[parameter] for parameter in group.params), group) for group in groups]
    return [Bucket(named[first][0], group) for first, group in sorted(firsts, key=lambda pair: -pair[0])]


class NormCheck:
    """Megatron's check of gradients before their sum (check_for_nan_in_grad, check_for_large_grads), at the end of the step.

    Its own lets the host wait for the device at every bucket, in the midst of W. Here the norms stay on the device until all are
    known, and Megatron's check then runs over them: the same complaints, before any weight changes.
    """

    def __init__(self) -> None:
        self._noted: list[tuple[Any, dict[str, bool], list[torch.Tensor]]] = []
        self._in_step = False

    def take_over(self, group: Any) -> None:
        """group: one of DDP's bucket groups."""
        group.check_grads = partial(self._note, group)

    def begin_step(self) -> None:
        """Until `finish`, checks are put off; outside they are made at once."""
        self._noted, self._in_step = [], True

    def _note(self, group: Any, **what: bool) -> None:
        """In the place of the group's own `check_grads`."""
        if not self._in_step:
            type(group).check_grads(group, **what)
            return
        self._noted.append((group, what, [bucket.grad_data.norm(p=2) for bucket in group.buckets]))

    def finish(self) -> None:
        """Raises what Megatron's check raises. The host waits for the device once, if anything is to be checked."""
        noted, self._noted, self._in_step = self._noted, [], False
        if not noted:
            return
        found = iter(torch.stack([norm for _, _, norms in noted for norm in norms]).cpu())
        for group, what, norms in noted:
            type(group).check_grads(SimpleNamespace(buckets=[_Known(next(found)) for _ in norms]), **what)


class _Known:
    """As much of a bucket as Megatron's check asks of it, with a norm that is on the host."""

    def __init__(self, norm: torch.Tensor) -> None:
        self.grad_data = SimpleNamespace(norm=lambda p: norm)


class BucketReduction:
    """Starts to sum the gradients of stages over their replicas. All replicas must begin, and start, their stages in one order.

    `owe` and `landed` are for `install_deferral`.
    """

    def __init__(self) -> None:
        self._buckets: dict[DistributedDataParallel, list[Bucket]] = {}
        self._bucket_of: dict[nn.Parameter, Bucket] = {}
        self._owed = 0  # by all parameters, in buckets or not
        self.checks = NormCheck()
        self._last: list[Bucket] = []  # of the stage whose last W is next or on its way: those to be summed, in their order

    def watch(self, chunk: DistributedDataParallel) -> None:
        """To be called once for each stage that is to be summed here, before its first forward."""
        self._buckets[chunk] = bucket_order(chunk)
        for bucket in self._buckets[chunk]:
            self.checks.take_over(bucket.group)
            for parameter in bucket.parameters:
                self._bucket_of[parameter] = bucket
                parameter.register_post_accumulate_grad_hook(bucket.comes)

    def buckets(self, chunk: DistributedDataParallel) -> list[Bucket]:
        """In the order in which they are summed."""
        return self._buckets[chunk]

    def owe(self, parameter: nn.Parameter) -> None:
        """A gradient of `parameter` will be computed later."""
        self._owed += 1
        if (bucket := self._bucket_of.get(parameter)) is not None:
            bucket.comes()
            bucket.owed += 1

    def landed(self, parameter: nn.Parameter) -> None:
        """One that was owed is in its bucket: starts to sum every bucket that now has all, in their order."""
        self._owed -= 1
        if (bucket := self._bucket_of.get(parameter)) is not None:
            bucket.owed -= 1
            self._start_complete()

    def expect_last(self, chunk: DistributedDataParallel) -> None:
        """From now on only the last W of a stage computes gradients of it: each bucket is summed as soon as it has all of them."""
        self._last = list(self._buckets[chunk])
        self._start_complete()

    def start(self, chunk: DistributedDataParallel, by: Callable[[], None] | None = None) -> None:
        """Start to sum what is left of a stage's gradients; call after its last weight gradient. Asynchronous.

        by: sums all of them, in the place of the buckets' own sums.
        """
        self._last = []
        for bucket in self._buckets[chunk]:
            if by is not None:
                bucket.close()
            elif not bucket.closed:
                bucket.start()
        if by is not None:
            by()

    def begin_step(self) -> None:
        """No gradients are there; what an interrupted step left is forgotten."""
        self._owed, self._last = 0, []
        self.checks.begin_step()
        for buckets in self._buckets.values():
            for bucket in buckets:
                bucket.open()

    def end_step(self, summed: Sequence[DistributedDataParallel]) -> None:
        """Every backward of a step is over, and the sums of the stages in `summed` have begun."""
        assert not self._owed, f"{self._owed} weight gradients that the step owes were not computed"
        for chunk in summed:
            for bucket in self._buckets[chunk]:
                bucket.end()
                bucket.open()  # what is computed outside of steps is not ours

    @contextmanager
    def step(self, summed: Sequence[DistributedDataParallel]) -> Iterator[None]:
        """From `begin_step` to `end_step`."""
        self.begin_step()
        yield
        self.end_step(summed)

    def _start_complete(self) -> None:
        while self._last and not self._last[0].owed:
            self._last.pop(0).start()
