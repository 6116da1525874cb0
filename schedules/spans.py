"""Spans: what ran where and when. The simulator writes them, the runtime records the same, and every drawing is made of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

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


def checked(fields: Sequence[Any], ranks: int, lanes: int, stages: int) -> Span:
    """The span of a file, in which anything may stand. Raises ValueError or TypeError, naming what cannot be."""
    span = Span(*fields)
    numbers = [span.rank, span.lane, span.stage, span.microbatch, *([] if span.pair is None else [span.pair])]
    if not all(type(x) is int for x in numbers) or not (
        0 <= span.rank < ranks and 0 <= span.lane < lanes and -1 <= span.stage < stages
    ):
        raise ValueError(f"a span of rank, lane, stage, micro-batch and pair {numbers}")
    if span.queue not in get_args(Queue) or not isinstance(span.what, str) or not isinstance(span.kind, str):
        raise ValueError(f"a span of kind {span.kind!r} on queue {span.queue!r}")
    if not all(type(x) in (int, float) and math.isfinite(x) for x in span[2:4]) or not 0 <= span.start <= span.end:
        raise ValueError(f"a span from {span.start!r} to {span.end!r}")
    if span.queue in ("send", "recv", "wait"):
        source = span.stage + {"activation": -1, "gradient": 1}.get(span.kind, stages)
        if not 0 <= source < stages or span.stage < 0:
            raise ValueError(f"a {span.queue} of kind {span.kind!r} for stage {span.stage} of {stages}")
    return span
