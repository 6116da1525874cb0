"""Where the memory of a rank went at its fullest moment."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from pipehc.planning.dry_run.tracker import Block, Moment, Where
from pipehc.schedules.pair_order import kind_of

CATEGORIES = (
    "parameters",
    "gradients",
    "optimizer",
    "messages",
    "kept by F",
    "recomputed",
    "kept by B",
    "transient",
    "other",
)
"""Of the bytes of a rank. Messages: receive buffers and what is being sent. Kept by F, recomputed and kept by B outlive the piece
of work that made them: forward, recomputation, backward (gradients on their way, and what weight gradients still need). Other: what
is made while building or outside of actions."""


@dataclass(frozen=True)
class Peak:
    """The fullest moment of a rank. bytes: by category, those that are not 0. at: the work that was running. makers: the largest
    sums of bytes by (category, node kind, operation), of what is not there all the time."""

    total: int
    bytes: dict[str, int]
    at: Where
    makers: tuple[tuple[tuple[str, str, str], int], ...]


def peak(history: Iterable[Block], moment: Moment, makers: int = 12) -> Peak:
    """What was alive at a moment."""
    by_category: Counter[str] = Counter()
    by_maker: Counter[tuple[str, str, str]] = Counter()
    at = Where("setup")
    for block in history:
        if block.born > moment.clock or (block.died is not None and block.died <= moment.clock):
            continue
        category = _category(block)
        by_category[category] += block.nbytes
        if category not in ("parameters", "gradients", "optimizer"):
            by_maker[category, kind_of(block.where.node) or block.where.kind, block.name] += block.nbytes
        if block.born == moment.clock:
            at = block.where
    assert sum(by_category.values()) == moment.live, "the history does not explain the peak"
    ordered = {name: by_category[name] for name in CATEGORIES if by_category[name]}
    return Peak(moment.live, ordered, at, tuple(by_maker.most_common(makers)))


def _category(block: Block) -> str:
    if block.category is not None:
        return block.category
    if block.died is not None and block.where == block.died_in:
        return "transient"
    return {"F": "kept by F", "R": "recomputed", "B": "kept by B", "W": "kept by B"}.get(block.where.kind, "other")
