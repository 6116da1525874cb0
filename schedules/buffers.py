"""Message buffers and events of one rank: which slot a message lies in, and what must have ended before a slot is used again."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

from pipehc.schedules.order import Clock, Order, incoming, join
from pipehc.schedules.program import Edge, Instruction, Message, Post, Run, Send
from pipehc.schedules.schedule import Schedule


def assign_slots(
    schedule: Schedule, row: Sequence[tuple[int, Instruction]], posted: dict[Message, int], spare: int
) -> list[Instruction]:
    """Gives every message of a rank a slot; slots of an edge are used in turn.

    row: (slot of time, instruction), see Facts.earliest. posted: when the peers post the receives of what this rank sends.

    A receive buffer is free after the weight gradient that reads it (the forward, if there is no backward). A send buffer is free
    when the peer has the data, and nobody may wait for that unless the peer surely posts the receive: it is used again if the
    receive is posted in an earlier slot of time, for then every wait points backwards in time and no circle can close. `spare`
    sends of an edge stay in flight in any case.
    """
    last_use = "F" if schedule.forward_only else "W"
    free: dict[Edge, deque[int]] = {}
    receiving: dict[Message, int] = {}
    size: dict[Edge, int] = {}
    flying: dict[Edge, deque[tuple[int, int]]] = {}  # (slot, when it is surely sent and posted)
    result: list[Instruction] = []
    for time, instruction in row:
        if isinstance(instruction, Post):
            message = instruction.message
            edge = message.source, message.target
            slot = free[edge].popleft() if free.get(edge) else _new(size, edge)
            receiving[message] = slot
            instruction = instruction._replace(slot=slot)
        elif isinstance(instruction, Send):
            message = instruction.message
            edge = message.source, message.target
            queue = flying.setdefault(edge, deque())
            reuse = len(queue) >= spare and queue[0][1] < time
            slot = queue.popleft()[0] if reuse else _new(size, edge)
            queue.append((slot, max(time, posted[message])))
            instruction = instruction._replace(slot=slot)
        elif isinstance(instruction, Run) and instruction.action.kind in ("B", last_use):
            for kind in ("F", "I"):
                read = incoming(schedule, instruction.action._replace(kind=kind))  # type: ignore[arg-type]
                if read in receiving:
                    free.setdefault((read.source, read.target), deque()).append(receiving.pop(read))
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
