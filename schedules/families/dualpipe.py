"""DualPipe and DualPipeV: the eight steps of the DeepSeek-V3 schedule (spec section 5), once for both placements.

DualPipe sends half of the micro-batches up from rank 0 and half down from the last rank. DualPipeV is DualPipe cut in half: the
second half of the model travels back over the same ranks. Seen from one rank both are the same: *phase 0* is the chunk that is
met on the way in, *phase 1* the one met on the way out, and `half` ranks lie on the way.
"""

from __future__ import annotations

from collections.abc import Iterator

from pipehc.schedules.actions import Action, Cell, Pair
from pipehc.schedules.placement import bidirectional, vee
from pipehc.schedules.schedule import lane_microbatches

placement = bidirectional
vee_placement = vee


def rows(ranks: int, microbatches: int) -> tuple[tuple[Cell, ...], ...]:
    """DualPipe. Rank r holds stage r of lane 0 and stage P-1-r of lane 1; phase 0 is the lane whose entry is nearer."""
    if ranks % 2 or ranks < 2:
        raise ValueError(f"ranks = {ranks}: dualpipe needs an even number, at least 2")
    if microbatches % 2 or microbatches < 2 * ranks:
        raise ValueError(f"microbatches = {microbatches}: dualpipe needs an even number, at least {2 * ranks} (2 x ranks)")

    def row(rank: int) -> tuple[Cell, ...]:
        chunks = [_Chunk(rank, microbatches, lane=0, lanes=2), _Chunk(ranks - 1 - rank, microbatches, lane=1, lanes=2)]
        if rank >= ranks // 2:
            chunks.reverse()
        return tuple(_eight_steps(*chunks, half=ranks // 2, h=min(rank, ranks - 1 - rank), per_phase=microbatches // 2))

    return tuple(row(rank) for rank in range(ranks))


def vee_rows(ranks: int, microbatches: int) -> tuple[tuple[Cell, ...], ...]:
    """DualPipeV. Rank r holds stages r (phase 0) and 2P-1-r (phase 1) of one lane."""
    if ranks < 1:
        raise ValueError(f"ranks = {ranks}: must be at least 1")
    if microbatches < 2 * ranks:
        raise ValueError(f"microbatches = {microbatches}: dualpipev needs at least {2 * ranks} (2 x ranks)")

    def row(rank: int) -> tuple[Cell, ...]:
        down, up = _Chunk(rank, microbatches), _Chunk(2 * ranks - 1 - rank, microbatches)
        return tuple(_eight_steps(down, up, half=ranks, h=rank, per_phase=microbatches))

    return tuple(row(rank) for rank in range(ranks))


class _Chunk:
    """One stage on one rank: hands out the next forward, backward or weight gradient of its own micro-batches."""

    def __init__(self, stage: int, microbatches: int, lane: int = 0, lanes: int = 1) -> None:
        own = lane_microbatches(microbatches, lanes, lane)
        self._forwards = (Action("F", stage, m, lane) for m in own)
        self._backwards = (Action("B", stage, m, lane) for m in own)

    def F(self) -> Action:
        return next(self._forwards)

    def B(self) -> Action:
        return next(self._backwards)


def _eight_steps(phase0: _Chunk, phase1: _Chunk, *, half: int, h: int, per_phase: int) -> Iterator[Cell]:
    """The row of the rank that is `h` ranks from the entry, of `half` ranks on the way in."""
    middle = h == half - 1
    F0, B0, F1, B1 = phase0.F, phase0.B, phase1.F, phase1.B
    deferred: list[Action] = []  # weight gradients split off, oldest first

    def split(backward: Action) -> Action:
        deferred.append(backward._replace(kind="W"))
        return backward._replace(kind="I")

    # Step 1: F0
    for _ in range(2 * (half - h - 1)):
        yield F0()
    # Step 2: F0 F1
    for _ in range(h + 1):
        yield F0()
        yield F1()
    # Step 3: B1 W1 F1, the weight gradient split off
    for _ in range(half - h - 1):
        yield split(B1())
        yield deferred.pop(0)
        yield F1()
    # Step 4 (main): F0B1 F1B0, overlapped; the middle rank's first F0 and B1 stay apart, which shortens the bubble
    for i in range(per_phase - 2 * half + h + 1):
        if i == 0 and middle:
            yield F0()
            yield B1()
        else:
            yield Pair(F0(), B1())
        yield Pair(F1(), B0())
    # Step 5: B1 F1B0
    for _ in range(half - h - 1):
        yield B1()
        yield Pair(F1(), B0())
    # Step 6: B1 B0, the weight gradients of the second half split off
    for i in range(2 * (h + 1)):
        backward = B0() if i % 2 else B1()
        yield split(backward) if i >= h + 1 else backward
    # Step 7: W B0, B0 with its weight gradient split off
    for _ in range(half - h - 1):
        yield deferred.pop(0)
        yield split(B0())
    # Step 8: W
    yield from deferred
