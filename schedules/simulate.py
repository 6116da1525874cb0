"""Simulates a compiled program: discrete events over the queues of every rank and the links between them.

The model. Each rank issues its instructions in order. Runs occupy a compute queue; a wait stalls it until its message has
arrived. A message is sent when the result is there, and starts on its directed link when the peer has posted the receive and
the link is free: links are FIFOs, held for `link` a message, and `latency` passes after that. A receive counts as posted when
the compute queue gets there, as on a host that runs in step with its device.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from pipehc.schedules.bounds import lower_bound
from pipehc.schedules.compile import compile
from pipehc.schedules.costs import Costs
from pipehc.schedules.program import Message, Post, Program, Run, Send, Wait
from pipehc.schedules.schedule import Schedule
from pipehc.schedules.spans import Span


@dataclass(frozen=True)
class SimulationResult:
    """Times in the unit of the costs, activations in units of 1/P of the model. Tuples have one entry per rank.

    makespan: end of the last action. busy: time in actions. bubble: time without action, average over ranks (divided by makespan
    it is the usual fraction). exposed_comm: stalls for a message that was already computed, but not yet here. hidden_recompute:
    recompute time spent while the gradient that needs it was still on its way. peak_live, peak_bytes: activations from the start
    of F to the end of W. lower_bound: no schedule of this placement and number of micro-batches is faster, whatever its memory.
    """

    makespan: float
    bubble: float
    busy: tuple[float, ...]
    peak_live: tuple[float, ...]
    peak_bytes: tuple[float, ...]
    exposed_comm: tuple[float, ...]
    hidden_recompute: tuple[float, ...]
    lower_bound: float
    spans: tuple[Span, ...] = field(repr=False)


def simulate(what: Program | Schedule, costs: Costs) -> SimulationResult:
    """Runs a program, or a schedule as `compile` lowers it, under `costs`.

    Raises ValueError if the weights in `costs` do not fit, ScheduleError if a schedule cannot run.
    """
    program = compile(what) if isinstance(what, Schedule) else what
    schedule = program.schedule
    ranks = [_Rank(program, costs, rank) for rank in range(schedule.ranks)]
    links: dict[tuple[int, int], _Link] = defaultdict(lambda: _Link(costs.link, costs.latency))
    runnable = list(range(len(ranks)))
    while runnable:
        runnable.extend(ranks[runnable.pop()].advance(links))
    for rank in ranks:
        assert rank.position == len(rank.instructions), "a verified program cannot block"
    spans = [span for rank in ranks for span in rank.spans]
    for edge, link in links.items():
        spans += link.spans(edge)
    makespan = max(rank.end for rank in ranks)
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
        spans=tuple(spans),
    )


class _Link:
    """A directed link. Sends and posts come in the same order, each in time order; a transfer starts when both are there."""

    def __init__(self, hold: float, latency: float) -> None:
        self.hold, self.latency = hold, latency
        self.sends: list[tuple[float, Message]] = []
        self.posts: list[float] = []
        self.starts: list[float] = []  # of the transfers that are known
        self.arrivals: dict[Message, tuple[float, float]] = {}  # message -> (sent, arrived)
        self.free = 0.0
        self.waiting: int | None = None  # rank that waits for an arrival not yet known

    def settle(self) -> None:
        while len(self.starts) < min(len(self.sends), len(self.posts)):
            k = len(self.starts)
            sent, message = self.sends[k]
            start = max(sent, self.posts[k], self.free)
            self.starts.append(start)
            self.free = start + self.hold
            self.arrivals[message] = (sent, self.free + self.latency)

    def spans(self, edge: tuple[int, int]) -> list[Span]:
        found = []
        for start, (_, message) in zip(self.starts, self.sends):
            what, end = f"{message.kind} {message.stage}.{message.microbatch}", start + self.hold
            tail = (what, message.kind, message.lane, message.stage, message.microbatch)
            found.append(Span(edge[0], "send", start, end, *tail))
            found.append(Span(edge[1], "recv", start, end + self.latency, *tail))
        return found


class _Rank:
    """One rank's walk through its instructions."""

    def __init__(self, program: Program, costs: Costs, rank: int) -> None:
        self.rank, self.instructions, self.position = rank, program.instructions[rank], 0
        schedule = program.schedule
        self.factors = costs.stage_factors(schedule.placement)
        self.microbatch = costs.microbatch_factors(schedule.microbatches)
        self.time = {kind: costs.time(kind) for kind in "FBIWR"}
        self.pair_scale, self.bytes = costs.pair_scale, costs.activation_bytes
        self.keeps = not schedule.forward_only
        self.end = self.busy = self.exposed = self.hidden = 0.0
        self.live = self.peak_live = 0
        self.live_bytes = self.peak_bytes = 0.0
        self.recomputed: list[tuple[float, float]] = []  # since the last wait: (start, end)
        self.spans: list[Span] = []

    def advance(self, links: dict[tuple[int, int], _Link]) -> list[int]:
        """Goes on until the end or a wait whose message is not sent yet. Returns the ranks that can go on because of it."""
        woken: list[int] = []
        while self.position < len(self.instructions):
            instruction = self.instructions[self.position]
            if isinstance(instruction, Run):
                self._run(instruction)
            else:
                message = instruction.message
                link = links[message.source, message.target]
                if isinstance(instruction, Wait):
                    if message not in link.arrivals:
                        link.waiting = self.rank
                        break
                    self._wait(message, *link.arrivals[message])
                else:
                    if isinstance(instruction, Post):
                        link.posts.append(self.end)
                    else:
                        link.sends.append((self.end, message))
                    link.settle()
                    if link.waiting is not None and isinstance(instruction, Send):
                        woken.append(link.waiting)
                        link.waiting = None
            self.position += 1
        return woken

    def _run(self, instruction: Run) -> None:
        kind, stage, microbatch, lane = instruction.action
        factor = self.factors[lane][stage] * self.microbatch[microbatch]
        length = self.time[kind] * factor * (1.0 if instruction.pair is None else self.pair_scale)
        start, self.end = self.end, self.end + length
        self.busy += length
        self.spans.append(
            Span(self.rank, "compute", start, self.end, str(instruction.action), kind, lane, stage, microbatch, instruction.pair)
        )
        if kind == "F":
            self.live += 1
            self.live_bytes += self.bytes * factor
            self.peak_live, self.peak_bytes = max(self.peak_live, self.live), max(self.peak_bytes, self.live_bytes)
        if kind in "BW" or (kind == "F" and not self.keeps):
            self.live -= 1
            self.live_bytes -= self.bytes * factor
        if kind == "R":
            self.recomputed.append((start, self.end))

    def _wait(self, message: Message, sent: float, arrived: float) -> None:
        if message.kind == "gradient":
            self.hidden += sum(max(0.0, min(end, arrived) - start) for start, end in self.recomputed)
            self.recomputed.clear()
        if arrived > self.end:
            self.exposed += arrived - max(sent, self.end)
            tail = (f"wait {message.kind} {message.stage}.{message.microbatch}", message.kind, message.lane, message.stage)
            self.spans.append(Span(self.rank, "wait", self.end, arrived, *tail, message.microbatch))
            self.end = arrived
