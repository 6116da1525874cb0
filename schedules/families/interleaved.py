"""Interleaved 1F1B (Narayanan et al., 2021): v chunks a rank shorten the bubble v times, for v times the messages."""

from __future__ import annotations

from itertools import pairwise

from pipehc.schedules.actions import Action, Cell
from pipehc.schedules.placement import looped

placement = looped


def rows(ranks: int, microbatches: int, chunks: int) -> tuple[tuple[Cell, ...], ...]:
    """Micro-batches pass the chunks in groups of at least `ranks`: a whole group on one chunk, then the same group on the next.

    Groups are of equal size where `ranks` divides `microbatches`, and differ by one micro-batch at most if it does not.
    """
    groups = _groups(ranks, microbatches)

    def row(rank: int) -> tuple[Cell, ...]:
        def order(kind: str, order_of_chunks: range) -> list[Action]:
            return [Action(kind, c * ranks + rank, m) for group in groups for c in order_of_chunks for m in group]  # type: ignore[arg-type]

        forwards, backwards = order("F", range(chunks)), order("B", range(chunks)[::-1])
        # The first group must have passed all but the last chunk, and the pipeline is entered and left once.
        warmup = min((chunks - 1) * len(groups[0]) + 2 * (ranks - 1 - rank), len(forwards))
        steady = [action for pair in zip(forwards[warmup:], backwards) for action in pair]
        return (*forwards[:warmup], *steady, *backwards[len(forwards) - warmup :])

    return tuple(row(rank) for rank in range(ranks))


def _groups(ranks: int, microbatches: int) -> list[range]:
    """Contiguous groups, as many as can have `ranks` micro-batches each; the larger ones first."""
    count = max(1, microbatches // ranks)
    size, larger = divmod(microbatches, count)
    starts = [i * size + min(i, larger) for i in range(count + 1)]
    return [range(low, high) for low, high in pairwise(starts)]
