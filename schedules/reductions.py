"""When the sum of a stage's gradients over its replicas starts: in the cool-down, but not so early that it waits for its own rank.

With two lanes the replica of a stage lies on the mirrored rank, and the sum ends when both have started it. What the other one has
yet to compute may need messages that this rank has not sent: issued then, the sum could not end without this host going on
(see `issued`).
"""

from __future__ import annotations

from collections.abc import Sequence

from pipehc.schedules.issued import Clocks
from pipehc.schedules.order import Clock, join
from pipehc.schedules.placement import Placement
from pipehc.schedules.program import Held, Instruction, Post, Program, Reduction, Run, Send, inputs_first


def reductions(program: Program, clocks: Clocks, hosts_wait: bool = False) -> tuple[tuple[Reduction, ...], ...]:
    """For every rank what it sums, in order, each with the number of instructions that it must have issued before: those up to its
    last weight gradient or more, never a part of a pair.

    clocks: of the program, found by its verification.
    Replicas have one order: that in which weight gradients end on the lower one of their ranks. hosts_wait: what is issued behind a
    sum waits for it, so it comes after the last message of the rank.
    """
    if program.schedule.forward_only:
        return ((),) * program.schedule.ranks
    rows = [inputs_first(row) for row in program.instructions]
    last = [_last_weight_gradients(row) for row in rows]
    ready = [{held: _after_pair(row, count) for held, count in own.items()} for row, own in zip(rows, last)]
    if not _mirrored(program.schedule.placement):
        return tuple(tuple(sorted(own.items(), key=lambda start: start[1])) for own in ready)
    if hosts_wait:
        for own, row in zip(ready, rows):
            end = 1 + max(k for k, i in enumerate(row) if isinstance(i, (Post, Send)))
            own |= {held: max(count, end) for held, count in own.items()}
    found: list[tuple[Reduction, ...]] = [()] * len(ready)
    for low in range(len(ready) // 2):
        high = len(ready) - 1 - low
        counts = {low: [0], high: [0]}
        stages = sorted(ready[low], key=last[low].__getitem__)
        for lane, stage in stages:
            for rank, held in ((low, (lane, stage)), (high, (1 - lane, stage))):
                counts[rank].append(max(counts[rank][-1], ready[rank][held]))
            _put_off(clocks, counts)
        found[low] = tuple(zip(stages, counts[low][1:]))
        found[high] = tuple(((1 - lane, stage), count) for (lane, stage), count in zip(stages, counts[high][1:]))
    return tuple(found)


def _mirrored(placement: Placement) -> bool:
    """Whether every stage is on two ranks, each the other's mirror image; other placements of two lanes are for schedules alone."""
    ranks = placement.ranks
    pairs = ((placement.rank(0, s), placement.rank(1, s)) for s in range(placement.stages)) if placement.lanes == 2 else ()
    return placement.lanes == 2 and ranks % 2 == 0 and all(a + b == ranks - 1 for a, b in pairs)


def _put_off(clocks: Clocks, counts: dict[int, list[int]]) -> None:
    """Moves the last start of both ranks back until all that the sum depends on has been issued there."""
    moved = True
    while moved:
        moved, known = False, [-1] * len(clocks.rows)
        for rank, (*_, count) in counts.items():
            known = join(known, _issued(clocks, rank, count))
        for rank, own in counts.items():
            if known[rank] >= own[-1]:
                own[-1], moved = _after_pair(clocks.rows[rank], known[rank] + 1), True


def _issued(clocks: Clocks, rank: int, count: int) -> Clock:
    """What the first `count` instructions of a rank depend on: its queues are joined before a sum."""
    return clocks.of_runs[rank][max(index for index in clocks.of_runs[rank] if index < count)]


def _last_weight_gradients(row: Sequence[Instruction]) -> dict[Held, int]:
    """By (lane, stage), the number of instructions up to the last weight gradient."""
    return {i.action[3:0:-2]: k for k, i in enumerate(row, start=1) if isinstance(i, Run) and i.action.kind in "BW"}


def _after_pair(row: Sequence[Instruction], count: int) -> int:
    """The end of the pair that the first `count` instructions would end in: inside it their order may differ."""
    pairs = {i.pair: k for k, i in enumerate(row, start=1) if isinstance(i, Run) and i.pair is not None}
    begun = [pairs[i.pair] for i in row[:count] if isinstance(i, Run) and i.pair is not None]
    return max([count, *begun])
