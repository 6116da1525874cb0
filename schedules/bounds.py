"""Lower bounds on the time of a step: what no schedule of a placement can beat, whatever its order.

Micro-batches may differ in size; the bounds then use the smallest for latencies, and the true sum for work. With costs of nodes, an
action takes a micro-batch the sum of its nodes, but its rank only the part on the compute queue; weight gradients may begin beside
the backward that they belong to, and only those of the nodes after its last turn in a pair surely come after it.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from pipehc.schedules.costs import Costs
from pipehc.schedules.placement import Placement
from pipehc.schedules.schedule import lane_microbatches


class Stage(NamedTuple):
    """One stage of one lane, its earliest and latest use, counted from the start and to the end of the step."""

    rank: int
    share: float
    microbatches: int
    mean: float  # size of a micro-batch, in units of the smallest
    f: float  # on the compute queue, of the smallest micro-batch, like all times here
    b: float
    w: float
    life: float  # from the start of I to the end of W
    weight_head: float  # from the start of I to that of W
    forward_head: float  # earliest start of the first F; the n-th after it is n * forward_pace later
    backward_head: float
    forward_pace: float
    backward_pace: float
    forward_tail: float  # least time after the end of the last F; the n-th before it has n * forward_drain more
    backward_tail: float
    forward_drain: float
    backward_drain: float


def lower_bound(
    placement: Placement, microbatches: int, costs: Costs, *, max_live: float | None = None, forward_only: bool = False
) -> float:
    """No schedule of `placement` with at most `max_live` activations of 1/P of the model on a rank ends earlier.

    The largest of, over ranks: the one-machine bound (Jackson's preemptive schedule of the rank's actions, each with the
    shortest chain of work and messages before and after it); with a cap, the idle time that is left because only `max_live`
    forwards fit before the first backward and only as many weight gradients remain after the last; and Little's law:
    activations x lifetime <= cap x time. Over directed links: all messages, after the first can be there and before what must
    follow the last.
    """
    lanes = stages_of(placement, microbatches, costs, forward_only)
    best = _busiest_link(lanes, costs, forward_only)
    uniform = len(set(costs.microbatch_factors(microbatches))) == 1
    for rank in range(placement.ranks):
        own = [stage for lane in lanes for stage in lane if stage.rank == rank and stage.microbatches]
        if own:
            best = max(best, _work_and_ends(own), _one_machine(own, forward_only) if uniform else 0.0)
            if max_live is not None and not forward_only:
                best = max(best, *_capped(own, max_live))
    return best


def stages_of(placement: Placement, microbatches: int, costs: Costs, forward_only: bool) -> list[list[Stage]]:
    """[lane][stage], with heads and tails along the lane's chain F 0..S-1, I S-1..0, each I followed by its W."""
    scale = min(1.0, costs.pair_scale)
    factors = costs.stage_factors(placement)
    sizes = costs.microbatch_factors(microbatches)
    least = min(sizes) * scale
    lanes = []
    for lane, ranks in enumerate(placement.table):
        own = lane_microbatches(microbatches, placement.lanes, lane)
        mean = sum(sizes[m] for m in own) / max(1, len(own)) / min(sizes)
        count = len(ranks)
        f, b = (_times(costs, kind, factors[lane], least, forward_only) for kind in "FI")
        f_work, b_work, w_work = (_work(costs, kind, factors[lane], least, forward_only) for kind in "FIW")
        tail = [0.0 if forward_only else _weight_tail(costs, s) * x * least for s, x in enumerate(factors[lane])]
        crossing = [ranks[s] != ranks[s + 1] for s in range(count - 1)]
        hop = [(costs.link + costs.latency) * x for x in crossing]
        hold = [costs.link * x for x in crossing]
        # The chain of one micro-batch: 2 * count actions, with hops between them. before[i]: least time until action i can start;
        # pace[i]: the longest that one stage or link before it takes, the least distance of two micro-batches there.
        length = [*f, *reversed(b)]
        back = 0.0 if forward_only else 1.0  # nothing travels back
        hops = [*hop, 0.0, *(back * x for x in reversed(hop))]
        holds = [*hold, 0.0, *(back * x for x in reversed(hold))]
        work = [*f_work, *reversed(b_work)]
        before, pace = [0.0], [0.0]
        for i in range(2 * count - 1):
            before.append(before[-1] + length[i] + hops[i])
            pace.append(max(pace[-1], work[i], holds[i]))
        after, drain = [tail[0]], [0.0]  # built from the end
        for i in reversed(range(2 * count - 1)):
            own_weight = tail[2 * count - 1 - i] if i >= count else 0.0
            after.append(max(own_weight, hops[i] + length[i + 1] + after[-1]))
            drain.append(max(drain[-1], work[i + 1], holds[i]))
        after.reverse()
        drain.reverse()
        lanes.append(
            [
                Stage(
                    ranks[s], placement.share, len(own), mean, f_work[s], b_work[s], w_work[s],
                    max(b[s] + tail[s], b_work[s] + w_work[s]), 0.0 if costs.nodes else b[s],
                    before[s], before[-1 - s], pace[s], pace[-1 - s], after[s], after[-1 - s], drain[s], drain[-1 - s],
                )
                for s in range(count)
            ]
        )  # fmt: skip
    return lanes


