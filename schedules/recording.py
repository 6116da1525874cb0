"""Recorded steps as JSON files: the spans that the runtime measured, with the schedule that it ran, to compare the two."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

from pipehc.schedules.actions import parse
from pipehc.schedules.compile import compile
from pipehc.schedules.costs import Costs
from pipehc.schedules.interchange import placement_of
from pipehc.schedules.placement import Placement
from pipehc.schedules.program import Program
from pipehc.schedules.schedule import Schedule
from pipehc.schedules.spans import Span, checked

_FORMAT = 1
_KEYS: dict[str, Any] = {"title": str, "recompute": bool, "step": int | None, "pipeline": int, "device": str | None}
_SCHEDULE_KEYS: dict[str, Any] = {"name": str, "microbatches": int, "forward_only": bool}


@dataclass(frozen=True)
class Recording:
    """One step of one pipeline. Spans are in ms from the start of the step; `rank` in them is the position in the pipeline.

    recompute: whether the program had an R for every backward. step, pipeline: which they were. device: what computed, "cpu" or
    "cuda"; on a CPU one thread does everything. Files of before these were noted have None for step and device, and pipeline 0.
    """

    title: str
    schedule: Schedule
    recompute: bool
    spans: tuple[Span, ...]
    step: int | None = None
    pipeline: int = 0
    device: str | None = None

    @property
    def where(self) -> str:
        """What stands before a rank to tell it from those of other recordings: "step 6 pipeline 1 ", or nothing."""
        return ("" if self.step is None else f"step {self.step} ") + (f"pipeline {self.pipeline} " if self.pipeline else "")

    def program(self) -> Program:
        return compile(self.schedule, recompute=self.recompute)

    def save(self, path: str | PathLike[str]) -> None:
        """Writes the file, whole or not at all."""
        schedule = self.schedule
        data = {
            "format": _FORMAT,
            "title": self.title,
            "unit": "ms",
            "step": self.step,
            "pipeline": self.pipeline,
            "device": self.device,
            "recompute": self.recompute,
            "schedule": {"name": schedule.name, "microbatches": schedule.microbatches, "forward_only": schedule.forward_only},
            "rows": [[str(cell) for cell in row] for row in schedule.rows],
            "span": Span._fields,
            "spans": [[round(x, 4) if isinstance(x, float) else x for x in span] for span in self.spans],
        }
        path = Path(path)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(data, separators=(",", ":")), encoding="utf-8")
        partial.rename(path)

    @staticmethod
    def load(path: str | PathLike[str]) -> Recording:
        """Reads what `save` wrote. Raises ValueError, naming the file, for anything else."""
        try:
            data = json.loads(Path(path).read_bytes())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: is no recorded step, since it is no JSON: {error}") from None
        return Recording.parse(data, path)

    @staticmethod
    def parse(data: Any, path: str | PathLike[str]) -> Recording:
        """The recording in the JSON of a file. Raises ValueError, naming the file, if it is none."""
        if not isinstance(data, dict) or not {"format", "span", "spans", "rows", "schedule"} <= set(data):
            raise ValueError(f"{path}: is no recorded step")
        try:
            if data["format"] != _FORMAT or tuple(data["span"]) != Span._fields:
                raise ValueError(f"format {data['format']} with spans of {data['span']}")
            rows = tuple(tuple(parse(cell) for cell in row) for row in data["rows"])
            placement = placement_of(rows, path)
            schedule = Schedule(placement=placement, rows=rows, **data["schedule"])
            spans = tuple(checked(span, len(rows), placement.lanes, placement.stages) for span in data["spans"])
            more = {key: data[key] for key in _KEYS if key in data}
            for key, value in (more | data["schedule"]).items():
                if not isinstance(value, (_KEYS | _SCHEDULE_KEYS)[key]):
                    raise ValueError(f"{key} = {value!r}")
            return Recording(schedule=schedule, spans=spans, **more)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: is no recorded step of this version: {error}") from None


def measured_costs(recording: Recording) -> Costs:
    """What the actions and messages of a recorded step took, for a simulation of the same step.

    Stages differ by one factor each, the same for all their actions. An action takes the mean over its micro-batches outside of
    pairs, unless it only ran in pairs; a message the median of its time on the link. Pairs that were interleaved say how much of
    their halves' time they take, and when their messages leave. Raises ValueError if a stage or half a pair is missing.
    """
    placement = recording.schedule.placement
    alone: dict[tuple[str, int], list[float]] = defaultdict(list)
    paired: dict[tuple[str, int], list[float]] = defaultdict(list)
    for span in recording.spans:
        if span.queue == "compute":
            in_pair = span.pair is not None and span.kind != "R"
            (paired if in_pair else alone)[span.kind, span.stage].append(span.end - span.start)
    times = paired | alone
    stages = range(placement.stages)
    missing = next((s for s in stages if ("F", s) not in times), None)
    if missing is not None:
        raise ValueError(f"{recording.title}: holds no forward of stage {missing}: this recording is not whole")
    time = {(kind, s): mean(times[kind, s]) if (kind, s) in times else 0.0 for kind in "FIWBR" for s in stages}
    split = [s for s in stages if ("I", s) in times]
    # Where there are both split and full backwards, the split ones tell what each part takes.
    backward = [time["I", s] + time["W", s] if s in split else time["B", s] for s in stages]
    halves = sum(time["I", s] for s in split), sum(time["W", s] for s in split)
    f, b = mean(time["F", s] for s in stages) / placement.share, mean(backward) / placement.share
    share = halves[0] / sum(halves) if sum(halves) else 1.0
    whole = [time["F", s] + backward[s] for s in stages]
    pairs = _Pairs.of(recording.spans)
    gain = None if pairs is None else pairs.whole / sum(time["F", i] + backward[j] for i, j in pairs.stages)
    return Costs(
        f=f,
        b=b * share,
        w=b * (1 - share),
        r=mean(time["R", s] for s in stages) / placement.share,
        pair=None if gain is None else gain * (f + b),
        pair_leave=None if pairs is None else (pairs.output, max(pairs.output, pairs.gradient)),
        link=median([s.end - s.start for s in recording.spans if s.queue == "recv"] or [0.0]),
        weights=tuple(stage / mean(whole) for stage in whole) if any(whole) else None,
    )


class _Pairs(NamedTuple):
    """Interleaved pairs: all of their time, and which parts of it had passed when the output and the input gradient were there."""

    whole: float
    output: float
    gradient: float
    stages: list[tuple[int, int]]  # of the forward and of the backward

    @staticmethod
    def of(spans: Sequence[Span]) -> _Pairs | None:
        """None if pairs were not interleaved: then backwards waited for their gradients after the forwards of their pairs."""
        found: dict[tuple[int, int], dict[str, Span]] = defaultdict(dict)
        waits = defaultdict(list)
        for span in spans:
            if span.queue == "compute" and span.pair is not None and span.kind != "R":
                found[span.rank, span.pair][span.kind] = span
            if span.queue == "wait":
                waits[span.rank].append(span.start)
        lengths: list[dict[str, float]] = []
        stages = []
        for (rank, pair), parts in found.items():
            if "F" not in parts or not parts.keys() & {"I", "B"}:
                raise ValueError(
                    f"pair {pair} of rank {rank} has no {'backward' if 'F' in parts else 'forward'}: not a whole recording"
                )
            ends = min(s.start for s in parts.values()), max(s.end for s in parts.values())
            if any(ends[0] < start < ends[1] for start in waits[rank]):
                return None
            lengths.append({kind: span.end - span.start for kind, span in parts.items()})
            stages.append((parts["F"].stage, next(parts[kind].stage for kind in "IB" if kind in parts)))
        whole = sum(sum(parts.values()) for parts in lengths)
        split = [parts for parts in lengths if "I" in parts]
        before_w = sum(parts["F"] + parts["I"] for parts in split) / sum(sum(parts.values()) for parts in split) if split else 1.0
        return _Pairs(whole, sum(parts["F"] for parts in lengths) / whole, before_w, stages) if whole else None


def link_spans(sent: Iterable[Span], received: Iterable[Span], placement: Placement) -> list[Span]:
    """Times on the link, from times in the ranks' hands.

    sent: from the call that sends to the end of the transfer, as the sender sees it. received: from the post of the receive to
    its end. Bytes move once both are there and the link is free of the messages before: the rest of both spans is waiting.
    """
    posts = {_message(span): span for span in received}
    free: dict[tuple[int, int], float] = {}
    spans: list[Span] = []
    for send in sorted(sent, key=lambda span: span.start):
        post = posts.get(_message(send))
        if post is None:
            continue
        edge = send.rank, placement.rank(send.lane, send.stage)
        start = min(max(send.start, post.start, free.get(edge, 0.0)), post.end)
        free[edge] = post.end
        spans += [send._replace(start=start, end=max(start, send.end)), post._replace(start=start)]
    return spans


def merge(parts: Sequence[Sequence[Span]], placement: Placement) -> tuple[Span, ...]:
    """Spans of one step from those that each rank recorded on a common clock: they start at 0, and messages are on their links."""
    spans = [span for part in parts for span in part]
    links = link_spans((s for s in spans if s.queue == "send"), (s for s in spans if s.queue == "recv"), placement)
    spans = [span for span in spans if span.queue not in ("send", "recv")] + links
    zero = min((span.start for span in spans), default=0.0)
    spans = [span._replace(start=span.start - zero, end=span.end - zero) for span in spans]
    return tuple(sorted(spans, key=lambda span: (span.rank, span.start)))


def _message(span: Span) -> tuple[str, int, int, int]:
    return span.kind, span.lane, span.stage, span.microbatch
