"""Which queue made what, and the waits that put its uses after it: on each queue as few as there must be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from pipehc.comm.queues import Queue


class Made(NamedTuple):
    """Where something was made, the event that it is complete after, and the event's number."""

    queue: Queue
    event: Any
    number: int


class Order:
    """The events of one micro-batch in a chain."""

    def __init__(self) -> None:
        self._events = 0
        self._waited: dict[tuple[int, int], int] = {}  # (queue, other queue) -> number of the last event of the other waited for

    def mark(self, queue: Queue) -> Made:
        """All that was issued to `queue` so far."""
        self._events += 1
        return Made(queue, queue.event(), self._events)

    def after(self, queue: Queue, sources: Sequence[Made | None]) -> list[bool]:
        """Orders what is issued to `queue` next after all `sources`; returns which of them were on another queue."""
        crossing = [made is not None and made.queue is not queue for made in sources]
        latest: dict[int, Made] = {}  # a queue is in order: its last event stands for all before it
        for made, crosses in zip(sources, crossing):
            if made is not None and crosses and (id(made.queue) not in latest or latest[id(made.queue)].number < made.number):
                latest[id(made.queue)] = made
        for other, made in latest.items():
            if self._waited.get((id(queue), other), 0) < made.number:
                self._waited[id(queue), other] = made.number
                queue.wait(made.event)
        return crossing
