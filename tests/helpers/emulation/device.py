"""Streams in hardware queues. Work makes progress only while the host asks for it, in an order that the seed chooses."""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import _disable_current_modes

Attempt = Callable[[], bool]
"""Goes on with a piece of work whose turn it is; says whether it has ended."""


class Stuck(RuntimeError):
    """The host waits for work that nothing brings to an end."""


class Event(NamedTuple):
    """The first `count` pieces of work of a stream."""

    stream: Stream
    count: int

    @property
    def done(self) -> bool:
        return self.stream.done >= self.count


class Stream:
    """row: the hardware queue that it shares. issued, done: pieces of work."""

    def __init__(self, name: str, row: int) -> None:
        self.name, self.row, self.issued, self.done = name, row, 0, 0

    def event(self) -> Event:
        return Event(self, self.issued)


@dataclass
class Temper:
    """How a device behaves. hardware_queues: None for one a stream. launches: how much may be issued before the host must wait.
    ahead: how likely it gets on with some work when the host issues a piece. idle: how likely a call of the host waits for an idle
    device. patience_s: how long nothing may move while the host waits."""

    hardware_queues: int | None = None
    launches: int = 1024
    ahead: float = 0.3
    idle: float = 0.0
    patience_s: float = 150.0


class Device:
    """waits: what the host waited for, by reason. faults: of operations that could not read what they were given.

    Work at the front of a hardware queue holds it until it ends, which is the worst that streams may do to each other.
    """

    def __init__(self, seed: int, temper: Temper) -> None:
        self._random, self._temper = random.Random(seed), temper
        self._rows: list[deque[tuple[Stream, str, Attempt]]] = []
        self._pending = 0
        self.active = False
        self.waits: list[str] = []
        self.faults: list[str] = []
        self.before_issue: Callable[[], None] = lambda: None  # the allocator's turn
        self.default = self.stream("compute")
        self.current = self.default
        self._running = False

    def stream(self, name: str) -> Stream:
        most = self._temper.hardware_queues
        if most is None or len(self._rows) < most:
            self._rows.append(deque())
            return Stream(name, len(self._rows) - 1)
        return Stream(name, self._random.randrange(most))

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def issue(self, stream: Stream, what: str, attempt: Attempt) -> None:
        """Puts a piece of work behind all others of its hardware queue."""
        self.before_issue()
        self.put(stream, what, attempt)
        if self._pending > self._temper.launches:
            self.until(lambda: self._pending <= self._temper.launches, "a full launch queue")
        if self._random.random() < self._temper.idle:
            self.idle("an idle device, as it happens")
        elif self._random.random() < self._temper.ahead:
            self._advance(self._random.randrange(1, 12))

    def put(self, stream: Stream, what: str, attempt: Attempt) -> None:
        stream.issued += 1
        self._pending += 1
        self._rows[stream.row].append((stream, what, attempt))

    def wait(self, stream: Stream, event: Event) -> None:
        """What is issued to `stream` from now on starts after the event."""
        if event.stream is not stream and not event.done:
            self.issue(stream, f"waits for {event.stream.name} {event.count}", lambda: event.done)

    def until(self, there: Callable[[], bool], why: str) -> None:
        """The host waits."""
        self.waits.append(why)
        since = time.monotonic()
        while not there():
            if self._advance(16):
                since = time.monotonic()
            elif time.monotonic() - since > self._temper.patience_s:
                heads = "; ".join(f"{row[0][0].name}: {row[0][1]}" for row in self._rows if row)
                raise Stuck(f"the host waits for {why}; nothing moves: {heads or 'nothing is issued'}")
            else:
                time.sleep(1e-4)

    def idle(self, why: str) -> None:
        self.until(lambda: self._pending == 0, why)

    def _advance(self, most: int) -> int:
        """Lets up to `most` pieces end; returns how many did."""
        if self._running:  # a piece of work that frees memory or the like: it issues nothing that must move now
            return 0
        self._running, ended = True, 0
        try:
            with _disable_current_modes(), torch._C._AutoDispatchBelowAutograd():
                ended = self._run(most)
        finally:
            self._running = False
        return ended

    def _run(self, most: int) -> int:
        ended = 0
        rows = [row for row in self._rows if row]
        while rows and ended < most:
            at = self._random.randrange(len(rows))
            stream, _, attempt = rows[at][0]
            if attempt():
                rows[at].popleft()
                stream.done += 1
                self._pending -= 1
                ended += 1
                if rows[at]:
                    continue
            del rows[at]
        return ended
