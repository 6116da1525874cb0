"""Compiled programs: per rank a list of instructions, with every message, post, wait, queue, buffer and event spelled out.

An instruction is issued by the host in list order and runs on a queue. Queues run side by side: the two compute queues of a rank,
and for every directed edge one queue that sends and one that receives. Within a queue, order is the order of issue; between queues
it is made by `Wait` and by events. An event is a number, unique on its rank: the instruction that has it as its `event` records it
when it ends, and instructions that list it in `after` do not start before that.

A host that runs in step with its only compute queue (CPU) may ignore events whose recorder is a Run. The event of a Send means
that the peer has the data: from then on its buffer may be written again, or its tensor be dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from pipehc.schedules.actions import Action
from pipehc.schedules.schedule import Schedule

ComputeQueue = Literal["compute", "high"]
Edge = tuple[int, int]  # source rank, target rank
Held = tuple[int, int]  # lane, stage
Reduction = tuple[Held, int]


class Message(NamedTuple):
    """One stage message: what `stage` of `lane` needs for `microbatch`, its input or the gradient of its output."""

    kind: Literal["activation", "gradient"]
    lane: int
    stage: int  # the receiving stage
    microbatch: int
    source: int  # rank
    target: int  # rank

    def __str__(self) -> str:
        lane = f"@{self.lane}" if self.lane else ""
        return f"{self.kind} for stage {self.stage}{lane}, micro-batch {self.microbatch}, rank {self.source} -> {self.target}"


class Post(NamedTuple):
    """Posts the receive of a message into buffer `slot` of its edge, ahead of its use, in the order in which the peer sends."""

    message: Message
    slot: int = 0
    after: tuple[int, ...] = ()


class Wait(NamedTuple):
    """Lets a compute queue wait until a posted message has arrived."""

    message: Message
    queue: ComputeQueue = "compute"


class Send(NamedTuple):
    """Hands a result, computed before in program order into send buffer `slot` of its edge, to the peer; returns at once."""

    message: Message
    slot: int = 0
    after: tuple[int, ...] = ()
    event: int | None = None


class Run(NamedTuple):
    """Runs one action. `pair` numbers the overlapped pairs of a rank: two instructions of one pair may be interleaved.

    entry, exit: the queues of the action's first and last piece of work; all between them is on the compute queue.
    """

    action: Action
    pair: int | None = None
    entry: ComputeQueue = "compute"
    exit: ComputeQueue = "compute"
    after: tuple[int, ...] = ()
    event: int | None = None


Instruction = Post | Wait | Send | Run


class Placed(NamedTuple):
    """An instruction, and the cell of its schedule's row that it belongs to."""

    cell: int
    instruction: Instruction


@dataclass(frozen=True)
class Program:
    """`instructions[rank]` is what the rank does in one step; `schedule` is where it came from.

    reductions[rank]: what the rank sums over replicas, in order, and how many instructions it must have issued before (see
    `reductions`); nothing in a program of forwards.
    """

    schedule: Schedule
    instructions: tuple[tuple[Instruction, ...], ...]
    reductions: tuple[tuple[Reduction, ...], ...] = ()

    def edges(self) -> list[Edge]:
        """Directed (source, target) rank pairs that carry messages, sorted: the same list on every rank."""
        return sorted({(i.message.source, i.message.target) for row in self.instructions for i in row if isinstance(i, Send)})

    def receive_slots(self) -> dict[Edge, int]:
        """Receive buffers per edge, on its target."""
        return self._slots(Post)

    def send_slots(self) -> dict[Edge, int]:
        """Send buffers per edge, on its source."""
        return self._slots(Send)

    def _slots(self, kind: type[Post] | type[Send]) -> dict[Edge, int]:
        slots: dict[Edge, int] = {}
        for row in self.instructions:
            for i in row:
                if isinstance(i, kind):
                    edge = i.message.source, i.message.target
                    slots[edge] = max(slots.get(edge, 0), i.slot + 1)
        return slots


class ProgramError(ValueError):
    """A compiled program that could hang or use data that is not there."""


def inputs_first(instructions: Sequence[Instruction]) -> list[Instruction]:
    """A row as it is run where pairs are interleaved: R, then the waits of both halves come before the pair.

    The verifier proves that this ends.
    """
    result = list(instructions)
    runs: dict[int, list[int]] = {}
    for index, instruction in enumerate(result):
        if isinstance(instruction, Run) and instruction.pair is not None:
            runs.setdefault(instruction.pair, []).append(index)
    for indices in runs.values():
        start, stop = indices[0], indices[-1] + 1
        while start and isinstance(result[start - 1], Wait):
            start -= 1
        result[start:stop] = sorted(result[start:stop], key=_place_in_pair)
    return result


def _place_in_pair(instruction: Instruction) -> int:
    if isinstance(instruction, Wait):
        return 2
    return 1 if isinstance(instruction, Run) and instruction.action.kind == "R" else 3
