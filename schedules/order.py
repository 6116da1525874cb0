"""What is known to have happened before what on one rank: the memory that every instruction touches, and a clock per queue.

The compiler asks where an event is missing and adds it; the verifier asks the same of the finished program and reports it.

The tensors of a stage and micro-batch, and who touches them:

    input            written by the receive, or by the stage before if that is on the same rank; read by F, R, I and W
    saved            what the forward keeps: written by F and R, read by R, I and W
    output           written by F, read by the send; or it is the next stage's input
    output gradient  written by the receive, or by the stage after; read by I, and by W (the store may hold it as it is)
    input gradient   written by I, read by the send; or it is the output gradient of the stage before
    deferred         weight gradient work: written by I, read by W
    accumulator      of the stage: W adds to it

Messages live in buffers: slots of an edge, written again and again. Everything else is the stage's own memory, one per micro-batch.

A clock counts, for every queue, the pieces of work that have surely ended. Compute queues run one piece after the other. Transfers
of one edge start and end in order, but may overlap: that one has started says nothing about the end of the one before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from pipehc.schedules.actions import Action
from pipehc.schedules.program import Instruction, Message, Post, Run, Send, Wait
from pipehc.schedules.schedule import Schedule

Location = tuple
Clock = list[int]
COMPUTE, HIGH = 0, 1
_QUEUES = {"compute": COMPUTE, "high": HIGH}


class Piece(NamedTuple):
    """Work on one queue, with what it reads and writes."""

    queue: int
    reads: tuple[Location, ...]
    writes: tuple[Location, ...]


class Use(NamedTuple):
    """A piece of work that touched something."""

    instruction: int
    queue: int
    number: int  # of the piece on its queue


def incoming(schedule: Schedule, action: Action) -> Message | None:
    """The message that `action` needs from another rank, if any."""
    placement, (kind, stage, microbatch, lane) = schedule.placement, action
    if kind == "F" and stage:
        source, name = placement.rank(lane, stage - 1), "activation"
    elif kind in "BI" and stage + 1 < placement.stages:
        source, name = placement.rank(lane, stage + 1), "gradient"
    else:
        return None
    target = placement.rank(lane, stage)
    return None if source == target else Message(name, lane, stage, microbatch, source, target)  # type: ignore[arg-type]


def outgoing(schedule: Schedule, action: Action) -> Message | None:
    """The message that carries the result of `action` to another rank, if any."""
    kind, stage, microbatch, lane = action
    if kind == "F" and stage + 1 < schedule.placement.stages:
        return incoming(schedule, Action("F", stage + 1, microbatch, lane))
    if kind in "BI" and stage:
        return incoming(schedule, Action("I", stage - 1, microbatch, lane))
    return None


class Order:
    """Walks one rank's row. `visit` takes its instructions in order; `row` says which slots and queues they use."""

    def __init__(self, schedule: Schedule, row: Sequence[Instruction]) -> None:
        self._schedule = schedule
        edges = sorted({(type(i) is Send, i.message.source, i.message.target) for i in row if not isinstance(i, Run)})
        self._edge_queue = {edge: HIGH + 1 + k for k, edge in enumerate(edges)}
        size = HIGH + 1 + len(edges)
        # Where messages lie, by kind, lane, stage and micro-batch; what is not in here is handed over on this rank.
        self._buffers: dict[tuple, Location] = {}
        for i in row:
            if isinstance(i, (Post, Send)):
                side = "receive" if isinstance(i, Post) else "send"
                self._buffers[i.message[:4]] = (side, i.message.source, i.message.target, i.slot)
        self._content: dict[Location, tuple] = {}  # buffer -> key of the message in it
        self._now: list[Clock] = [[0] * size for _ in range(size)]  # what each queue knows when its next piece starts
        self._ended: list[Clock] = [[0] * size for _ in range(size)]  # of edge queues: what is known when the last piece has ended
        self._count = [0] * size
        self._written: dict[Location, Use] = {}
        self._read: dict[Location, list[Use]] = {}
        self._posted: dict[Message, Clock] = {}
        self._last: tuple[Instruction | None, list[Piece]] = None, []  # instruction visited last

    def visit(
        self, index: int, instruction: Instruction, after: Sequence[Clock] = ()
    ) -> tuple[Clock, list[tuple[Use | None, Location]]]:
        """Takes in the next instruction, which starts after the given clocks.

        Returns the clock at its end, and the races: earlier uses of what it touches that may still be going on, or None for
        something that it reads and nothing wrote.
        """
        races: list[tuple[Use | None, Location]] = []
        if isinstance(instruction, Wait):
            queue = _QUEUES[instruction.queue]
            if (arrived := self._posted.get(instruction.message)) is not None:
                self._now[queue] = join(self._now[queue], arrived)
            return self._now[queue], races
        self._last = instruction, self.pieces(instruction)
        written, read = self._written, self._read
        end: Clock | None = None
        for queue, reads, writes in self._last[1]:
            start = self._now[queue]
            for clock in after if end is None else (end,):
                start = join(start, clock)
            number = self._count[queue]
            self._count[queue] = number + 1
            use = Use(index, queue, number)
            for location in reads:
                before = written.get(location)
                if before is None or start[before.queue] <= before.number:
                    races.append((before, location))
                read.setdefault(location, []).append(use)
            for location in writes:
                before = written.get(location)
                if before is not None and start[before.queue] <= before.number:
                    races.append((before, location))
                for reader in read.pop(location, ()):
                    if reader.instruction != index and start[reader.queue] <= reader.number:
                        races.append((reader, location))
                written[location] = use
            end = start.copy()
            end[queue] = number + 1
            if queue > HIGH:
                self._now[queue] = start
                end = self._ended[queue] = join(end, self._ended[queue])
            else:
                self._now[queue] = end
        assert end is not None
        key = self._result(instruction.action) if isinstance(instruction, Run) else instruction.message[:4]
        if key in self._buffers:
            self._content[self._buffers[key]] = key
        if isinstance(instruction, Post):
            self._posted[instruction.message] = end
        return end, races

    def delay(self, clock: Clock) -> Clock:
        """The instruction visited last starts after `clock` too. Returns the clock at its end."""
        instruction, pieces = self._last
        for queue, *_ in pieces:
            self._now[queue] = end = join(self._now[queue], clock)
            if queue > HIGH:
                end = self._ended[queue] = join(self._ended[queue], clock)
        if isinstance(instruction, Post):
            self._posted[instruction.message] = end
        return end

    def misread(self, instruction: Instruction) -> Iterator[tuple]:
        """What `instruction` would take from a buffer that holds something else: (kind, lane, stage, micro-batch) of messages."""
        if isinstance(instruction, Run):
            keys = self._inputs(instruction.action)
        else:
            keys = [instruction.message[:4]] if isinstance(instruction, Send) else []
        for key in keys:
            if (buffer := self._buffers.get(key)) is not None and self._content.get(buffer) != key:
                yield key

    def pieces(self, instruction: Post | Send | Run) -> list[Piece]:
        """The work of an instruction, in order; pieces of one action wait for each other."""
        if isinstance(instruction, Run):
            return self._run(instruction)
        message = instruction.message
        queue = self._edge_queue[isinstance(instruction, Send), message.source, message.target]
        buffer = (self._buffers[message[:4]],)
        return [Piece(queue, buffer, ()) if isinstance(instruction, Send) else Piece(queue, (), buffer)]

    def _run(self, run: Run) -> list[Piece]:
        kind, stage, microbatch, lane = run.action
        inputs = tuple(self._buffers.get(key, key) for key in self._inputs(run.action))
        saved, deferred = ("saved", lane, stage, microbatch), ("deferred", lane, stage, microbatch)
        accumulator = ("accumulator", lane, stage)
        # What the action reads and what it keeps; a first or last piece on another queue is taken to touch all of that too.
        reads: tuple[Location, ...]
        keeps: tuple[Location, ...]
        if kind == "F":
            reads, keeps = inputs, (saved,)
        elif kind == "R":
            reads, keeps = (*inputs, saved), (saved,)
        elif kind == "I":
            reads, keeps = (*inputs, saved), (deferred,)
        elif kind == "B":
            reads, keeps = (*inputs, saved), (deferred, accumulator)
        else:
            reads, keeps = (*inputs, saved, deferred), (accumulator,)
        key = self._result(run.action)
        result = () if key is None else (self._buffers.get(key, key),)
        if run.entry == run.exit == "compute":
            return [Piece(COMPUTE, reads, keeps + result)]
        found = [Piece(COMPUTE, reads, keeps if run.exit != "compute" else keeps + result)]
        if run.entry != "compute":
            found.insert(0, Piece(_QUEUES[run.entry], reads, keeps))
        if run.exit != "compute":
            found.append(Piece(_QUEUES[run.exit], reads, keeps + result))
        return found

    def _inputs(self, action: Action) -> list[tuple]:
        """Keys of what the action reads from its neighbours: the input and, on the way back, the output gradient."""
        kind, stage, microbatch, lane = action
        keys: list[tuple] = [("activation", lane, stage, microbatch)] if stage else []
        if kind in "BIW" and stage + 1 < self._schedule.placement.stages:
            keys.append(("gradient", lane, stage, microbatch))
        return keys

    def _result(self, action: Action) -> tuple | None:
        """Key of what the action makes for a neighbour: the input of the next stage, or the output gradient of the one before."""
        kind, stage, microbatch, lane = action
        if kind == "F" and stage + 1 < self._schedule.placement.stages:
            return "activation", lane, stage + 1, microbatch
        return ("gradient", lane, stage - 1, microbatch) if kind in "BI" and stage else None


def join(a: Clock, b: Clock) -> Clock:
    """What is known if both are."""
    return [x if x > y else y for x, y in zip(a, b)]
