"""Placements: which rank holds which stage of which lane.

A lane is one direction of travel through the model. Linear, looped and V placements have one lane; the bidirectional
placement of DualPipe has two, with a replica of every stage on each.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property


@dataclass(frozen=True)
class Placement:
    """`table[lane][stage]` is the rank that holds the stage; every lane holds the whole model, cut into `stages`."""

    table: tuple[tuple[int, ...], ...]
    kind: str = field(default="custom", compare=False)  # linear | looped | v | bidirectional | custom: a name for the table

    def __post_init__(self) -> None:
        if not self.table or not self.table[0] or len({len(lane) for lane in self.table}) != 1:
            raise ValueError(f"placement table {self.table}: needs at least one lane, and lanes of one length > 0")
        held = {rank for lane in self.table for rank in lane}
        if held != set(range(len(held))):
            raise ValueError(f"placement table {self.table}: ranks must be 0..{len(held) - 1}, each with a stage")

    @cached_property
    def ranks(self) -> int:
        return 1 + max(max(lane) for lane in self.table)

    @property
    def lanes(self) -> int:
        return len(self.table)

    @property
    def stages(self) -> int:
        """Stages of one lane."""
        return len(self.table[0])

    @property
    def share(self) -> float:
        """What one stage holds of the model, in units of 1 / ranks of the model: costs and activations scale with it."""
        return self.ranks / self.stages

    def rank(self, lane: int, stage: int) -> int:
        return self.table[lane][stage]

    def held(self, rank: int) -> list[tuple[int, int]]:
        """The (lane, stage) pairs on `rank`, by lane and stage."""
        return [(lane, stage) for lane, row in enumerate(self.table) for stage, at in enumerate(row) if at == rank]


def linear(ranks: int) -> Placement:
    """Stage s on rank s."""
    return Placement((tuple(range(_positive(ranks))),), "linear")


def looped(ranks: int, chunks: int) -> Placement:
    """Stage s on rank s mod `ranks`: `chunks` stages a rank (interleaved schedules)."""
    if chunks < 1:
        raise ValueError(f"chunks = {chunks}: must be at least 1")
    return Placement((tuple(range(_positive(ranks))) * chunks,), "looped" if chunks > 1 else "linear")


def vee(ranks: int) -> Placement:
    """Stages s and 2 * ranks - 1 - s on rank s: down and up again, entry and exit on rank 0."""
    down = tuple(range(_positive(ranks)))
    return Placement((down + down[::-1],), "v")


def bidirectional(ranks: int) -> Placement:
    """Lane 0 travels from rank 0 up, lane 1 from the last rank down: two replicas of every stage."""
    up = tuple(range(_positive(ranks)))
    return Placement((up, up[::-1]), "bidirectional")


def infer(table: tuple[tuple[int, ...], ...]) -> Placement:
    """The named placement with this table, or a custom one."""
    ranks = 1 + max(max(lane) for lane in table)
    candidates = [linear(ranks), vee(ranks), bidirectional(ranks)]
    if len(table[0]) % ranks == 0:
        candidates.append(looped(ranks, len(table[0]) // ranks))
    return next((p for p in candidates if p.table == table), Placement(table))


def _positive(ranks: int) -> int:
    if ranks < 1:
        raise ValueError(f"ranks = {ranks}: must be at least 1")
    return ranks
