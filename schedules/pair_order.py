"""The order in which the nodes of an overlapped pair are issued (paper, figure 4): the runtime runs it, the simulator predicts it.

A block of the model has the nodes attention | dispatch | mlp | combine | mlp_post, a dense one no dispatch and no combine. Each
all-to-all of one half of the pair runs beside the other half's computation; the end of an FFN, in both directions, has the queue of
high priority. For every block of the forward and of the backward, the latter from its last block on, whose mlp_post and combine
come first:

    compute        | attention F |            | mlp B |            mlp W, mlp F | attention B |           attention W |
    communication  |             | dispatch F         | dispatch B | combine F               | combine B             |
    high           |                                                                          | mlp_post B            | mlp_post F

The last mlp_post B and combine B in a row are those of the block that is next, so that attention W, which waits for nothing, hides
them and combine F. In the last block of a half mlp_post F comes before attention W: the stage message of the forward leaves after
it, the gradient after attention B, both before the last attention W.

Where the host issues work ahead of a device, mlp B comes before dispatch F: the host must know how many tokens go where before it
can issue dispatch F, waits for that, and meanwhile the compute queue has mlp B to do. The order on each queue is the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

Step = tuple[Literal["F", "B", "W"], str]
START: tuple[Step, ...] = (("B", "mlp_post"), ("B", "combine"))
MIDDLE: tuple[Step, ...] = (
    ("F", "attention"),
    ("F", "dispatch"),
    ("B", "mlp"),
    ("B", "dispatch"),
    ("W", "mlp"),
    ("F", "mlp"),
    ("F", "combine"),
    ("B", "attention"),
)
AHEAD = (MIDDLE[0], MIDDLE[2], MIDDLE[1], *MIDDLE[3:])
OUTPUT: tuple[Step, ...] = (("F", "mlp_post"),)
REST: tuple[Step, ...] = (("W", "attention"),)
NODE_KINDS = ("attention", "dispatch", "mlp", "combine", "mlp_post")  # in forward order
ALL_TO_ALLS = ("dispatch", "combine")

Mark = Literal["output", "gradient", "end"]
Turn = tuple[Literal["F", "B", "W"], str] | Mark


def pair_order(ahead: Sequence[str], back: Sequence[str], host_ahead: bool = False) -> Iterator[Turn]:
    """The turns of all nodes of a pair.

    ahead, back: the nodes of the stage of the forward and of that of the backward, BLOCK.KIND, both in forward order. host_ahead:
    the host issues work to a device (see above). Yields F and B with the node whose forward or backward is next, W with the node
    at whose turn the weight gradients owed so far are computed; between them "output" when the forward is issued, "gradient" when
    the input gradient of the backward is, and "end" when all is; the first two in the order in which they come. A half with more
    blocks has the rest of them to itself.
    """
    forwards, backwards = blocks(ahead), blocks(back)[::-1]

    def turns(steps: Sequence[Step], k: int) -> Iterator[Turn]:
        """Those of the k-th blocks."""
        for what, kind in steps:
            for block in (forwards if what == "F" else backwards)[k : k + 1]:
                if kind in block:
                    yield what, block[kind]

    yield from turns(START, 0)
    for k in range(max(len(forwards), len(backwards))):
        yield from turns(AHEAD if host_ahead else MIDDLE, k)
        last = k + 1 in (len(forwards), len(backwards))
        if last:
            yield from turns(OUTPUT, k)
        if k + 1 == len(forwards):
            yield "output"
        if k + 1 == len(backwards):
            yield "gradient"
        yield from turns(START, k + 1)
        yield from turns(REST, k)
        if not last:
            yield from turns(OUTPUT, k)
    yield "end"


def blocks(nodes: Sequence[str]) -> list[dict[str, str]]:
    """The nodes of each block of the model, by kind."""
    found: dict[str, dict[str, str]] = {}
    for node in nodes:
        block, _, kind = node.rpartition(".")
        assert kind in NODE_KINDS and kind not in found.setdefault(block, {}), node
        found[block][kind] = node
    return list(found.values())
