"""The links between ranks, as the simulator has them."""

from __future__ import annotations

from pipehc.schedules.program import Message
from pipehc.schedules.spans import Span


class Link:
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
