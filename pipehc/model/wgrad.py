"""Split a backward into its two halves: I, the input gradients, and W, the weight gradients, which no other rank waits for.

Linear layers put each weight gradient, as a closure, into the store that was open when their *forward* ran; `flush` computes
them. That store travels with the autograd graph, so it does not matter which thread runs the backward, and micro-batches may be
flushed in any order. The gradients of small parameters (`StandIns`) are computed with I; only to add them up is left to W.

    store = WeightGradStore()              # one for each (stage, micro-batch)
    with store.deferring():
        y = stage(x)
    with store.receiving():
        y.backward(dy)                     # I
    store.flush()                          # W
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist

_open: ContextVar["WeightGradStore | None"] = ContextVar("open_store", default=None)
_receiving: ContextVar["WeightGradStore | None"] = ContextVar("receiving_store", default=None)


class WeightGradStore:
    """The weight gradients that one (stage, micro-batch) still owes; `len` counts them.

    around: entered, with the node in whose backward it was met, around the computation of each.
    """

    def __init__(self) -> None:
        self.around: Callable[[str], AbstractContextManager[object]] = nullcontext
        self._node = ""
        self._owed: list[tuple[str, Callable[[], None]]] = []
        self._there: list[tuple[Callable[[torch.Tensor], None], torch.Tensor]] = []

    def __len__(self) -> int:
        return len(self._owed) + len(self._there)

    @contextmanager
    def deferring(self) -> Iterator[None]:
        """The backward of what runs forward inside, in this thread, leaves its weight gradients here."""
        token = _open.set(self)
        try:
            yield
        finally:
            _open.reset(token)

    @contextmanager
    def receiving(self, node: str = "") -> Iterator[None]:
        """The backward of `StandIns` that runs inside, in this thread, leaves their gradients here. node: whose backward it is."""
        token, self._node = _receiving.set(self), node
        try:
            yield
        finally:
            _receiving.reset(token)

    def put(self, compute: Callable[[], None]) -> None:
        """Owe what `compute` will add to a gradient. It may hold activations and output gradients alive until then."""
        self._owed.append((self._node, compute))

    def put_gradient(self, accumulate: Callable[[torch.Tensor], None], gradient: torch.Tensor) -> None:
        """Owe to add a gradient that is there."""
        self._there.append((accumulate, gradient))

    def compute(self, which: Callable[[str], bool] = lambda node: True) -> None:
        """Compute the weight gradients owed so far, in the order in which the backward met them; what they held is freed as it
        goes. Gradients that are there wait for `flush`: another queue may be at them still. which: says by node, BLOCK.KIND,
        whether those that its backward met are to be computed."""
        owed = [one for one in self._owed if which(one[0])]
        self._owed = [one for one in self._owed if not which(one[0])]
        owed.reverse()
        while owed:
            node, compute = owed.pop()
            with self.around(node):
                compute()
            del compute  # and what it holds, before the next one

    def flush(self, hold: Callable[[torch.Tensor], None] = lambda _: None) -> None:
        """Pay all that is owed, once the backward is over. hold: called with gradients that are there, and may be another queue's.

        Those come first: a bucket whose gradients are complete is then summed as soon as its last product is computed.
        """
        there, self._there = self._there[::-1], []
        while there:
            accumulate, gradient = there.pop()
            hold(gradient)
            accumulate(gradient)
        self.compute()


def open_store() -> WeightGradStore | None:
    """The store that is open in this thread."""
    return _open.get()


class Split(NamedTuple):
    """Tensor parallelism of a linear layer whose weight is split by rows: every rank of `group` makes its columns of the result.

    sequence: a rank has its part of the input's first dimension (sequence parallelism), rather than all of the input.
    """

    group: dist.ProcessGroup
    sequence: bool


class Accumulate(NamedTuple):
    """What takes the gradient of the weight [m, k], and of the bias [m] if there is one. owe: called before, in the backward.
    product: takes the gradient of the weight as the factors of `add`, where a product can add itself up."""

    weight: Callable[[torch.Tensor], None]
    bias: Callable[[torch.Tensor], None] | None = None
    owe: Callable[[], None] = lambda: None
    product: Callable[[torch.Tensor, torch.Tensor], None] | None = None

    @torch.no_grad()
    def add(self, dy: torch.Tensor, x: torch.Tensor) -> None:
        """The gradient of the weight: dy [tokens, m] transposed times x [tokens, k]."""
        if self.product is None:
            self.weight(dy.t().matmul(x))
        else:
            self.product(dy, x)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    accumulate: Accumulate,
    bias: torch.Tensor | None = None,
    split: Split | None = None,
) -> torch.Tensor:
    """x [..., k] times weight [m, k] transposed, plus bias [m]: [..., m]; their gradients go to `accumulate`, not to autograd.

    They go there when the open store is flushed or, without one, during the backward. The parameters stay out of the autograd
    graph, so that no hook on them fires before their gradients are there.

    split: the gradient of `x` is then summed over the group, and with `sequence` the first dimension of `x` is gathered; both
    are done in the forward and the backward themselves, so that W talks to nobody.
    """
    # In the graph is a stand-in that requires grad: without one torch.matmul may choose another kernel, and there would be no
    # backward at all where `x` requires no grad.
    stand_in = weight.detach().requires_grad_(torch.is_grad_enabled())
    return _Linear.apply(x, stand_in, None if bias is None else bias.detach(), accumulate, split, open_store())


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, accumulate, split, store):  # type: ignore[no-untyped-def,override]
        ctx.save_for_backward(x, weight)
        ctx.accumulate, ctx.split, ctx.store = accumulate, split, store
        y = start_gather(x, split)().matmul(weight.t())
        return y if bias is None else y + bias

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def,override]
        x, weight = ctx.saved_tensors
        x = x.detach()  # W holds it, and would hold the graph that made it, with all the gradients in it
        accumulate = ctx.accumulate

        gather = start_gather(x, ctx.split)
        dx = dy.matmul(weight)
        whole = gather()
        finish = start_sum(dx, ctx.split)

        def compute() -> None:
            rows = dy.reshape(-1, dy.shape[-1])
            accumulate.add(rows, whole.reshape(-1, whole.shape[-1]))
            if accumulate.bias is not None:
                accumulate.bias(rows.sum(dim=0))

        accumulate.owe()
        if ctx.store is None:
            compute()
        else:
            ctx.store.put(compute)
        return finish(), None, None, None, None, None


class StandIns:
    """Leaves that take the place of parameters in graphs: their gradients go to `accumulate(parameter).weight`, not to autograd's.

    They are added when the store that receives in the backward is flushed, so on W's queue; without one, at once. Autograd would
    add them on the queue where it first saw the parameter: the queue that computes a gradient would wait for that one, and again
    for the sum.
    """

    def __init__(self, accumulate: Callable[[torch.Tensor], Accumulate]) -> None:
        self._accumulate = accumulate
        self._leaves: dict[torch.Tensor, torch.Tensor] = {}

    def __call__(self, parameter: torch.Tensor) -> torch.Tensor:
        """What a forward takes instead of `parameter`: that itself, where it gets no gradient."""
        if not parameter.requires_grad or not torch.is_grad_enabled():
            return parameter
        leaf = self._leaves.get(parameter)
        if leaf is None or leaf.data_ptr() != parameter.data_ptr():  # somebody may give it other memory
            leaf = self._leaves[parameter] = parameter.detach().requires_grad_()
            leaf.register_post_accumulate_grad_hook(partial(_hand_over, self._accumulate(parameter)))
        return leaf

    def __deepcopy__(self, memo: object) -> "StandIns":
        """A copied module finds leaves for its own parameters here; what `accumulate` knows is not to be copied."""
        return self


def _hand_over(accumulate: Accumulate, leaf: torch.Tensor) -> None:
    gradient, leaf.grad = leaf.grad, None
    assert gradient is not None
    accumulate.owe()
    store = _receiving.get()
    if store is None:
        accumulate.weight(gradient)
    else:
        store.put_gradient(accumulate.weight, gradient)


def start_gather(x: torch.Tensor, split: Split | None) -> Callable[[], torch.Tensor]:
    """Starts to bring the parts of the first dimension of `x` together; returns what ends it and gives the whole."""
    if split is None or not split.sequence:
        return lambda: x
    part = x.contiguous()
    whole = part.new_empty((part.shape[0] * split.group.size(), *part.shape[1:]))
    work = dist.all_gather_into_tensor(whole, part, group=split.group, async_op=True)
    return _ended(work, part, whole)


def start_sum(dx: torch.Tensor, split: Split | None) -> Callable[[], torch.Tensor]:
    """Starts to sum over the group; returns what ends it and gives the sum, or this rank's part of its first dimension."""
    if split is None:
        return lambda: dx
    if not split.sequence:
        return _ended(dist.all_reduce(dx, group=split.group, async_op=True), dx)
    part = dx.new_empty((dx.shape[0] // split.group.size(), *dx.shape[1:]))
    return _ended(dist.reduce_scatter_tensor(part, dx, group=split.group, async_op=True), dx, part)


def _ended(work: dist.Work | None, *tensors: torch.Tensor) -> Callable[[], torch.Tensor]:
    """What waits for `work` and gives the last of the tensors; all of them are held until then."""

    def end() -> torch.Tensor:
        assert work is not None
        work.wait()
        return tensors[-1]

    return end
