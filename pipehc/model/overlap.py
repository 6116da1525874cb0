"""An overlapped pair: forward of one micro-batch and backward of another, node by node in one fixed order (paper, figure 4).

Each all-to-all of the one runs beside the other's computation; the end of an FFN, in both directions, has the queue of high
priority. For every block of the forward and of the backward, the latter from its last block on:

    compute        |           | attention F |            | mlp B |            mlp W, mlp F | attention B |          | attention W
    communication  | combine B                | dispatch F         | dispatch B | combine F               |          |
    high           | mlp_post B                                                              |             mlp_post F |

The stage message of the forward leaves after its last mlp_post, the gradient after attention B, both before the last attention W.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

from pipehc.recompute import Chain, Pass
from pipehc.recompute.chain import Node

Step = tuple[Literal["F", "B", "W"], str]
TEMPLATE: tuple[Step, ...] = (
    ("B", "mlp_post"),
    ("B", "combine"),
    ("F", "attention"),
    ("F", "dispatch"),
    ("B", "mlp"),
    ("B", "dispatch"),
    ("W", "mlp"),
    ("F", "mlp"),
    ("F", "combine"),
    ("B", "attention"),
    ("F", "mlp_post"),
    ("W", "attention"),
)


class Half(NamedTuple):
    """One micro-batch on one stage."""

    chain: Chain
    run: Pass


def overlap(forward: Half, backward: Half, flush: Callable[[str], None]) -> Iterator[Literal["output", "gradient", "end"]]:
    """Issues the nodes of both halves in turn.

    flush: computes the weight gradients owed so far, at the turn of the node that it is given. Yields "output" when the forward is
    issued, "gradient" when the input gradient of the backward is, "end" when all is; the first two in the order in which they
    come. A half with more blocks has the rest of them to itself. The backward's gradient must be seeded.
    """
    ahead, back = blocks(forward.chain), blocks(backward.chain)[::-1]
    for k in range(max(len(ahead), len(back))):
        for what, kind in TEMPLATE:
            nodes = (ahead if what == "F" else back)[k : k + 1]
            for node in (node for block in nodes for node in block if node.name.endswith(f".{kind}")):
                if what == "W":
                    flush(node.name)
                    continue
                for index in range(node.start, node.stop)[:: 1 if what == "F" else -1]:
                    (forward.run.forward if what == "F" else backward.run.backward)(index)
            if (what, kind) == ("F", "mlp_post") and k + 1 == len(ahead):
                yield "output"
            if (what, kind) == ("F", "mlp_post") and k + 1 == len(back):
                yield "gradient"
    yield "end"


def blocks(chain: Chain) -> list[Sequence[Node]]:
    """The nodes of each block of the model; their names are BLOCK.KIND."""
    found: dict[str, list[Node]] = {}
    for node in chain.nodes:
        block, _, kind = node.name.rpartition(".")
        assert ("F", kind) in TEMPLATE, node
        found.setdefault(block, []).append(node)
    return list(found.values())
