"""The graph of one piece: what it holds, and for how long."""

import weakref
from contextlib import nullcontext

import torch

from pipehc.recompute.graph import record


def test_who_holds_the_graph_holds_no_gradients():
    """A layer may hold it until its W: `Function.backward` gets what it saved with the history that it had."""
    x, grad = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    outputs, graph = record(lambda x, n: (x.sin(), n, x.detach()), [x, 3], nullcontext(), nullcontext())
    held = outputs[0].grad_fn
    found = graph.backward([grad, None, None])
    assert torch.equal(found[0], grad * x.cos()) and found[1:] == [None]
    alive = weakref.ref(found.pop(0))
    assert held is not None and alive() is None
