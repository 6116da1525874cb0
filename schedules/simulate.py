"""Simulates a compiled program: discrete events over the queues of every rank and the links between them.

The model. Each rank issues its instructions in order. Runs occupy the compute queue, their first or last piece the high-priority
queue if they say so; a wait stalls its queue until the message has arrived. A message is sent when the result is there, and
starts on its directed link when the peer has posted the receive and the link is free: links are FIFOs, held for `link` a message,
and `latency` passes after that. A receive counts as posted when the compute queue gets there, as on a host that runs in step
with its device. What an instruction lists in `after` is waited for. With `Costs.pair_leave` pairs are one piece of work, from
which messages leave on the way.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from pipehc.schedules.bounds import lower_bound
from pipehc.schedules.compile import compile
from pipehc.schedules.costs import Costs
from pipehc.schedules.links import Link
from pipehc.schedules.node_rank import NodeRank
from pipehc.schedules.program import Program
from pipehc.schedules.rank import Rank
from pipehc.schedules.schedule import Schedule
from pipehc.schedules.spans import Span


@dataclass(frozen=True)
class SimulationResult:
    """Times in the unit of the costs, activations in units of 1/P of the model. Tuples have one entry per rank.

    makespan: end of the last action. busy: time in actions, on either queue. bubble: time without, average over ranks (divided by
    makespan it is the usual fraction). exposed_comm: stalls for a message that was already computed, but not yet here.
    hidden_recompute: recompute time spent while the gradient that needs it was still on its way. peak_live, peak_bytes:
    activations from the start of F to the end of W. lower_bound: no schedule of this placement and number of micro-batches is
    faster, whatever its memory. high_delay: how long high-priority work was ready, but stood behind other work of its queue.
    all_to_all, exposed_all_to_all: time in all-to-alls, and the part of it in which nothing was computed, also if within an action
    (which is busy then); 0 without costs of nodes.
    """

    makespan: float
    bubble: float
    busy: tuple[float, ...]
    peak_live: tuple[float, ...]
    peak_bytes: tuple[float, ...]
    exposed_comm: tuple[float, ...]
    hidden_recompute: tuple[float, ...]
    lower_bound: float
    high_delay: tuple[float, ...]
    all_to_all: tuple[float, ...]
    exposed_all_to_all: tuple[float, ...]
    spans: tuple[Span, ...] = field(repr=False)


def simulate(what: Program | Schedule, costs: Costs) -> SimulationResult:
    """Runs a program, or a schedule as `compile` lowers it, under `costs`.

    Raises ValueError if weights, stages or nodes in `costs` do not fit, ScheduleError if a schedule cannot run.
    """
    program = compile(what) if isinstance(what, Schedule) else what
    schedule = program.schedule
    links: dict[tuple[int, int], Link] = defaultdict(lambda: Link(costs.link, costs.latency))
    kind = NodeRank if costs.nodes else Rank
    ranks = [kind(program, costs, rank, links) for rank in range(schedule.ranks)]
    runnable = list(range(len(ranks)))
    while runnable:
        runnable.extend(ranks[runnable.pop()].advance())
    for rank in ranks:
        assert rank.position == len(rank.instructions), "a verified program cannot block"
    spans = [span for rank in ranks for span in rank.spans]
    for edge, link in links.items():
        spans += link.spans(edge)
    makespan = max(max(rank.clock.values()) for rank in ranks)
    busy = tuple(rank.busy for rank in ranks)
    return SimulationResult(
        makespan=makespan,
        bubble=makespan - sum(busy) / len(busy),
        busy=busy,
        peak_live=tuple(rank.peak_live * schedule.placement.share for rank in ranks),
        peak_bytes=tuple(rank.peak_bytes for rank in ranks),
        exposed_comm=tuple(rank.exposed for rank in ranks),
        hidden_recompute=tuple(rank.hidden for rank in ranks),
        lower_bound=lower_bound(schedule.placement, schedule.microbatches, costs, forward_only=schedule.forward_only),
        high_delay=tuple(rank.high_delay for rank in ranks),
        all_to_all=tuple(rank.all_to_all for rank in ranks),
        exposed_all_to_all=tuple(rank.exposed_all_to_all for rank in ranks),
        spans=tuple(spans),
    )
