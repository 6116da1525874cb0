"""Split a backward into its two halves: I, the input gradients, and W, the weight gradients, which no other rank waits for.

Linear layers put each weight gradient, as a closure, into the store that was open when their *forward* ran; `flush` computes
them. The store travels with the autograd graph, so it does not matter which thread runs the backward (CUDA has threads of its
own for that), and micro-batches may be flushed in any order.

    store = WeightGradStore()              # one for each (stage, micro-batch)
    with store.deferring():
        y = stage(x)
    y.backward(dy)                         # I
    store.flush()                          # W
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_open: ContextVar["WeightGradStore | None"] = ContextVar("open_store", default=None)


class WeightGradStore:
    """The weight gradients that one (stage, micro-batch) still owes; `len` counts them."""

    def __init__(self) -> None:
        self._owed: list[Callable[[], None]] = []

    def __len__(self) -> int:
        return len(self._owed)

    @contextmanager
    def deferring(self) -> Iterator[None]:
        """The backward of what runs forward inside, in this thread, leaves its weight gradients here."""
        token = _open.set(self)
        try:
            yield
        finally:
            _open.reset(token)

    def put(self, compute: Callable[[], None]) -> None:
        """Owe what `compute` will add to a gradient. It may hold activations and output gradients alive until then."""
        self._owed.append(compute)

    def flush(self) -> None:
        """Compute what is owed, in the order in which the backward met it; what it held is freed as it goes."""
        owed, self._owed = self._owed[::-1], []
        while owed:
            owed.pop()()


def linear(x: torch.Tensor, weight: torch.Tensor, accumulate: Callable[[torch.Tensor], None]) -> torch.Tensor:
    """x [..., k] times weight [m, k] transposed: [..., m]; the weight gradient [m, k] goes to `accumulate`, not to autograd.

    It goes there when the open store is flushed or, without one, during the backward. The parameter stays out of the autograd
    graph, so that no hook on it fires before its gradient is there. `x` must require grad, or there is no backward at all.
    """
    return _Linear.apply(x, weight.detach(), accumulate, _open.get())


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
            ctx.store.put(compute)
        return dx, None, None, None