def _times(costs: Costs, kind: str, factors: Sequence[float], least: float, forward_only: bool) -> list[float]:
    """Of every stage, from the start of the action to its end."""
    return [0.0 if forward_only and kind != "F" else costs.time(kind, s) * x * least for s, x in enumerate(factors)]


def _work(costs: Costs, kind: str, factors: Sequence[float], least: float, forward_only: bool) -> list[float]:
    """The same on the compute queue."""
    return [0.0 if forward_only and kind != "F" else costs.least_work(kind, s) * x * least for s, x in enumerate(factors)]


def _weight_tail(costs: Costs, stage: int) -> float:
    """The part of W that comes after the I, in pairs too."""
    nodes, backward = costs.nodes_of("W", stage), costs.nodes_of("I", stage)
    if not nodes or not backward:
        return costs.time("W", stage)
    name = backward[-1].name
    return 0.0 if name in costs.computed_at_once(stage) else sum(node.ms for node in nodes if node.name == name)


def _work_and_ends(own: list[Stage]) -> float:
    """All work of a rank, after the first of it can start."""
    return min(s.forward_head for s in own) + sum(s.microbatches * s.mean * (s.f + s.b + s.w) for s in own)


def _one_machine(own: list[Stage], forward_only: bool) -> float:
    """Jackson's preemptive schedule, always the available action with the longest tail: optimal if actions could be cut."""
    work: list[tuple[float, float, float]] = []  # head, tail, length
    for s in own:
        for k in range(s.microbatches):
            later = s.microbatches - 1 - k
            work.append((s.forward_head + k * s.forward_pace, s.forward_tail + later * s.forward_drain, s.f))
            if not forward_only:
                head = s.backward_head + k * s.backward_pace
                work.append((head, s.backward_tail + later * s.backward_drain, s.b))
                work.append((head + s.weight_head, 0.0, s.w))
    work.sort()
    ready: list[tuple[float, float]] = []  # -tail, length left
    now, best = 0.0, 0.0
    for i, (head, tail, length) in enumerate(work):
        now = max(now, head)
        heapq.heappush(ready, (-tail, length))
        until = work[i + 1][0] if i + 1 < len(work) else float("inf")
        while ready and now < until:
            tail_first, left = heapq.heappop(ready)
            if now + left > until:
                heapq.heappush(ready, (tail_first, left - (until - now)))
                now = until
            else:
                now += left
                best = max(best, now - tail_first)
    return best


def _capped(own: list[Stage], max_live: float) -> tuple[float, float]:
    """The idle time that the cap forces at both ends, and Little's law."""
    slots = min(int(max_live / own[0].share + 1e-9), sum(s.microbatches for s in own))
    if slots < 1:
        return float("inf"), float("inf")
    head = min(s.forward_head for s in own)
    first = min(s.backward_head for s in own)  # before it, only forwards run here, at most `slots`
    last = min(s.backward_tail for s in own)  # after the last I, only weight gradients do, at most `slots`
    work = sum(s.microbatches * s.mean * (s.f + s.b + s.w) for s in own)
    size = max(s.mean for s in own) if all(s.mean == 1.0 for s in own) else float("inf")
    before = max(head, first - slots * size * max(s.f for s in own))
    after = max(0.0, last - slots * size * max(s.w for s in own))
    lifetimes = sum(s.microbatches * (s.backward_head - s.forward_head + s.life) for s in own)
    # One F after the other fills the slots, one W after the other empties them.
    ramps = (min(s.f for s in own) + min(s.w for s in own)) * slots * (slots - 1) / 2
    return before + work + after, head + (lifetimes + ramps) / slots


def _busiest_link(lanes: list[list[Stage]], costs: Costs, forward_only: bool) -> float:
    # edge -> (earliest send, least time after the last arrival, messages)
    loads: dict[tuple[int, int], list[tuple[float, float, int]]] = {}
    for lane in lanes:
        for a, b in pairwise(lane):
            if a.rank != b.rank:
                loads.setdefault((a.rank, b.rank), []).append((a.forward_head + a.f, b.f + b.forward_tail, a.microbatches))
                if not forward_only:
                    loads.setdefault((b.rank, a.rank), []).append((b.backward_head + b.b, a.b + a.backward_tail, a.microbatches))
    best = 0.0
    for load in loads.values():
        first, rest, messages = min(x[0] for x in load), min(x[1] for x in load), sum(x[2] for x in load)
        if messages:
            best = max(best, first + messages * costs.link + costs.latency + rest)
    return best
