"""Chrome trace JSON, which Perfetto (ui.perfetto.dev) and chrome://tracing open: a process per rank, a thread per queue."""

from __future__ import annotations

import json
from collections.abc import Sequence

from pipehc.schedules.draw.timeline import Timeline
from pipehc.schedules.spans import Span

_THREADS = ("compute", "wait", "node", "high", "send", "recv")


def chrome_trace(timelines: Sequence[Timeline]) -> str:
    """The trace as JSON text. One unit of cost, or 1 ms if recorded, is shown as 1 ms; arrows lead from sends to receives.

    Several timelines become several groups of processes.
    """
    events: list[dict] = []
    for number, timeline in enumerate(timelines):
        first = sum(other.ranks for other in timelines[:number])
        for rank in range(timeline.ranks):
            name = f"{timeline.title} rank {rank}" if len(timelines) > 1 else f"rank {rank}"
            events.append({"ph": "M", "name": "process_name", "pid": first + rank, "args": {"name": name}})
            events.append({"ph": "M", "name": "process_sort_index", "pid": first + rank, "args": {"sort_index": first + rank}})
        threads = sorted({(span.rank, _thread(span)) for span in timeline.spans})
        for rank, (thread, name) in threads:
            events.append({"ph": "M", "name": "thread_name", "pid": first + rank, "tid": thread, "args": {"name": name}})
            events.append(
                {"ph": "M", "name": "thread_sort_index", "pid": first + rank, "tid": thread, "args": {"sort_index": thread}}
            )
        events += [_event(span, first) for span in timeline.spans]
        events += _arrows(timeline, first, number)
    return json.dumps({"displayTimeUnit": "ms", "traceEvents": events}, separators=(",", ":"))


def _thread(span: Span) -> tuple[int, str]:
    return _THREADS.index(span.queue), span.queue


def _event(span: Span, first: int) -> dict:
    args = {"stage": span.stage, "microbatch": span.microbatch, "lane": span.lane, "pair": span.pair}
    return {
        "ph": "X",
        "name": span.what,
        "cat": span.kind or span.queue,
        "pid": first + span.rank,
        "tid": _thread(span)[0],
        "ts": span.start * 1000,
        "dur": (span.end - span.start) * 1000,
        "args": {key: value for key, value in args.items() if value is not None and value != -1},
    }


def _arrows(timeline: Timeline, first: int, number: int) -> list[dict]:
    """From every send to its receive: the same message on two ranks."""
    sends = {(s.kind, s.lane, s.stage, s.microbatch): s for s in timeline.spans if s.queue == "send"}
    arrows: list[dict] = []
    for span in timeline.spans:
        send = sends.get((span.kind, span.lane, span.stage, span.microbatch)) if span.queue == "recv" else None
        if send is not None:
            common = {"name": span.kind, "cat": "message", "id": f"{number}.{len(arrows)}"}
            for phase, end in (("s", send), ("f", span)):
                when = (end.start if phase == "s" else end.end) * 1000
                arrows.append(common | {"ph": phase, "bp": "e", "pid": first + end.rank, "tid": _thread(end)[0], "ts": when})
    return arrows
