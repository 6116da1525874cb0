"""Reads the steps that pipehc records (`trace.steps`)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipehc.schedules.recording import Recording
from pipehc.schedules.spans import Span
from pipehc.watch.profiles.intervals import Interval, common, length, minus, union
from pipehc.watch.profiles.model import Loss, Rank


def read(path: Path, data: Any) -> list[Rank]:
    """One Rank per position in the pipeline. data: the file's JSON. Raises ValueError for a file that is no recorded step."""
    recording = Recording.parse(data, path)
    total = max((span.end for span in recording.spans), default=0.0)
    by_rank: dict[int, list[Span]] = {rank: [] for rank in range(recording.schedule.ranks)}
    for span in recording.spans:
        by_rank[span.rank].append(span)
    # A file of before steps and devices were noted is called what its step was called: its name.
    where = f"{path.stem} " if recording.step is None else recording.where
    one_thread, notes = recording.device in (None, "cpu"), []
    if one_thread:
        assumed = " (assumed: the file does not say of which device it is)" if recording.device is None else ""
        notes.append(
            f"{where.strip()}: recorded on a CPU{assumed}, where one thread does everything: "
            "that high-priority work stands behind other work is no loss there, and is not counted"
        )
    return [_rank(f"{where}rank {rank}", spans, total, recording, one_thread, notes) for rank, spans in by_rank.items()]


def _rank(name: str, spans: list[Span], total: float, recording: Recording, one_thread: bool, notes: Sequence[str]) -> Rank:
    placement = recording.schedule.placement
    busy = union(_times(spans, "compute", "high"))
    arrivals = {_message(span): (span.start, span.end) for span in spans if span.queue == "recv"}
    exposed: list[Interval] = []
    lost: dict[str, float] = defaultdict(float)
    for wait in (span for span in spans if span.queue == "wait"):
        idle = minus([(wait.start, wait.end)], busy) if wait.end > wait.start else []
        # Up to the arrival; what comes after it is the host's own delay.
        moving = common(idle, union([arrivals.get(_message(wait), (0.0, 0.0))]))
        exposed += moving
        step = 1 if wait.kind == "gradient" else -1
        source = placement.rank(wait.lane, wait.stage + step)
        lost[f"{wait.kind}s from rank {source} were still on the link"] += length(moving)
        lost[f"rank {source} had not sent the {wait.kind}s that were needed"] += length(minus(idle, union(moving)))
    waits = union(_times(spans, "wait"))
    idle = minus(minus([(0.0, total)], busy), waits)
    first, last = (busy[0][0], busy[-1][1]) if busy else (total, total)
    lost["the step had begun, but nothing was there to compute yet"] += length(common(idle, [(0.0, first)]))
    lost["its own work was done, other ranks were still computing"] += length(common(idle, [(last, total)]))
    lost["between actions: the executor itself, and sends"] += length(common(idle, [(first, last)]))

    recompute, hidden = 0.0, 0.0
    for span in (span for span in spans if span.kind == "R" and span.queue == "compute"):
        recompute += span.end - span.start
        arrived = arrivals.get(("gradient", span.lane, span.stage, span.microbatch), (0.0, 0.0))[1]
        hidden += max(0.0, min(span.end, arrived) - span.start)
    lost["recomputation ran though nothing had to be waited for"] = recompute - hidden
    delay = None if one_thread else _high_delay(spans, arrivals)
    lost["high-priority work was ready, but stood behind other work"] = delay or 0.0
    losses = tuple(Loss(ms, why) for why, ms in lost.items())
    messages = union(_times(spans, "send", "recv"))
    return Rank(
        name=name,
        total=total,
        compute=length(busy),
        communication=length(messages),
        exposed=length(union(exposed)),
        copies=0.0,
        recompute=recompute,
        hidden=hidden,
        high_delay=delay,
        losses=losses,
        step=recording.step,
        notes=tuple(notes),
    )


def _high_delay(spans: list[Span], arrivals: dict[tuple, Interval]) -> float:
    """The last piece of a forward is ready when the piece before it ends, the first of a backward when its gradient is there."""
    ends = {_message(span): span.end for span in spans if span.queue == "compute"}
    waiting: list[Interval] = []
    for span in (span for span in spans if span.queue == "high"):
        ready = ends.get(_message(span)) if span.kind == "F" else None
        if span.kind in ("B", "I"):
            arrival = arrivals.get(("gradient", span.lane, span.stage, span.microbatch))
            ready = None if arrival is None else arrival[1]
        if ready is not None:
            waiting.append((ready, span.start))
    return length(union(waiting))


def _times(spans: list[Span], *queues: str) -> list[Interval]:
    return [(span.start, span.end) for span in spans if span.queue in queues]


def _message(span: Span) -> tuple[str, int, int, int]:
    return span.kind, span.lane, span.stage, span.microbatch
