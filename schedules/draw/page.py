"""One self-contained HTML page (no network): ranks by time, zoom, hover, summaries, timelines one above the other."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from typing import Any

from pipehc.schedules.draw.colors import KINDS, color, hue, ink
from pipehc.schedules.draw.page_template import TEMPLATE
from pipehc.schedules.draw.timeline import HEIGHTS, Timeline
from pipehc.schedules.spans import Span

_ROWS = {"nodes": "nodes", "high": "high priority", "comm": "communication"}  # that can be hidden: all but compute


def page(timelines: Sequence[Timeline], title: str | None = None) -> str:
    """The page as text. Its script draws the spans; the summaries are plain HTML and show without it."""
    palette: dict[str, int] = {}
    data: dict[str, Any] = {"heights": HEIGHTS, "timelines": [_data(timeline, palette) for timeline in timelines]}
    data["colors"] = [[background, ink(background)] for background in palette]
    there = {hue(span) for timeline in timelines for span in timeline.spans}
    rows = {row.name for timeline in timelines for row in timeline.rows}
    boxes = "".join(
        f'<label><input type="checkbox" id="{name}" checked> {text}</label>' for name, text in _ROWS.items() if name in rows
    )
    legend = "".join(
        f'<span class="key"><i class="{"hatch" if kind == "wait" else ""}" style="background-color:{color(kind)}"></i>{name}</span>'
        for kind, (_, name) in KINDS.items()
        if kind in there
    )
    values = {
        "TITLE": escape(title or timelines[0].title),
        "ROWS": boxes,
        "LEGEND": legend,
        "SECTIONS": "\n".join(_section(number, timeline) for number, timeline in enumerate(timelines)),
        "DATA": json.dumps(data, separators=(",", ":")).replace("</", "<\\/"),
    }
    text = TEMPLATE
    for key, value in values.items():
        text = text.replace(f"@@{key}@@", value)
    return text


def _section(number: int, timeline: Timeline) -> str:
    rows = []
    for rank, s in enumerate(timeline.summaries):
        share = [100 * x / timeline.end if timeline.end else 0.0 for x in (s.busy, s.exposed, s.idle)]
        bar = "".join(f'<b class="{name}" style="width:{x:.2f}%"></b>' for name, x in zip(("busy", "exposed", "idle"), share))
        cells = [
            f"{s.busy:g} ({share[0]:.1f} %)",
            f"{s.idle:g} ({share[2]:.1f} %)",
            f"{s.exposed:g} ({share[1]:.1f} %)",
            f"{s.hidden:g}",
        ]
        cells.append("" if s.peak_live is None else f"{s.peak_live:g}")
        name = escape(timeline.row(rank).removeprefix("rank "))
        rows.append(f"<tr><td>{name}</td><td class=bar>{bar}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    headings = ("rank", "", "busy", "idle (bubble)", "exposed communication", "hidden recompute", "peak live activations")
    head = "".join(f"<th>{heading}</th>" for heading in headings)
    return (
        f'<section><h2>{escape(timeline.title)}</h2><canvas id="canvas{number}"></canvas>'
        f"<details {'open' if timeline.ranks <= 16 else ''}><summary>Per rank</summary>"
        f"<table><tr>{head}</tr>{''.join(rows)}</table></details></section>"
    )


def _data(timeline: Timeline, palette: dict[str, int]) -> dict:
    """Spans as flat lists: start, end, colour, queue, stage, micro-batch, lane, pair, text, label."""
    texts: dict[str, int] = {}

    def pack(span: Span, label: str) -> list:
        return [
            _number(span.start),
            _number(span.end),
            palette.setdefault(timeline.color(span), len(palette)),
            span.queue,
            span.stage,
            span.microbatch,
            span.lane,
            -1 if span.pair is None else span.pair,
            texts.setdefault(span.what, len(texts)),
            texts.setdefault(label, len(texts)),
        ]

    rows = [
        [row.rank, row.name, [[pack(span, timeline.label(row, span)) for span in track] for track in row.tracks]]
        for row in timeline.rows
    ]
    names = [timeline.row(rank) for rank in range(timeline.ranks)]
    return {"end": timeline.end, "unit": timeline.unit, "ranks": timeline.ranks, "names": names, "rows": rows, "texts": list(texts)}


def _number(value: float) -> float:
    return float(f"{value:.7g}")
