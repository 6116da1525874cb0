"""A scheduling problem as flat arrays, for the list scheduler.

A *chunk* is one stage of one lane; it handles its micro-batches in order, numbered from 0 within the lane. Micro-batches of equal
size lose nothing by that order: of two that cross, the names can be swapped.

The bidirectional placement over an even number of ranks looks the same from both ends. Its mirror images are scheduled alike: only
the lower half of the ranks is kept, and what the two middle ranks send each other, the upper of the kept ranks sends to itself.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import NamedTuple

from pipehc.schedules.actions import Action, Cell, Pair
from pipehc.schedules.bounds import lower_bound, stages_of
from pipehc.schedules.costs import Costs
from pipehc.schedules.pair_time import pair_times, steps_of
from pipehc.schedules.placement import Placement
from pipehc.schedules.schedule import Schedule, lane_microbatches

FORWARD, INPUT, WEIGHT, PAIR = range(4)  # kinds of the scheduler's actions


class Op(NamedTuple):
    """One scheduled action, or a pair: then `partner` is the chunk and micro-batch of its backward."""

    kind: int
    chunk: int
    microbatch: int
    start: float
    partner: tuple[int, int] | None = None


@dataclass
class Problem:
    """All lists but `slots` and `work` are indexed by chunk. Links are numbered; -1 stands for no link: both ends on one rank."""

    placement: Placement
    microbatches: int
    costs: Costs
    max_live: float | None
    bound: float
    mirrored: bool
    ranks: int  # that are scheduled
    count: int  # micro-batches of a chunk
    pair_scale: float  # factor on both halves of an overlapped pair
    stage: list[tuple[int, int]] = field(default_factory=list)  # lane, stage
    rank: list[int] = field(default_factory=list)
    time: tuple[list[list[float]], ...] = ([], [], [])  # [kind][chunk][micro-batch]
    tail: tuple[list[list[float]], ...] = ([], [])  # [kind][chunk][micro-batch]: least time after the end of an F or an I
    forward_to: list[int] = field(default_factory=list)  # chunk that gets the output, -1 at the exit
    forward_link: list[int] = field(default_factory=list)
    backward_to: list[int] = field(default_factory=list)
    backward_link: list[int] = field(default_factory=list)
    forward_delay: list[float] = field(default_factory=list)  # least time until an input that is not on its way is here;
    backward_delay: list[float] = field(default_factory=list)  # -1 if its producer is on the same rank
    limit: list[int] = field(default_factory=list)  # live micro-batches of the chunk
    chunks: list[list[int]] = field(default_factory=list)  # [rank]
    work: list[float] = field(default_factory=list)  # [rank], as pairs where that is less
    slots: int = 0  # live activations of a rank
    links: int = 0

    @property
    def actions(self) -> int:
        """How many actions a schedule has: the cost of one run of the list scheduler."""
        return 3 * self.count * len(self.rank)

    @property
    def unit(self) -> float:
        """A typical time of one action, the scale for random changes."""
        return sum(self.work) / self.actions

    def schedule(self, rows: list[list[Op]], name: str) -> Schedule:
        """The rows of the list scheduler as a schedule; an I directly followed by its W becomes a B."""
        cells = [self._cells(row, mirror=False) for row in rows]
        if self.mirrored:
            cells += [self._cells(row, mirror=True) for row in reversed(rows)]
        return Schedule(name, self.placement, self.microbatches, tuple(cells))

    def action(self, kind: str, chunk: int, microbatch: int, mirror: bool = False) -> Action:
        lane, stage = self.stage[chunk]
        if self.mirrored:
            lane = int(stage >= self.ranks) ^ int(mirror)
        start = lane_microbatches(self.microbatches, self.placement.lanes, lane).start
        return Action(kind, stage, start + microbatch, lane)  # type: ignore[arg-type]

    def _cells(self, row: list[Op], mirror: bool) -> tuple[Cell, ...]:
        cells: list[Cell] = []
        for op in row:
            if op.partner is not None:
                forward = self.action("F", op.chunk, op.microbatch, mirror)
                cells.append(Pair(forward, self.action("B", *op.partner, mirror)))
                continue
            action = self.action("FIW"[op.kind], op.chunk, op.microbatch, mirror)
            if op.kind == WEIGHT and cells and cells[-1] == action._replace(kind="I"):
                cells[-1] = action._replace(kind="B")
            else:
                cells.append(action)
        return tuple(cells)


def pose(placement: Placement, microbatches: int, costs: Costs, max_live: float | None) -> Problem | None:
    """The problem of the best schedule of `placement`, or None if its lanes or the cap do not allow any."""
    ranks, lanes = placement.ranks, placement.lanes
    factors, sizes = costs.stage_factors(placement), costs.microbatch_factors(microbatches)
    if microbatches % lanes:
        return None
    count = microbatches // lanes
    mirrored = placement.kind == "bidirectional" and ranks % 2 == 0 and factors[0] == factors[1] and sizes[:count] == sizes[count:]
    bound = lower_bound(placement, microbatches, costs, max_live=max_live)
    scheduled = ranks // 2 if mirrored else ranks
    pair_scale = _pair_scale(placement, costs)
    problem = Problem(placement, microbatches, costs, max_live, bound, mirrored, scheduled, count, pair_scale)
    problem.time, problem.tail = ([], [], []), ([], [])
    ends = stages_of(placement, microbatches, costs, False)
    edges: dict[tuple[int, int], int] = {}
    for lane in range(1 if mirrored else lanes):
        own = [sizes[m] for m in lane_microbatches(microbatches, lanes, lane)]
        at = [min(rank, ranks - 1 - rank) if mirrored else rank for rank in placement.table[lane]]
        base, last = len(problem.rank), placement.stages - 1

        def edge(a: int, b: int, lane: int = lane, at: list[int] = at) -> int:
            crossing = placement.rank(lane, a) != placement.rank(lane, b)
            return edges.setdefault((at[a], at[b]), len(edges)) if crossing else -1

        for s in range(placement.stages):
            problem.stage.append((lane, s))
            problem.rank.append(at[s])
            for kind, name in enumerate("FIW"):
                problem.time[kind].append([costs.time(name, s) * factors[lane][s] * size for size in own])
            least = ends[lane][s]
            for tails, rest, drain in zip(
                problem.tail, (least.forward_tail, least.backward_tail), (least.forward_drain, least.backward_drain)
            ):
                tails.append([rest + (count - 1 - k) * drain for k in range(count)])
            problem.forward_to.append(base + s + 1 if s < last else -1)
            problem.forward_link.append(edge(s, s + 1) if s < last else -1)
            problem.backward_to.append(base + s - 1 if s else -1)
            problem.backward_link.append(edge(s, s - 1) if s else -1)
            for delays, kind, producer in ((problem.forward_delay, FORWARD, s - 1), (problem.backward_delay, INPUT, s + 1)):
                local = not 0 <= producer <= last or at[producer] == at[s]
                if local:
                    delays.append(-1.0)
                else:
                    factor = factors[lane][producer] * min(own)
                    delays.append(costs.time("FI"[kind], producer) * factor + costs.link + costs.latency)
    problem.links = len(edges)
    problem.chunks = [[c for c, rank in enumerate(problem.rank) if rank == r] for r in range(problem.ranks)]
    scale = min(1.0, problem.pair_scale)
    problem.work = [scale * sum(sum(times[c]) for times in problem.time for c in own) for own in problem.chunks]
    return problem if _set_limits(problem) else None


def _pair_scale(placement: Placement, costs: Costs) -> float:
    """With costs of nodes the mean over the pairs that ranks can have: what a pair takes by itself, against its halves alone."""
    if not costs.nodes:
        return costs.pair_scale
    together, alone = 0.0, 0.0
    for rank in range(placement.ranks):
        stages = [stage for _, stage in placement.held(rank)]
        for pair in itertools.product(stages, repeat=2):
            together += pair_times(steps_of(costs, *pair), costs.one_worker).whole
            alone += costs.time("F", pair[0]) + costs.time("B", pair[1])
    return together / alone


def _set_limits(problem: Problem) -> bool:
    """Live micro-batches per chunk such that no order of forwards can fill a rank and wait for itself.

    The oldest micro-batch of a lane must always find a slot. Several stages of one lane on a rank: each leaves a slot for every
    later one, where it still has to go. Two lanes: each leaves one for the other.
    """
    everything = problem.microbatches * problem.placement.stages
    share, max_live = problem.placement.share, problem.max_live
    problem.slots = everything if max_live is None else min(everything, int(max_live / share + 1e-9))
    problem.limit = [0] * len(problem.rank)
    for own in problem.chunks:
        for chunk in own:
            later = sum(1 for other in own if problem.placement.lanes == 1 and other > chunk)
            other_lane = problem.placement.lanes > 1
            problem.limit[chunk] = problem.slots - (1 if other_lane else later)
    return min(problem.limit) >= 1
