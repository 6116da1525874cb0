"""Split a backward into its two halves: I, the input gradients, and W, the weight gradients, which no other rank waits for.

Linear layers put each weight gradient, as a closure, into the store that was recording when their *forward* ran; during the
backward the store either runs it at once (a full backward, B) or keeps it (I) until `flush` (W). The store travels with the
autograd graph, so it does not matter which thread runs the backward, and micro-batches may be flushed in any order.

    store = WeightGradStore()              # one for each (stage, micro-batch)
    with recording(store):
        y = stage(x)
    with deferring(store):                 # I; without this line: B
        y.backward(dy)
    store.flush()                          # W
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_recording: ContextVar["WeightGradStore | None"] = ContextVar("recording", default=None)


class WeightGradStore:
    """The weight gradients that one (stage, micro-batch) still owes. `len` counts them."""

    def __init__(self) -> None:
        self._owed: list[Callable[[], None]] = []
        self._deferring = False

    def __len__(self) -> int:
        return len(self._owed)

    def add(self, compute: Callable[[], None]) -> None:
        """Keep `compute` for `flush` inside `deferring`, run it at once outside."""
        if self._deferring:
            self._owed.append(compute)
        else:
            compute()

    def flush(self) -> None:
        """Compute what is owed, in the order in which the backward met it; the tensors it held are freed as it goes."""
        owed, self._owed = self._owed[::-1], []
        while owed:
            owed.pop()()


@contextmanager
def recording(store: WeightGradStore) -> Iterator[None]:
    """Tie the linear layers whose forward runs inside, in this thread, to `store`."""
    token = _recording.set(store)
    try:
        yield
    finally:
        _recording.reset(token)


@contextmanager
def deferring(store: WeightGradStore) -> Iterator[None]:
    """Inside, backwards of forwards that `store` recorded leave their weight gradients in it."""
    store._deferring = True
    try:
        yield
    finally:
        store._deferring = False


def linear(x: torch.Tensor, weight: torch.Tensor, accumulate: Callable[[torch.Tensor], None]) -> torch.Tensor:
    """x [..., k] times weight [m, k] transposed: [..., m]; the weight gradient [m, k] goes to `accumulate`, not to autograd.

    The parameter stays out of the autograd graph, so that no hook on it fires before its gradient is there. `x` must require
    grad.
    """
    return _Linear.apply(x, weight.detach(), accumulate, _recording.get())


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, accumulate, store):  # type: ignore[no-untyped-def,override]
        ctx.save_for_backward(x, weight)
        ctx.accumulate, ctx.store = accumulate, store
        return x.matmul(weight.t())

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def,override]
        x, weight = ctx.saved_tensors
        accumulate = ctx.accumulate

        def compute() -> None:
            accumulate(dy.reshape(-1, dy.shape[-1]).t().matmul(x.reshape(-1, x.shape[-1])))

        dx = dy.matmul(weight)
        if ctx.store is None:
            compute()
        else:
            ctx.store.add(compute)
        return dx, None, None, None
