"""Steady states: where every action of one micro-batch lies if micro-batches follow each other at a fixed interval.

This is modulo scheduling: a rank's day is `interval` long and starts over with every micro-batch, so the actions of one micro-batch
must not overlap in it, nor must its messages on a link. The offsets, plus the interval per micro-batch, are keys for the list
scheduler, which then packs the beginning and the end.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from math import floor
from random import Random

from pipehc.schedules.search.problem import FORWARD, INPUT, WEIGHT, Problem

Offsets = tuple[list[float], list[float], list[float]]  # [kind][chunk]: start of the action of micro-batch 0


def steady_state(problem: Problem, interval: float, random: Random, tight: float, loose: float) -> Offsets | None:
    """Random offsets for the mean micro-batch, or None if some action found no place.

    tight: probability that an action is put right before or after another one of its rank, which leaves no odd gaps; loose: that it
    is put off for a while.
    """
    length = [[sum(row) / problem.count for row in times] for times in problem.time]
    days: list[list[tuple[float, float]]] = [[] for _ in range(problem.ranks)]
    links: list[list[tuple[float, float]]] = [[] for _ in range(problem.links)]
    hold, latency = problem.costs.link, problem.costs.latency
    offsets: Offsets = ([0.0] * len(problem.rank), [0.0] * len(problem.rank), [0.0] * len(problem.rank))
    entries = [c for c, before in enumerate(problem.backward_to) if before < 0]
    front = [(0.0 if c == 0 else random.random() * interval, c, FORWARD) for c in entries]
    heapify(front)
    while front:
        ready, chunk, kind = heappop(front)
        if random.random() < loose:
            ready += 0.3 * interval * random.random()
        start = _place(days[problem.rank[chunk]], interval, ready, length[kind][chunk], random.random() < tight)
        if start is None:
            return None
        offsets[kind][chunk] = start
        end = start + length[kind][chunk]
        to, link = (problem.forward_to, problem.forward_link) if kind == FORWARD else (problem.backward_to, problem.backward_link)
        target = to[chunk]
        if target >= 0 and link[chunk] >= 0:
            sent = _place(links[link[chunk]], interval, end, hold, False)
            if sent is None:
                return None
            end = sent + hold + latency
        if target >= 0:
            heappush(front, (end, target, kind))
        elif kind == FORWARD:
            heappush(front, (end, chunk, INPUT))
    for chunk in random.sample(range(len(problem.rank)), len(problem.rank)):
        ready = offsets[INPUT][chunk] + length[INPUT][chunk]
        start = _place(days[problem.rank[chunk]], interval, ready, length[WEIGHT][chunk], False)
        if start is None:
            return None
        offsets[WEIGHT][chunk] = start
    return offsets


def live(problem: Problem, interval: float, offsets: Offsets) -> int:
    """Activations alive at once on the fullest rank, in the steady state."""
    forward, _, weight = offsets
    ends = [start + sum(row) / problem.count for start, row in zip(weight, problem.time[WEIGHT])]
    most = 0
    for own in problem.chunks:
        for now in (forward[c] for c in own):
            started = sum(floor((now - forward[c]) / interval + 1e-9) for c in own)
            ended = sum(floor((now - ends[c]) / interval + 1e-9) for c in own)
            most = max(most, started - ended)
    return most


def _place(day: list[tuple[float, float]], interval: float, ready: float, length: float, tight: bool) -> float | None:
    """The earliest start, not before `ready`, that is free on the `day`, a list of (start, length), which gets it."""
    if length <= 0:
        return ready
    rounding = 1e-9 * interval
    phase = ready % interval
    waits = [0.0] if not (tight and day) else []
    for start, taken in day:
        for at in (start + taken, start - length):
            wait = (at - phase) % interval
            waits.append(0.0 if interval - wait < rounding else wait)
    for wait in sorted(waits):
        at = (ready + wait) % interval
        for start, taken in day:
            after = (at - start) % interval
            if interval - after < rounding:
                after = 0.0
            if after < taken - rounding or after + length > interval + rounding:
                break
        else:
            if length > interval + rounding:
                return None
            day.append((at, length))
            return ready + wait
    return None
