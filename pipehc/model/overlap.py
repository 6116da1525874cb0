"""An overlapped pair: forward of one micro-batch and backward of another, node by node, as `pipehc.schedules.pair_order` says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from pipehc.recompute import Chain, Pass
from pipehc.schedules.pair_order import Mark, pair_order


class Half(NamedTuple):
    """One micro-batch on one stage."""

    chain: Chain
    run: Pass


def overlap(forward: Half, backward: Half, flush: Callable[[str], None]) -> Iterator[Mark]:
    """Issues the nodes of both halves in turn.

    flush: computes the weight gradients of the node that it is given, at its turn. Yields the marks of `pair_order`.
    The backward's gradient must be seeded.
    """
    ahead, back = ({node.name: node for node in half.chain.nodes} for half in (forward, backward))
    assert len(ahead) == len(forward.chain.nodes) and len(back) == len(backward.chain.nodes), "the nodes of a chain have names"
    for turn in pair_order(list(ahead), list(back), forward.run.host_ahead):
        match turn:
            case ("F", name):
                for index in range(ahead[name].start, ahead[name].stop):
                    forward.run.forward(index)
            case ("B", name):
                for index in reversed(range(back[name].start, back[name].stop)):
                    backward.run.backward(index)
            case ("W", name):
                flush(name)
            case mark:
                yield mark  # type: ignore[misc]
