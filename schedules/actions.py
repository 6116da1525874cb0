"""Actions: what a rank does for one micro-batch on one stage, and their one-line text form.

    2F7      forward of stage 2, micro-batch 7            F  forward
    2I7@1    the same on lane 1, input gradient           B  full backward (I and W)
    (0F3;1B2)OVERLAP_F_B   a forward and a backward       I  gradient of the stage's input
             that run as one overlapped pair              W  gradient of the stage's weights
                                                          R  recompute what the forward dropped

The form is the one of torch.distributed.pipelining; only `@lane` is new, and it is left out on lane 0.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal, NamedTuple

Kind = Literal["F", "B", "I", "W", "R"]


class Action(NamedTuple):
    """One piece of work. `stage` counts from the lane's entry, `microbatch` over both lanes together."""

    kind: Kind
    stage: int
    microbatch: int
    lane: int = 0

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}" + (f"@{self.lane}" if self.lane else "")


class Pair(NamedTuple):
    """A forward and a backward of different micro-batches that run overlapped."""

    forward: Action
    backward: Action

    def __str__(self) -> str:
        return f"({self.forward};{self.backward})OVERLAP_F_B"


Cell = Action | Pair

_ACTION = re.compile(r"(\d+)([FBIWR])(\d+)(?:@(\d+))?", re.IGNORECASE)
_PAIR = re.compile(r"\(([^;]+);([^;)]+)\)OVERLAP_F_B", re.IGNORECASE)


def actions_of(cell: Cell) -> tuple[Action, ...]:
    """The one or two actions of a cell, in the order in which they start."""
    return (cell.forward, cell.backward) if isinstance(cell, Pair) else (cell,)


def flatten(row: tuple[Cell, ...]) -> Iterator[Action]:
    """All actions of a rank's row, pairs opened."""
    for cell in row:
        yield from actions_of(cell)


def parse(text: str) -> Cell:
    """The cell that `str` wrote, in capitals or not. Raises ValueError, naming the text, if it is not one."""
    text = text.strip()
    if pair := _PAIR.fullmatch(text):
        forward, backward = (parse(half) for half in pair.groups())
        if isinstance(forward, Action) and isinstance(backward, Action) and forward.kind == "F" and backward.kind == "B":
            return Pair(forward, backward)
        raise ValueError(f"pair {text!r}: must be a forward F and a full backward B, as in (0F3;1B2)OVERLAP_F_B")
    if not (match := _ACTION.fullmatch(text)):
        raise ValueError(f"action {text!r}: must look like 2F7, 2B7, 2I7, 2W7, 2R7, 2F7@1 or (0F3;1B2)OVERLAP_F_B")
    stage, kind, microbatch, lane = match.groups()
    return Action(kind.upper(), int(stage), int(microbatch), int(lane or 0))  # type: ignore[arg-type]
