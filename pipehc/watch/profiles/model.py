"""What the report says of one rank, whatever the trace it comes from. Times in ms."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Loss:
    """Time in which a rank did not compute, or computed what it need not have, and why, in words."""

    ms: float
    why: str


@dataclass(frozen=True)
class Rank:
    """One rank over a step of `total` ms.

    compute: on any compute queue, recomputation included. communication: with at least one message or collective under way, of
    which `exposed` was not hidden by computation. recompute: of which `hidden` cost nothing, as the rank waited for a message
    anyway. high_delay: how long high-priority work was ready, but waited for other work to end. losses: everything that was lost.
    """

    name: str
    total: float
    compute: float
    communication: float
    exposed: float
    recompute: float
    hidden: float
    high_delay: float
    losses: tuple[Loss, ...]

    @property
    def bubble(self) -> float:
        """Neither computing nor waiting for bytes that move."""
        return self.total - self.compute - self.exposed

    def largest(self, count: int = 3) -> list[Loss]:
        """The largest losses, at least 0.1 % of the step each."""
        found = sorted((loss for loss in self.losses if loss.ms >= 0.001 * self.total), key=lambda loss: -loss.ms)
        return found[:count]
