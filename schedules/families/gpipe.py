"""GPipe: all forwards, then all backwards. The simplest schedule, and the one that keeps every micro-batch alive."""

from __future__ import annotations

from pipehc.schedules.actions import Action, Cell
from pipehc.schedules.placement import linear

placement = linear


def rows(ranks: int, microbatches: int) -> tuple[tuple[Cell, ...], ...]:
    """Every rank holds up to `microbatches` activations."""
    return tuple(tuple(Action(kind, rank, m) for kind in ("F", "B") for m in range(microbatches)) for rank in range(ranks))
