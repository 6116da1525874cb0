"""1F1B: warm up with forwards, alternate one forward and one backward, cool down with backwards."""

from __future__ import annotations

from pipehc.schedules.actions import Action, Cell
from pipehc.schedules.placement import linear

placement = linear


def rows(ranks: int, microbatches: int) -> tuple[tuple[Cell, ...], ...]:
    """Rank r holds at most `ranks - r` micro-batches at a time."""

    def row(rank: int) -> tuple[Cell, ...]:
        forwards = [Action("F", rank, m) for m in range(microbatches)]
        backwards = [Action("B", rank, m) for m in range(microbatches)]
        warmup = min(ranks - rank - 1, microbatches)
        steady = [action for pair in zip(forwards[warmup:], backwards) for action in pair]
        return (*forwards[:warmup], *steady, *backwards[microbatches - warmup :])

    return tuple(row(rank) for rank in range(ranks))
