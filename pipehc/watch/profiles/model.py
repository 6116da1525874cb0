"""What the report says of one rank, whatever the trace it comes from, and what a reader may be told. Times in ms."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Hints:
    """What a GPU trace does not say. high: streams of high priority. communication: names of kernels that communicate, besides
    those that `names` knows."""

    high: frozenset[int] = frozenset()
    communication: re.Pattern[str] | None = None


@dataclass(frozen=True)
class Loss:
    """Time in which a rank did not compute, or computed what it need not have, and why, in words."""

    ms: float
    why: str


@dataclass(frozen=True)
class Messages:
    """Kernels of one name that counted as communication: how many, and how long at least one of them ran."""

    name: str
    count: int
    ms: float


@dataclass(frozen=True)
class Rank:
    """One rank over a step of `total` ms, which is compute + exposed + copies + bubble.

    compute: on any compute queue, recomputation included. communication: with at least one message or collective under way, of
    which `exposed` was not hidden by computation. copies: to and from the host or within the device, and memsets, with neither of
    both beside them. recompute: of which `hidden` cost nothing, as the rank waited for a message anyway. high_delay: how long
    high-priority work was ready, but waited for other work to end; None where one thread does everything. losses: everything that
    was lost. messages: what counted as communication in a GPU trace. notes: what the reader must know of the figures.
    """

    name: str
    total: float
    compute: float
    communication: float
    exposed: float
    copies: float
    recompute: float
    hidden: float
    high_delay: float | None
    losses: tuple[Loss, ...]
    step: int | None = None
    messages: tuple[Messages, ...] | None = None
    notes: tuple[str, ...] = ()

    @property
    def bubble(self) -> float:
        """Neither computing, nor copying, nor waiting for bytes that move."""
        return self.total - self.compute - self.exposed - self.copies

    def largest(self, count: int = 3) -> list[Loss]:
        """The largest losses, at least 0.1 % of the step each."""
        found = sorted((x for x in self.losses if x.ms > 0 and x.ms >= 0.001 * self.total), key=lambda loss: -loss.ms)
        return found[:count]
