"""How many sub-layers one recompute block should have, and what it costs (paper, section 4.3.2)."""

from __future__ import annotations

import math
from typing import NamedTuple


class Memory(NamedTuple):
    """Activations of hyper-connections on one rank, in units of C numbers a token of one micro-batch."""

    resident: int  # block inputs, n a block and micro-batch in flight
    outputs: int  # the outputs of F, one a sub-layer and micro-batch in flight
    transient: int  # what one block rebuilds, n + 2 a sub-layer, for one micro-batch at a time

    @property
    def total(self) -> int:
        return self.resident + self.outputs + self.transient


def optimal_block_size(n: int, L: int, *, live: int = 1) -> int:
    """Sub-layers a block for the least memory: eq. 20, sqrt(n L / (n + 2)), to the whole number on its better side.

    n: streams. L: sub-layers to cut; those of one stage, since no block crosses a stage boundary. live: micro-batches in flight,
    whose block inputs are all kept while one block at a time is rebuilt: the eq. is for one, with more the blocks grow.
    Always in 1..L; of two equally good sizes the smaller. Raises ValueError if an argument is not positive.
    """
    for name, value in (("n", n), ("L", L), ("live", live)):
        if value < 1:
            raise ValueError(f"{name} = {value}: must be at least 1")
    exact = math.sqrt(live * n * L / (n + 2))
    candidates = {min(L, max(1, round_(exact))) for round_ in (math.floor, math.ceil)}
    return min(sorted(candidates), key=lambda size: live * n * L / size + (n + 2) * size)


def cut(sublayers: int, block: int | None) -> list[range]:
    """The sub-layers 0..sublayers - 1 of a stage in blocks of at most `block` (None: all in one), as even as possible.

    Raises ValueError if `sublayers` or `block` is not positive.
    """
    if sublayers < 1 or (block is not None and block < 1):
        raise ValueError(f"sublayers = {sublayers}, block = {block}: must be at least 1")
    count = 1 if block is None else math.ceil(sublayers / block)
    ends = [math.ceil(sublayers * (k + 1) / count) for k in range(count)]
    return [range(start, end) for start, end in zip([0, *ends], ends)]


def memory(n: int, sublayers: int, block: int | None, live: int = 1) -> Memory:
    """What `live` micro-batches in flight keep on a stage of `sublayers` sub-layers with n streams, in blocks of `block`."""
    blocks = cut(sublayers, block)
    return Memory(live * n * len(blocks), live * sublayers, (n + 2) * max(map(len, blocks)))
