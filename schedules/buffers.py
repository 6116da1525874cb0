"""Message buffers and events of one rank: which slot a message lies in, and what must have ended before a slot is used again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Sequence

from pipehc.schedules.dependence import Dependence
from pipehc.schedules.order import Clock, Order, incoming, join
from pipehc.schedules.program import Edge, Instruction, Message, Placed, Post, Run, Send
from pipehc.schedules.schedule import Schedule


def assign_slots(
    schedule: Schedule, rows: Sequence[Sequence[Placed]], reuse: Reuse, spare: int, most: int | None = None
) -> list[list[Instruction]]:
    """Gives every message of every rank a slot; slots of an edge are used in turn.

    A receive buffer is free after the weight gradient that reads it (the forward, if there is no backward). A send buffer is free
    when the peer has the data; `spare` sends of an edge stay in flight in any case.

    Whoever uses a buffer again waits for that. reuse: where that is safe; for a send where there are `most` already it is safe in
    any case.
    """
    return [_slots_of(schedule, rank, row, reuse, spare, most) for rank, row in enumerate(rows)]


class Reuse(ABC):
    """Which buffers may be used again."""

    def received(self, rank: int, freed: int, message: Message) -> bool:
        """Whether the receive of `message` may wait for the cell `freed` of its rank."""
        return True

    @abstractmethod
    def sent(self, rank: int, cell: int, message: Message) -> bool:
        """Whether `cell` of `rank` may wait until the peer has `message`."""


class ReuseByTime(Reuse):
    """A send buffer if its message is posted in an earlier slot of time: waits that point backwards in time close no circle."""

    def __init__(self, rows: Sequence[Sequence[Placed]], earliest: Sequence[Sequence[int]]) -> None:
        self._earliest = earliest
        self._posted = {i.message: earliest[rank][cell] for rank, row in enumerate(rows) for cell, i in row if isinstance(i, Post)}
        self._sent = {i.message: earliest[rank][cell] for rank, row in enumerate(rows) for cell, i in row if isinstance(i, Send)}

    def sent(self, rank: int, cell: int, message: Message) -> bool:
        return max(self._posted[message], self._sent[message]) < self._earliest[rank][cell]


class ReuseByDependence(Reuse):
    """Where nobody comes to depend on more than before: a receive buffer if what frees it depends on nothing that the sender issues
    after the message, a send buffer if its next user depends on the peer's post anyway."""

    def __init__(self, rows: Sequence[Sequence[Placed]], dependence: Dependence) -> None:
        self._dependence = dependence
        self._posted = {i.message: cell for row in rows for cell, i in row if isinstance(i, Post)}

    def received(self, rank: int, freed: int, message: Message) -> bool:
        # Of the cell that makes the message, too, a part may come after it.
        return self._dependence.last[rank][freed][message.source] < self._dependence.made[message]

    def sent(self, rank: int, cell: int, message: Message) -> bool:
        return self._dependence.last[rank][cell][message.target] >= self._posted[message]


def _slots_of(
    schedule: Schedule, rank: int, row: Sequence[Placed], reuse: Reuse, spare: int, most: int | None
) -> list[Instruction]:
    last_use = "F" if schedule.forward_only else "W"
    free: dict[Edge, deque[tuple[int, int]]] = {}  # slot, the cell that freed it
    receiving: dict[Message, int] = {}
    size: dict[Edge, int] = {}
    flying: dict[Edge, deque[tuple[int, Message]]] = {}
    result: list[Instruction] = []
    for cell, instruction in row:
        if isinstance(instruction, Post):
            message = instruction.message
            edge = message.source, message.target
            again = bool(free.get(edge)) and reuse.received(rank, free[edge][0][1], message)
            slot = free[edge].popleft()[0] if again else _new(size, edge)
            receiving[message] = slot
            instruction = instruction._replace(slot=slot)
        elif isinstance(instruction, Send):
            message = instruction.message
            edge = message.source, message.target
            queue = flying.setdefault(edge, deque())
            full = most is not None and len(queue) >= most
            again = len(queue) >= spare and (full or reuse.sent(rank, cell, queue[0][1]))
            slot = queue.popleft()[0] if again else _new(size, edge)
            queue.append((slot, message))
            instruction = instruction._replace(slot=slot)
        elif isinstance(instruction, Run) and instruction.action.kind in ("B", last_use):
            for kind in ("F", "I"):
                read = incoming(schedule, instruction.action._replace(kind=kind))  # type: ignore[arg-type]
                if read in receiving:
                    free.setdefault((read.source, read.target), deque()).append((receiving.pop(read), cell))
        result.append(instruction)
    return result


def add_events(schedule: Schedule, row: Sequence[Instruction]) -> tuple[Instruction, ...]:
    """Adds an event wherever two uses of a tensor, one of them a write, are not ordered already: no more than that."""
    order = Order(schedule, row)
    ends: list[Clock] = []
    numbers: dict[int, int] = {}  # instruction -> its event
    after: dict[int, tuple[int, ...]] = {}
    for index, instruction in enumerate(row):
        end, races = order.visit(index, instruction)
        known: Clock | None = None
        for use in sorted({use for use, _ in races if use is not None}, reverse=True):
            # The latest come first: after them, an earlier one may be known to have ended.
            if known is None or known[use.queue] <= use.number:
                known = ends[use.instruction] if known is None else join(known, ends[use.instruction])
                after[index] = (*after.get(index, ()), numbers.setdefault(use.instruction, len(numbers)))
        ends.append(end if known is None else order.delay(known))
    return tuple(_with_events(instruction, after.get(i, ()), numbers.get(i)) for i, instruction in enumerate(row))


def _with_events(instruction: Instruction, after: Iterable[int], event: int | None) -> Instruction:
    if isinstance(instruction, Post) and after:
        return instruction._replace(after=tuple(after))
    if isinstance(instruction, (Run, Send)) and (after or event is not None):
        return instruction._replace(after=tuple(after), event=event)
    return instruction


def _new(size: dict[Edge, int], edge: Edge) -> int:
    size[edge] = size.get(edge, 0) + 1
    return size[edge] - 1
