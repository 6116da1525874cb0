"""A stage as a chain of pieces: functions of named values, each with an autograd graph of its own, some cheap to run again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal, Protocol

import torch

PROBE = "probe"
"""A value that every pass has: what looks at it, or None. No tensor."""

QueueName = Literal["compute", "high", "communication"]
# Called when a piece starts to run: F, B or R, and which one. Returns what is called when it has ended.
Watch = Callable[[Literal["F", "B", "R"], int], Callable[[], None]]


class Notes(Protocol):
    """What a piece that is rebuilt finds out in its first run and need not in its second, both of which it is entered around."""

    def __enter__(self) -> Any: ...

    def __exit__(self, *_: Any) -> None: ...

    def tensors(self) -> Sequence[torch.Tensor]:
        """What it keeps between the two."""
        ...


@dataclass(frozen=True)
class Piece:
    """Takes the values `inputs`, makes the values `outputs`.

    run: called with the values of `inputs`, returns those of `outputs`. Values are tensors, or whatever else pieces have to tell
    each other. Floating tensors are differentiable. node: pieces of one node follow each other without a change of turns.
    rebuilt: cheap to run again; with recomputation its results are dropped after the forward. run_again: what rebuilds them, if
    not `run`: the same without its side effects. for_backward: what runs again instead where nobody takes the results: they must
    have their graph, and may have any contents. notes: makes those of a rebuilt piece, for one micro-batch. differentiable: False
    for what only counts; its backward is nothing.
    """

    name: str
    run: Callable[..., Any]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    node: str = ""
    rebuilt: bool = False
    queue: QueueName = "compute"
    run_again: Callable[..., Any] | None = None
    for_backward: Callable[..., Any] | None = None
    notes: Callable[[], Notes] | None = None
    differentiable: bool = True


@dataclass(frozen=True)
class Exchange(Piece):
    """A piece that moves data between ranks and knows its own backward.

    Its inputs are tensors first. run: starts it, and returns a function that ends it and returns the outputs. run_backward: the
    same for the gradients of all inputs, called with a tuple of the gradients of the outputs and the inputs that are no tensors.
    """

    run_backward: Callable[..., Callable[[], tuple[Any, ...]]] = lambda *_: tuple


@dataclass(frozen=True)
class Node:
    """Consecutive pieces [start, stop) of a chain."""

    name: str
    start: int
    stop: int


class Chain:
    """The pieces of one stage in forward order, in recompute blocks. The same for all micro-batches.

    blocks: each is rebuilt from values that enter it from outside, and from those that its own other pieces made. result: the value
    that the chain is for.
    """

    def __init__(self, blocks: Sequence[Sequence[Piece]], result: str) -> None:
        self.pieces: tuple[Piece, ...] = tuple(piece for block in blocks for piece in block)
        self.result = result
        self.block_of = tuple(k for k, block in enumerate(blocks) for _ in block)
        self.maker = {name: i for i, piece in enumerate(self.pieces) for name in piece.outputs}
        assert len(self.maker) == sum(len(piece.outputs) for piece in self.pieces), "a value has two makers"
        self.uses = Counter(name for piece in self.pieces for name in piece.inputs)
        self.uses[result] += 1
        self._uses_in_block = Counter((name, k) for piece, k in zip(self.pieces, self.block_of) for name in piece.inputs)
        # What rebuilding starts from: streams at the start of a block and the output of every F, and how often each is used.
        self.kept_uses = Counter(
            name
            for piece, k in zip(self.pieces, self.block_of)
            if piece.rebuilt
            for name in piece.inputs
            if not self.is_rebuilt(name, k)
        )
        self.nodes = self._nodes()

    def rebuilt(self, block: int) -> list[int]:
        """The pieces of a block that are run again."""
        return [i for i, piece in enumerate(self.pieces) if self.block_of[i] == block and piece.rebuilt]

    def is_rebuilt(self, name: str, block: int) -> bool:
        """Whether `block` rebuilds this value for itself, rather than keep it."""
        i = self.maker.get(name)
        return i is not None and self.pieces[i].rebuilt and self.block_of[i] == block

    def again(self, index: int) -> Callable[..., Any]:
        """What runs a rebuilt piece again."""
        piece, block = self.pieces[index], self.block_of[index]
        if piece.for_backward is not None and not any(self._uses_in_block[name, block] for name in piece.outputs):
            return piece.for_backward
        return piece.run_again or piece.run

    def uses_in_block(self, name: str, block: int) -> int:
        """How many pieces of the block take this value."""
        return self._uses_in_block[name, block]

    def enters(self, name: str) -> bool:
        """Whether a kept value comes to its block from outside: then it is streams, and else the output of an F."""
        i = self.maker.get(name)
        return i is None or not self._uses_in_block[name, self.block_of[i]]

    def _nodes(self) -> list[Node]:
        nodes, start = [], 0
        for name, group in groupby(self.pieces, key=lambda piece: piece.node):
            stop = start + len(list(group))
            nodes.append(Node(name, start, stop))
            start = stop
        return nodes
