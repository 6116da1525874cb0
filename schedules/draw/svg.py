"""SVG of one or more timelines, one above the other on one time scale. Needs nothing but Python."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple
from xml.sax.saxutils import escape

from pipehc.schedules.draw.axis import ticks
from pipehc.schedules.draw.colors import KINDS, color, hue, ink
from pipehc.schedules.draw.timeline import HEIGHTS, Row, Timeline

_RIGHT, _GAP, _TITLE, _AXIS, _LEGEND = 150, 6, 26, 24, 20


class _Scale(NamedTuple):
    left: float
    per_unit: float
    end: float

    def x(self, time: float) -> float:
        return self.left + time * self.per_unit


def svg(timelines: Sequence[Timeline], width: int = 1400) -> str:
    """The drawing as SVG text, `width` pixels wide. Every span has a tooltip, which browsers show on hover."""
    end = max(timeline.end for timeline in timelines) or 1.0
    left = 24 + 6.2 * max(len(timeline.row(timeline.ranks - 1)) for timeline in timelines)
    scale = _Scale(left, (width - left - _RIGHT) / end, end)
    body: list[str] = []
    y = 4.0
    for timeline in timelines:
        y = _timeline(body, timeline, y, scale)
    y = _legend(body, timelines, y, left, width)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{y:g}" font-family="sans-serif" font-size="11">'
    hatch = (
        '<defs><pattern id="wait" width="5" height="5" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
        f'<rect width="5" height="5" fill="#fff"/><rect width="2" height="5" fill="{color("wait")}"/></pattern></defs>'
    )
    return "\n".join([head, hatch, '<rect width="100%" height="100%" fill="#fff"/>', *body, "</svg>"])


def _timeline(body: list[str], timeline: Timeline, y: float, scale: _Scale) -> float:
    figures_at = scale.x(scale.end) + 8
    body.append(f'<text x="{scale.left:g}" y="{y + 15:g}" font-size="13" font-weight="bold">{escape(timeline.title)}</text>')
    body.append(f'<text x="{figures_at:g}" y="{y + 15:g}" fill="#555">idle / exposed</text>')
    y += _TITLE
    top = y
    for rank in range(timeline.ranks):
        summary = timeline.summaries[rank]
        body.append(f'<text x="{scale.left - 8:g}" y="{y + 14:g}" text-anchor="end">{escape(timeline.row(rank))}</text>')
        figures = (
            f"{100 * summary.idle / timeline.end:.1f} % / {100 * summary.exposed / timeline.end:.1f} %" if timeline.end else ""
        )
        body.append(f'<text x="{figures_at:g}" y="{y + 14:g}" fill="#555">{figures}</text>')
        for row in timeline.rows:
            if row.rank == rank:
                y = _row(body, timeline, row, y, scale)
        y += _GAP
    x_end = scale.x(timeline.end)
    body.append(f'<line x1="{x_end:g}" y1="{top:g}" x2="{x_end:g}" y2="{y:g}" stroke="#000" stroke-dasharray="3 3"/>')
    for tick in ticks(scale.end):
        x = scale.x(tick)
        body.append(f'<line x1="{x:g}" y1="{y:g}" x2="{x:g}" y2="{y + 4:g}" stroke="#555"/>')
        body.append(f'<text x="{x:g}" y="{y + 15:g}" text-anchor="middle" fill="#555">{tick:g}{timeline.unit}</text>')
    return y + _AXIS


def _row(body: list[str], timeline: Timeline, row: Row, y: float, scale: _Scale) -> float:
    height, top = HEIGHTS[row.name], y
    font = min(11, height - 3)
    for track in row.tracks:
        for span in track:
            x, wide = scale.x(span.start), (span.end - span.start) * scale.per_unit
            fill = timeline.color(span)
            edge = "#222" if span.pair is not None else "#fff"
            paint = 'fill="url(#wait)"' if span.queue == "wait" else f'fill="{fill}" stroke="{edge}" stroke-width="0.5"'
            tip = escape(f"{span.what}, rank {span.rank}, {span.queue}: {span.start:g} to {span.end:g}{timeline.unit}")
            box = f'x="{x:.2f}" y="{y:g}" width="{wide:.2f}" height="{height - 1}"'
            body.append(f"<rect {box} {paint}><title>{tip}</title></rect>")
            label = escape(timeline.label(row, span))
            if label and wide > 0.6 * font * len(label) + 1:
                style = f'text-anchor="middle" fill="{ink(fill)}" pointer-events="none" font-size="{font}"'
                body.append(f'<text x="{x + wide / 2:.2f}" y="{y + (height + 0.7 * font) / 2:g}" {style}>{label}</text>')
        y += height
    if row.name != "compute":
        middle = f'x="{scale.left - 8:g}" y="{(top + y) / 2 + 3:g}"'
        body.append(f'<text {middle} text-anchor="end" font-size="9" fill="#888">{row.name}</text>')
    return y + (0 if row.tracks else height)


def _legend(body: list[str], timelines: Sequence[Timeline], y: float, left: float, width: float) -> float:
    there = {hue(span) for t in timelines for row in t.rows for track in row.tracks for span in track}
    x = left
    for kind, (_, name) in KINDS.items():
        if kind in there:
            wide = 30 + 6.2 * len(name)
            if x + wide > width:
                x, y = left, y + _LEGEND
            fill = "url(#wait)" if kind == "wait" else color(kind)
            body.append(f'<rect x="{x:g}" y="{y:g}" width="12" height="12" fill="{fill}" stroke="#999" stroke-width="0.5"/>')
            body.append(f'<text x="{x + 16:g}" y="{y + 10:g}">{name}</text>')
            x += wide
    return y + _LEGEND
