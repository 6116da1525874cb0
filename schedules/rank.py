"""One rank of a simulation."""

from __future__ import annotations

from pipehc.schedules.costs import Costs
from pipehc.schedules.links import Link
from pipehc.schedules.program import ComputeQueue, Message, Post, Program, Run, Send, Wait, inputs_first
from pipehc.schedules.spans import Span


class Rank:
    """One rank's walk through its instructions. `clock[queue]` is when the work issued on it so far ends."""

    def __init__(self, program: Program, costs: Costs, rank: int, links: dict[tuple[int, int], Link]) -> None:
        self.rank, self.instructions, self.position, self.links = rank, program.instructions[rank], 0, links
        self.leave = costs.pair_leave
        if self.leave is not None:
            self.instructions = tuple(inputs_first(self.instructions))
        schedule = program.schedule
        self.factors = costs.stage_factors(schedule.placement)
        self.microbatch = costs.microbatch_factors(schedule.microbatches)
        kinds = {i.action.kind for row in program.instructions for i in row if isinstance(i, Run)}
        self.time = {kind: [costs.time(kind, s) for s in range(schedule.placement.stages)] for kind in "FIWBR" if kind in kinds}
        self.sizes = costs.sizes(schedule.placement)
        self.high, self.pair_scale, self.bytes = costs.high, costs.pair_scale, costs.activation_bytes
        self.on: dict[str, ComputeQueue] = {"compute": "compute", "high": "compute" if costs.one_worker else "high"}
        self.pairs = self._pair_lengths()
        self.keeps = not schedule.forward_only
        self.clock: dict[str, float] = {"compute": 0.0, "high": 0.0}
        self.events: dict[int, float | Message] = {}  # the time, or the message with whose arrival it comes
        self.exposed = self.hidden = self.live_bytes = self.peak_bytes = self.high_delay = 0.0
        self.arrived: dict[tuple[int, int, int], float] = {}  # lane, stage, micro-batch -> when the gradient was here
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
                alone.setdefault(i.pair, {})[i.action.kind] = self.time[i.action.kind][i.action.stage] * self._scale(i)
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

    all_to_all = exposed_all_to_all = 0.0  # in what actions take as a whole, they are not told apart

    @property
    def busy(self) -> float:
        """Time in which some queue computes."""
        busy = until = 0.0
        for span in sorted((s for s in self.spans if s.queue in ("compute", "high")), key=lambda s: s.start):
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

    def _link(self, message: Message) -> Link:
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
        scaled = self._scale(instruction)
        length = self.time[kind][stage] * scaled
        if instruction.pair is not None:
            length = self.pairs.get((instruction.pair, kind), length)
            if self.leave is not None and kind == "F":
                after = max(after, self.clock[self.on["high"]])  # where the backward's gradient may be waited for
        high = min(self.high * scaled, length)
        end = after
        if instruction.entry == "high":
            end = self._piece(instruction, "high", max(end, self.arrived.pop((lane, stage, microbatch), 0.0)), high)
            length -= high
        if instruction.exit == "high":
            end = self._piece(instruction, "compute", end, length - high)
            end = self._piece(instruction, "high", end, high)
        else:
            end = self._piece(instruction, "compute", end, length)
        self._account(instruction, end - length, end)

    def _account(self, instruction: Run, start: float, end: float) -> None:
        """Notes that an action ended, and what it keeps or frees."""
        kind, stage, microbatch, lane = instruction.action
        if instruction.event is not None:
            self.events[instruction.event] = end
        kept = self.bytes * self.sizes[lane][stage] * self.microbatch[microbatch]
        if kind == "F":
            self.live += 1
            self.live_bytes += kept
            self.peak_live, self.peak_bytes = max(self.peak_live, self.live), max(self.peak_bytes, self.live_bytes)
        if kind in "BW" or (kind == "F" and not self.keeps):
            self.live -= 1
            self.live_bytes -= kept
        if kind == "R":
            self.recomputed[lane, stage, microbatch] = start, end

    def _piece(self, instruction: Run, queue: ComputeQueue, after: float, length: float) -> float:
        kind, stage, microbatch, lane = instruction.action
        free, turn = self.clock[self.on[queue]], self.clock["compute"]
        start = max(free, after)
        if queue == "compute":
            self._expose(free, start)
        elif length:
            self.high_delay += max(0.0, start - max(after, turn))
        end = self.clock[self.on[queue]] = start + length
        what = str(instruction.action)
        self.spans.append(Span(self.rank, queue, start, end, what, kind, lane, stage, microbatch, instruction.pair))
        return end

    def _expose(self, free: float, start: float) -> tuple[float, float]:
        """The part of the compute queue's idle time `free` to `start` that is due to a message the high-priority queue awaits."""
        if self.awaited is None:
            return start, start
        sent, arrived = self.awaited
        if start >= arrived:
            self.awaited = None
        low, high = max(sent, free), min(start, arrived)
        self.exposed += max(0.0, high - low)
        return low, max(low, high)

    def _wait(self, instruction: Wait, sent: float, arrived: float) -> None:
        message, queue = instruction.message, self.on[instruction.queue]
        if message.kind == "gradient":
            self.arrived[message[1:4]] = arrived
            if again := self.recomputed.pop(message[1:4], None):
                self.hidden += max(0.0, min(again[1], arrived) - again[0])
        free = self.clock[queue]
        self.clock[queue] = max(free, arrived)
        if queue == "high":
            self.awaited = (sent, arrived)
        elif arrived > free:
            self.exposed += arrived - max(sent, free)
            tail = (f"wait {message.kind} {message.stage}.{message.microbatch}", message.kind, message.lane, message.stage)
            self.spans.append(Span(self.rank, "wait", free, arrived, *tail, message.microbatch))
