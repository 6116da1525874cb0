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
from pipehc.schedules.program import ComputeQueue, Message, Post, Program, Run, Send, Wait, inputs_first
from pipehc.schedules.schedule import Schedule
from pipehc.schedules.spans import Span


@dataclass(frozen=True)
class SimulationResult:
    """Times in the unit of the costs, activations in units of 1/P of the model. Tuples have one entry per rank.

    makespan: end of the last action. busy: time in actions, on either queue. bubble: time without, average over ranks (divided by
    makespan it is the usual fraction). exposed_comm: stalls for a message that was already computed, but not yet here.
    hidden_recompute: recompute time spent while the gradient that needs it was still on its way. peak_live, peak_bytes:
    activations from the start of F to the end of W. lower_bound: no schedule of this placement and number of micro-batches is
    faster, whatever its memory.
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
    links: dict[tuple[int, int], _Link] = defaultdict(lambda: _Link(costs.link, costs.latency))
    ranks = [_Rank(program, costs, rank, links) for rank in range(schedule.ranks)]
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
        spans=tuple(spans),
    )


class _Link:
    """A directed link. Sends and posts come in the same order; a transfer starts when both are there and the link is free."""

    def __init__(self, hold: float, latency: float) -> None:
        self.hold, self.latency = hold, latency
        self.sends: list[tuple[float, Message]] = []
        self.posts: list[float] = []
        self.starts: list[float] = []  # of the transfers that are known
        self.arrivals: dict[Message, tuple[float, float]] = {}  # message -> (sent, arrived)
        self.free = 0.0
        self.waiting: set[int] = set()  # ranks that need an arrival not yet known

    def settle(self) -> set[int]:
        """Computes the arrivals that are now known. Returns the ranks to look again."""
        while len(self.starts) < min(len(self.sends), len(self.posts)):
            k = len(self.starts)
            sent, message = self.sends[k]
            start = max(sent, self.posts[k], self.free)
            self.starts.append(start)
            self.free = start + self.hold
            self.arrivals[message] = (sent, self.free + self.latency)
        woken, self.waiting = self.waiting, set()
        return woken

    def spans(self, edge: tuple[int, int]) -> list[Span]:
        found = []
        for start, (_, message) in zip(self.starts, self.sends):
            what, end = f"{message.kind} {message.stage}.{message.microbatch}", start + self.hold
            tail = (what, message.kind, message.lane, message.stage, message.microbatch)
            found.append(Span(edge[0], "send", start, end, *tail))
            found.append(Span(edge[1], "recv", start, end + self.latency, *tail))
        return found


class _Rank:
    """One rank's walk through its instructions. `clock[queue]` is when the work issued on it so far ends."""

    def __init__(self, program: Program, costs: Costs, rank: int, links: dict[tuple[int, int], _Link]) -> None:
        self.rank, self.instructions, self.position, self.links = rank, program.instructions[rank], 0, links
        self.leave = costs.pair_leave
        if self.leave is not None:
            self.instructions = tuple(inputs_first(self.instructions))
        schedule = program.schedule
        self.factors = costs.stage_factors(schedule.placement)
        self.microbatch = costs.microbatch_factors(schedule.microbatches)
        self.time = {kind: costs.time(kind) for kind in "FBIWR"}
        self.high, self.pair_scale, self.bytes = costs.high, costs.pair_scale, costs.activation_bytes
        self.pairs = self._pair_lengths()
        self.keeps = not schedule.forward_only
        self.clock: dict[str, float] = {"compute": 0.0, "high": 0.0}
        self.events: dict[int, float | Message] = {}  # the time, or the message with whose arrival it comes
        self.exposed = self.hidden = self.live_bytes = self.peak_bytes = 0.0
        self.live = self.peak_live = 0
        self.recomputed: dict[tuple[int, int, int], tuple[float, float]] = {}  # lane, stage, micro-batch -> (start, end)
        self.awaited: tuple[float, float] | None = None  # (sent, arrived) of what the high-priority queue waits for
        self.spans: list[Span] = []

    def _pair_lengths(self) -> dict[tuple[int, str], float]:
        """(pair, kind) -> how long each action of an interleaved pair lasts, from the end of the one before."""
        lengths: dict[tuple[int, str], float] = {}
        if self.leave is None:
            return lengths
        alone: dict[int, dict[str, float]] = {}
        for i in self.instructions:
            if isinstance(i, Run) and i.pair is not None and i.action.kind != "R":
                alone.setdefault(i.pair, {})[i.action.kind] = self.time[i.action.kind] * self._scale(i)
        for pair, times in alone.items():
            whole = sum(times.values())
            output = max(self.leave[0] * whole, times["F"])
            gradient = min(whole, max(self.leave[1] * whole, output, times["I"])) if "I" in times else whole
            lengths[pair, "F"], lengths[pair, "B"] = output, whole - output
            lengths[pair, "I"], lengths[pair, "W"] = gradient - output, whole - gradient
        return lengths

    def _scale(self, run: Run) -> float:
        _, stage, microbatch, lane = run.action
        factor = self.factors[lane][stage] * self.microbatch[microbatch]
        return factor if run.pair is None else factor * self.pair_scale

    @property
    def busy(self) -> float:
        """Time in which some queue computes."""
        busy = until = 0.0
        for span in sorted((s for s in self.spans if s.queue != "wait"), key=lambda s: s.start):
            busy += max(0.0, span.end - max(until, span.start))
            until = max(until, span.end)
        return busy

    def advance(self) -> set[int]:
        """Goes on until the end, or until it needs a message not sent yet. Returns the ranks that can go on because of it."""
        woken: set[int] = set()
        while self.position < len(self.instructions):
            instruction = self.instructions[self.position]
            if isinstance(instruction, Wait):
                link = self._link(instruction.message)
                if instruction.message not in link.arrivals:
                    link.waiting.add(self.rank)
                    break
                self._wait(instruction, *link.arrivals[instruction.message])
            else:
                after = self._after(instruction.after)
                if after is None:
                    break
                if isinstance(instruction, Run):
                    self._run(instruction, after)
                else:
                    woken |= self._transfer(instruction, after)
            self.position += 1
        return woken

    def _link(self, message: Message) -> _Link:
        return self.links[message.source, message.target]

    def _after(self, events: tuple[int, ...]) -> float | None:
        """When all of the events have come, or None if that is not known yet."""
        latest = 0.0
        for event in events:
            at = self.events[event]
            if isinstance(at, Message):
                link = self._link(at)
                if at not in link.arrivals:
                    link.waiting.add(self.rank)
                    return None
                at = self.events[event] = link.arrivals[at][1]
            latest = max(latest, at)
        return latest

    def _transfer(self, instruction: Post | Send, after: float) -> set[int]:
        link = self._link(instruction.message)
        if isinstance(instruction, Post):
            link.posts.append(max(self.clock["compute"], after))
        else:
            link.sends.append((after if instruction.after else self.clock["compute"], instruction.message))
            if instruction.event is not None:
                self.events[instruction.event] = instruction.message
        return link.settle()

    def _run(self, instruction: Run, after: float) -> None:
        kind, stage, microbatch, lane = instruction.action
        factor, scaled = self.factors[lane][stage] * self.microbatch[microbatch], self._scale(instruction)
        length = self.time[kind] * scaled
        if instruction.pair is not None:
            length = self.pairs.get((instruction.pair, kind), length)
            if self.leave is not None and kind == "F":
                after = max(after, self.clock["high"])  # where the backward's gradient may be waited for
        high = min(self.high * scaled, length)
        end = after
        if instruction.entry == "high":
            end = self._piece(instruction, "high", end, high)
            length -= high
        if instruction.exit == "high":
            end = self._piece(instruction, "compute", end, length - high)
            end = self._piece(instruction, "high", end, high)
        else:
            end = self._piece(instruction, "compute", end, length)
        if instruction.event is not None:
            self.events[instruction.event] = end
        if kind == "F":
            self.live += 1
            self.live_bytes += self.bytes * factor
            self.peak_live, self.peak_bytes = max(self.peak_live, self.live), max(self.peak_bytes, self.live_bytes)
        if kind in "BW" or (kind == "F" and not self.keeps):
            self.live -= 1
            self.live_bytes -= self.bytes * factor
        if kind == "R":
            self.recomputed[lane, stage, microbatch] = end - length, end

    def _piece(self, instruction: Run, queue: ComputeQueue, after: float, length: float) -> float:
        kind, stage, microbatch, lane = instruction.action
        free = self.clock[queue]
        start = max(free, after)
        if queue == "compute" and self.awaited is not None:
            sent, arrived = self.awaited
            self.exposed += max(0.0, min(start, arrived) - max(sent, free))
            self.awaited = None
        end = self.clock[queue] = start + length
        what = str(instruction.action)
        self.spans.append(Span(self.rank, queue, start, end, what, kind, lane, stage, microbatch, instruction.pair))
        return end

    def _wait(self, instruction: Wait, sent: float, arrived: float) -> None:
        message, queue = instruction.message, instruction.queue
        if message.kind == "gradient" and (again := self.recomputed.pop(message[1:4], None)):
            self.hidden += max(0.0, min(again[1], arrived) - again[0])
        free = self.clock[queue]
        self.clock[queue] = max(free, arrived)
        if queue == "high":
            self.awaited = (sent, arrived)
        elif arrived > free:
            self.exposed += arrived - max(sent, free)
            tail = (f"wait {message.kind} {message.stage}.{message.microbatch}", message.kind, message.lane, message.stage)
            self.spans.append(Span(self.rank, "wait", free, arrived, *tail, message.microbatch))
