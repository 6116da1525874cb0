"""How nodes lie on the queues of one rank, and what a single pair takes by that."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping, Sequence
from typing import NamedTuple

from pipehc.schedules.costs import Costs
from pipehc.schedules.node_costs import NodeCost, PairStep, pair_steps

Interval = tuple[float, float]


class PairTimes(NamedTuple):
    """whole: from the first node to the end of the last. compute, all_to_all: time with such work; exposed: all-to-alls alone."""

    whole: float
    compute: float
    all_to_all: float
    exposed: float


def place(clock: MutableMapping[str, float], one_worker: bool, node: NodeCost, length: float, ready: float) -> Interval:
    """When a node runs that can start at `ready`. clock: queue -> when what was issued so far ends; is set to the node's end.

    one_worker: see `Costs`.
    """
    if node.queue == "communication" and one_worker:
        # A CPU starts a transfer when it is issued; who waits for it waits for those before it too.
        start = max(ready, clock["compute"])
        end = clock["communication"] = max(start + length, clock["communication"])
        return start, end
    queue = "compute" if one_worker else node.queue
    start = max(ready, clock[queue])
    clock[queue] = start + length
    return start, start + length


def steps_of(costs: Costs, ahead: int, back: int) -> list[PairStep]:
    """What a pair issues: the forward of stage `ahead`, the backward of stage `back`. Raises ValueError for missing nodes."""
    nodes = {(kind, stage): costs.nodes_of(kind, stage) or () for kind in "FIW" for stage in (ahead, back)}
    return pair_steps(nodes["F", ahead], nodes["F", back], nodes["I", back], nodes["W", back])


def pair_times(steps: Iterable[PairStep], one_worker: bool = False) -> PairTimes:
    """A pair by itself, both inputs there at the start."""
    clock = {"compute": 0.0, "high": 0.0, "communication": 0.0}
    ready = {"F": 0.0, "B": 0.0}
    works: list[Interval] = []
    moves: list[Interval] = []
    for what, node, _ in steps:
        if node is None:
            continue
        start, end = place(clock, one_worker, node, node.ms, ready.get(what, 0.0))
        (moves if node.queue == "communication" else works).append((start, end))
        if what != "W":
            ready[what] = end
    whole = max(clock.values())
    return PairTimes(whole, uncovered(works), uncovered(moves), uncovered(moves, works))


def uncovered(intervals: Sequence[Interval], by: Sequence[Interval] = ()) -> float:
    """How long one of `intervals` lasted, but none of `by`."""
    changes = [(t, i, 0) for low, high in intervals if low < high for t, i in ((low, 1), (high, -1))]
    changes += [(t, 0, i) for low, high in by if low < high for t, i in ((low, 1), (high, -1))]
    total, last, here, covered = 0.0, 0.0, 0, 0
    for at, one, other in sorted(changes):
        if here and not covered:
            total += at - last
        here, covered, last = here + one, covered + other, at
    return total
