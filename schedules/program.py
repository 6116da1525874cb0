"""Compiled programs: per rank a list of instructions, with every message, post and wait spelled out.

An instruction is issued by the host in list order. Only `Wait` makes the compute queue wait for another rank; nothing ever waits
for a send before the end (gloo completes a send only when the peer has posted its receive: two ranks that wait on a send hang).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from pipehc.schedules.actions import Action
from pipehc.schedules.schedule import Schedule


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
    """Posts the receive of a message, ahead of its use, in the order in which the peer sends."""

    message: Message


class Wait(NamedTuple):
    """Lets the compute queue wait until a posted message has arrived."""

    message: Message


class Send(NamedTuple):
    """Hands a result, computed before in program order, to the peer; returns at once."""

    message: Message


class Run(NamedTuple):
    """Runs one action. `pair` numbers the overlapped pairs of a rank: two instructions of one pair may be interleaved."""

    action: Action
    pair: int | None = None


Instruction = Post | Wait | Send | Run


@dataclass(frozen=True)
class Program:
    """`instructions[rank]` is what the rank does in one step; `schedule` is where it came from."""

    schedule: Schedule
    instructions: tuple[tuple[Instruction, ...], ...]

    def edges(self) -> list[tuple[int, int]]:
        """Directed (source, target) rank pairs that carry messages, sorted: the same list on every rank."""
        return sorted(
            {(i.message.source, i.message.target) for row in self.instructions for i in row if isinstance(i, Send)}
        )
