"""Feed-forward networks with SwiGLU, dense or of experts: fc2(silu(gate) * up), where fc1 makes gate and up.

What they keep is their input, what fc1 made and the probabilities: the backward makes the rest again. Weight gradients are deferred
(`wgrad`), and come as products of two factors, which can add themselves to the gradients that are there.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from pipehc.kernels.swiglu import swiglu, swiglu_backward_
from pipehc.model.products import grouped_mm
from pipehc.model.wgrad import Accumulate, Split, open_store, start_gather, start_sum


class Groups(NamedTuple):
    """Which rows go to which expert; they lie in the order of the experts.

    rows: how many, on the host. ends: where those of each expert end, int32 on the device; None: a product for each expert.
    """

    rows: Sequence[int]
    ends: torch.Tensor | None = None


class Projection(NamedTuple):
    """The weights [m, k] of a linear layer of every expert. stacked: the same memory as [experts, m, k], where products can be
    grouped. accumulate: what takes their gradients; None: autograd does."""

    weights: Sequence[torch.Tensor]
    stacked: torch.Tensor | None = None
    accumulate: Sequence[Accumulate] | None = None

    def forward(self, x: torch.Tensor, groups: Groups) -> torch.Tensor:
        """x [tokens, k] -> [tokens, m]"""
        return self._times(x, groups, lambda w: w.mT)

    def backward(self, dy: torch.Tensor, groups: Groups) -> torch.Tensor:
        """dy [tokens, m] -> [tokens, k]"""
        return self._times(dy, groups, lambda w: w)

    def _times(self, x: torch.Tensor, groups: Groups, form: Any) -> torch.Tensor:
        if len(self.weights) == 1:
            return x.matmul(form(self.weights[0]))
        if self.stacked is not None and groups.ends is not None:
            assert grouped_mm is not None
            product: torch.Tensor = grouped_mm(x, form(self.stacked), offs=groups.ends)
            return product
        factors = [form(w) for w in self.weights]
        out = x.new_empty(x.shape[0], factors[0].shape[1])
        for rows, factor, part in zip(x.split(list(groups.rows)), factors, out.split(list(groups.rows))):
            torch.mm(rows, factor, out=part)
        return out


def feed_forward(
    x: torch.Tensor,
    fc1: Projection,
    fc2: Projection,
    groups: Groups,
    probs: torch.Tensor | None = None,
    *,
    rebuild: bool = False,
    split: Split | None = None,
) -> torch.Tensor:
    """x [tokens, C] -> [tokens, C]; fc1 has weights [2 F, C], gate above up, and fc2 [C, F]. probs: [tokens], factors of SwiGLU.

    rebuild: keep nothing of size [tokens, F] beside what fc1 made; the backward makes it again, to the bit, for W.
    split: every rank of its group has its own of the F, so the results are summed over it. With `sequence` it has its part of the
    tokens of x and of the result, too, and `groups` are of all: x is gathered, in the backward again.
    """
    if fc1.accumulate is None:
        leaves = [*fc1.weights, *fc2.weights]
    else:  # with a leaf there is a backward even where x asks for none
        leaves = [fc1.weights[0].detach().requires_grad_(torch.is_grad_enabled())]
    detached = [p._replace(weights=[w.detach() for w in p.weights]) for p in (fc1, fc2)]
    out: torch.Tensor = _FeedForward.apply(x, probs, *detached, groups, rebuild, split, open_store(), *leaves)
    return out


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, probs, fc1, fc2, groups, rebuild, split, store, *leaves):  # type: ignore[no-untyped-def,override]
        h = fc1.forward(start_gather(x, split)(), groups)
        a = swiglu(h, probs)
        ctx.save_for_backward(x, probs, h, None if rebuild else a, groups.ends)
        ctx.fc1, ctx.fc2, ctx.rows, ctx.split, ctx.store = fc1, fc2, groups.rows, split, store
        return start_sum(fc2.forward(a, groups), split)()

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def,override]
        x, probs, h, a, ends = ctx.saved_tensors
        x = x.detach()  # W holds it, and would hold the graph that made it, with all the gradients in it
        fc1, fc2, groups = ctx.fc1, ctx.fc2, Groups(ctx.rows, ends)
        dy, gather = start_gather(dy, ctx.split)(), start_gather(x, ctx.split)
        d_a = fc2.backward(dy, groups)
        d_probs = swiglu_backward_(d_a, h, probs, again=a is None)
        dh, a = h, d_a if a is None else a
        del d_a
        x = gather()
        finish = start_sum(fc1.backward(dh, groups), ctx.split) if ctx.needs_input_grad[0] else lambda: None
        parts = [[t.split(list(groups.rows)) for t in factors] for factors in ((dh, x), (dy, a))]
        gradients: list[torch.Tensor] = []
        if fc1.accumulate is None:
            gradients = [d.t().matmul(rows) for factors in parts for d, rows in zip(*factors)]
        else:
            # Expert by expert, as their gradients lie in buckets.
            for of_fc1, of_fc2, *factors in zip(fc1.accumulate, fc2.accumulate, *parts[0], *parts[1]):
                for accumulate, pair in ((of_fc2, factors[2:]), (of_fc1, factors[:2])):
                    accumulate.owe()
                    if ctx.store is None:
                        accumulate.add(*pair)
                    else:
                        ctx.store.put(partial(accumulate.add, *pair))
        return finish(), d_probs, None, None, None, None, None, None, *(gradients or (None,))
