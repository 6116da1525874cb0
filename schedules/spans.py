"""Spans: what ran where and when. The simulator writes them, the runtime records the same, and every drawing is made of them."""

from __future__ import annotations

from typing import Literal, NamedTuple

Queue = Literal["compute", "high", "send", "recv", "wait", "node"]


class Span(NamedTuple):
    """One piece of work on one queue of one rank.

    `queue`: compute and high are the two compute queues; send and recv show a message on its link, on the sender's and on the
    receiver's side; wait is a stall of the compute queue; node, which only recorded steps have, shows a part of an action once more
    and in more detail, or an expert all-to-all: sums leave it out. `start` and `end` are in the unit of the costs, or in ms if
    recorded. `what` is the text to show. `kind` is that of an action (F B I W R) or of a message (activation, gradient); `pair`
    numbers the overlapped pairs of a rank. Stages and micro-batches are -1 where a span belongs to none.
    """

    rank: int
    queue: Queue
    start: float
    end: float
    what: str
    kind: str = ""
    lane: int = 0
    stage: int = -1
    microbatch: int = -1
    pair: int | None = None
