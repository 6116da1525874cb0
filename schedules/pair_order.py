"""The order in which the nodes of an overlapped pair are issued (paper, figure 4): the runtime runs it, the simulator predicts it.

A block of the model has the nodes attention | dispatch | mlp | combine | mlp_post, a dense one no dispatch and no combine. Each
all-to-all of one half of the pair runs beside the other half's computation; the end of an FFN, in both directions, has the queue of
high priority. For every block of the forward and of the backward, the latter from its last block on, whose mlp_post and combine
come first:

    compute        | attention F |            | mlp B |            mlp W, mlp F | attention B |           attention W |
    communication  |             | dispatch F         | dispatch B | combine F               | combine B             |
    high           |                                                                          | mlp_post F, mlp_post B

The last mlp_post B and combine B in a row are those of the block that is next, so that attention W, which waits for nothing, hides
them and combine F.

Weight gradients wait for nothing, and nothing waits for them: those of the last HELD blocks of the backward come after both
stage messages have left, and hide them. One does not: mlp W of the forward's last block lies behind mlp F and hides combine F, so
that the output leaves before attention B, and the gradient, which may go the same way, after it:

    compute        | attention F |            | mlp B | mlp F      | mlp W     | attention B |            other W |
    communication  |             | dispatch F | dispatch B         | combine F |
    high           |                                                           | mlp_post F
    messages       |                                                                        | output   | gradient

Where the host issues work ahead of a device, mlp B comes before dispatch F: the host must know how many tokens go where before it
can issue dispatch F, waits for that, and meanwhile the compute queue has mlp B to do. The order on each queue is the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

Step = tuple[Literal["F", "B", "W"], str]
START: tuple[Step, ...] = (("B", "mlp_post"), ("B", "combine"))
FIRST: tuple[Step, ...] = (("F", "attention"), ("F", "dispatch"), ("B", "mlp"), ("B", "dispatch"))
AHEAD = (FIRST[0], FIRST[2], FIRST[1], FIRST[3])
SECOND: tuple[Step, ...] = (("F", "mlp"), ("F", "combine"))
OUTPUT: Step = ("F", "mlp_post")
HELD = 2
WEIGHTED: tuple[Literal["mlp", "attention"], ...] = ("mlp", "attention")  # the kinds that have a turn for W, in backward order
NODE_KINDS = ("attention", "dispatch", "mlp", "combine", "mlp_post")  # in forward order
ALL_TO_ALLS = ("dispatch", "combine")

Mark = Literal["output", "gradient", "end"]
Turn = tuple[Literal["F", "B", "W"], str] | Mark


def pair_order(ahead: Sequence[str], back: Sequence[str], host_ahead: bool = False) -> Iterator[Turn]:
    """The turns of all nodes of a pair.

    ahead, back: the nodes of the stage of the forward and of that of the backward, BLOCK.KIND, both in forward order. host_ahead:
    the host issues work to a device (see above). Yields F, B and W with the node whose forward, backward or weight gradients are
    next; between them "output" when the forward is issued, "gradient" when the input gradient of the backward is, and "end" when
    all is; the first two in the order in which they come. A half with more blocks has the rest of them to itself.
    """
    forwards, backwards = blocks(ahead), blocks(back)[::-1]

    def turns(k: int, *steps: Step) -> Iterator[Turn]:
        """Those of the k-th blocks."""
        for what, kind in steps:
            for block in (forwards if what == "F" else backwards)[k : k + 1]:
                if kind in block:
                    yield what, block[kind]

    held = range(max(0, len(backwards) - HELD), len(backwards))
    covering = len(forwards) - 1 if forwards and "combine" in forwards[-1] else None
    yield from turns(0, *START)
    for k in range(max(len(forwards), len(backwards))):
        last = k + 1 == len(forwards)
        yield from turns(k, *(AHEAD if host_ahead else FIRST))
        if k != covering and k not in held:
            yield from turns(k, ("W", "mlp"))
        yield from turns(k, *SECOND)
        if k == covering:
            yield from turns(k, ("W", "mlp"))
        if last:
            yield from turns(k, OUTPUT)
            yield "output"
        yield from turns(k, ("B", "attention"))
        if k + 1 == len(backwards):
            yield "gradient"
        if not last:
            yield from turns(k, OUTPUT)
        yield from turns(k + 1, *START)
        if k not in held:
            yield from turns(k, ("W", "attention"))
    for k in held:
        yield from turns(k, *(("W", kind) for kind in WEIGHTED if (k, kind) != (covering, "mlp")))
    yield "end"


def kind_of(node: str) -> str:
    """KIND of BLOCK.KIND."""
    return node.rpartition(".")[2]


def blocks(nodes: Sequence[str]) -> list[dict[str, str]]:
    """The nodes of each block of the model, by kind."""
    found: dict[str, dict[str, str]] = {}
    for node in nodes:
        block, _, kind = node.rpartition(".")
        assert kind in NODE_KINDS and kind not in found.setdefault(block, {}), node
        found[block][kind] = node
    return list(found.values())
