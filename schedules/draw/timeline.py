"""What every drawing is made of: the spans of one step, simulated or recorded, in rows, with a summary per rank."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from pipehc.schedules.costs import Costs
from pipehc.schedules.draw.colors import color, hue
from pipehc.schedules.program import Program
from pipehc.schedules.schedule import Schedule
from pipehc.schedules.simulate import simulate
from pipehc.schedules.spans import Span

# Lines of a rank from top to bottom, with the height of one track in pixels: all drawings know these, and no others.
HEIGHTS = {"compute": 20, "nodes": 14, "high": 10, "comm": 6}
_LINES = {"compute": "compute", "wait": "compute", "node": "nodes", "high": "high", "send": "comm", "recv": "comm"}


class Summary(NamedTuple):
    """Times of one rank: at work, stalled for messages that were already computed, idle otherwise, recompute that cost nothing."""

    busy: float
    exposed: float
    idle: float
    hidden: float
    peak_live: float | None = None  # activations, in units of 1/P of the model


class Row(NamedTuple):
    """Spans of one rank that share a line: `name` is one of `HEIGHTS`; what overlaps is on several tracks."""

    rank: int
    name: str
    tracks: tuple[tuple[Span, ...], ...]


@dataclass(frozen=True)
class Timeline:
    """Spans and summaries of one step. `unit` names the unit of time, if it has one (ms for recorded steps).

    where: what stands before a rank in every row, to tell it from those of other timelines: "step 6 ".
    """

    title: str
    spans: tuple[Span, ...]
    summaries: tuple[Summary, ...]
    unit: str = ""
    where: str = ""

    def row(self, rank: int) -> str:
        """What a rank's row is called."""
        return f"{self.where}rank {rank}"

    @property
    def ranks(self) -> int:
        return len(self.summaries)

    @cached_property
    def end(self) -> float:
        return max((span.end for span in self.spans), default=0.0)

    @cached_property
    def chunks(self) -> dict[int, dict[tuple[int, int], int]]:
        """By rank: (lane, stage) -> its position among the rank's stages. Tints follow it."""
        held: dict[int, set[tuple[int, int]]] = {rank: set() for rank in range(self.ranks)}
        for span in self.spans:
            if span.queue in ("compute", "high") and span.stage >= 0:
                held[span.rank].add((span.lane, span.stage))
        return {rank: {key: i for i, key in enumerate(sorted(keys))} for rank, keys in held.items()}

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """By rank: compute with its waits; nodes, if recorded; high if anything ran there; comm if a message took time."""
        by_rank: dict[int, dict[str, list[Span]]] = {rank: {line: [] for line in HEIGHTS} for rank in range(self.ranks)}
        for span in self.spans:
            if span.end > span.start:
                by_rank[span.rank][_LINES[span.queue]].append(span)
        return tuple(
            Row(rank, name, _tracks(spans))
            for rank, groups in by_rank.items()
            for name, spans in groups.items()
            if spans or name == "compute"
        )

    @staticmethod
    def label(row: Row, span: Span) -> str:
        """What is written on a span where there is room: the micro-batch, or the name of the node."""
        if row.name == "nodes":
            return span.what.split()[-1] if span.what.strip() else ""
        return str(span.microbatch) if row.name == "compute" and span.queue != "wait" and span.microbatch >= 0 else ""

    def color(self, span: Span) -> str:
        """Hex colour: hue by what it is; on compute queues, tint by the stage that it belongs to."""
        tinted = span.queue not in ("send", "recv", "wait")
        return color(hue(span), *(self.chunk(span) if tinted else ()))

    def chunk(self, span: Span) -> tuple[int, int]:
        """Position of the span's stage on its rank, and how many stages the rank has. Messages have no tint."""
        own = self.chunks[span.rank]
        return own.get((span.lane, span.stage), 0), len(own)


def simulated(what: Program | Schedule, costs: Costs, title: str | None = None) -> Timeline:
    """The timeline of a simulation. Raises what `simulate` raises."""
    result = simulate(what, costs)
    schedule = what.schedule if isinstance(what, Program) else what
    summaries = tuple(
        Summary(busy, exposed, result.makespan - busy - exposed, hidden, live)
        for busy, exposed, hidden, live in zip(result.busy, result.exposed_comm, result.hidden_recompute, result.peak_live)
    )
    if title is None:
        head = f"{schedule.name}: {schedule.ranks} ranks, {schedule.microbatches} micro-batches"
        title = f"{head}, step {result.makespan:g}, bubble {result.bubble:g} ({100 * result.bubble / result.makespan:.1f} %)"
    return Timeline(title, result.spans, summaries)


def recorded(spans: Iterable[Span], title: str, unit: str = "ms", where: str = "") -> Timeline:
    """The timeline of a recorded step. Exposed is the part of each wait in which its message was on the link.

    Raises ValueError if there is no span.
    """
    spans = tuple(spans)
    if not spans:
        raise ValueError(f"{title}: no spans recorded")
    end = max(span.end for span in spans)
    ranks = 1 + max(span.rank for span in spans)
    arrivals = {(s.rank, *_message(s)): s for s in spans if s.queue == "recv"}
    busy, exposed, hidden = [0.0] * ranks, [0.0] * ranks, [0.0] * ranks
    until = [0.0] * ranks  # both compute queues together are busy up to here
    for span in sorted(spans, key=lambda span: span.start):
        rank = span.rank
        if span.queue in ("compute", "high"):
            busy[rank] += max(0.0, span.end - max(until[rank], span.start))
            until[rank] = max(until[rank], span.end)
        elif span.queue == "wait" and (transfer := arrivals.get((rank, *_message(span)))):
            exposed[rank] += max(0.0, min(span.end, transfer.end) - max(span.start, transfer.start))
        if span.kind == "R" and span.queue == "compute" and (transfer := arrivals.get((rank, "gradient", *_message(span)[1:]))):
            hidden[rank] += max(0.0, min(span.end, transfer.end) - span.start)
    summaries = tuple(Summary(b, e, end - b - e, h) for b, e, h in zip(busy, exposed, hidden))
    return Timeline(title, spans, summaries, unit, where)


def _message(span: Span) -> tuple[str, int, int, int]:
    return span.kind, span.lane, span.stage, span.microbatch


def _tracks(spans: list[Span]) -> tuple[tuple[Span, ...], ...]:
    """Spans that overlap go to different tracks, sends before receives; as few tracks as that takes."""
    tracks: list[list[Span]] = []
    for queue in ("send", "recv", None):
        own: list[list[Span]] = []
        for span in sorted(
            (s for s in spans if (s.queue == queue if queue else s.queue not in ("send", "recv"))), key=lambda s: s.start
        ):
            free = next((track for track in own if track[-1].end <= span.start + 1e-9), None)
            if free is None:
                own.append([span])
            else:
                free.append(span)
        tracks += own
    return tuple(map(tuple, tracks))
