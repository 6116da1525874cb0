"""PNG by matplotlib, which is an extra: `pip install pipehc[viz]`."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import Any

from pipehc.schedules.draw.colors import KINDS, color, hue, ink
from pipehc.schedules.draw.timeline import HEIGHTS, Timeline

_INCHES = 0.22  # per compute track


def png(timelines: Sequence[Timeline], path: str | PathLike[str], width: float = 16.0, dpi: int = 120) -> None:
    """Writes the timelines, one above the other on one time scale, `width` inches wide.

    Raises ModuleNotFoundError, saying what to install, if matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.collections import PolyCollection
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ModuleNotFoundError:
        raise ModuleNotFoundError("PNG needs matplotlib: pip install 'pipehc[viz]' (SVG and HTML need nothing)") from None

    end = max(timeline.end for timeline in timelines) or 1.0
    relative = {name: height / HEIGHTS["compute"] for name, height in HEIGHTS.items()}
    heights = [sum(relative[row.name] * max(1, len(row.tracks)) for row in t.rows) + 0.4 * t.ranks for t in timelines]
    figure = Figure(figsize=(width, sum(heights) * _INCHES + 0.8 * len(timelines) + 0.5), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(timelines), 1, squeeze=False, sharex=True, height_ratios=heights)[:, 0]
    seen: set[str] = set()
    # A label is written where it fits: width of a digit in data units, for the largest font below.
    digit = 0.062 * end / (width - 1.5)
    for axis, timeline in zip(axes, timelines):
        y = 0.0
        names: list[tuple[float, str, dict]] = []
        for rank in range(timeline.ranks):
            names.append((y + 0.5, timeline.row(rank), {"fontsize": 8}))
            for row in (row for row in timeline.rows if row.rank == rank):
                height, font = relative[row.name], 7 * min(1.0, 1.2 * relative[row.name])
                if row.name != "compute":
                    names.append((y + 0.5 * height * len(row.tracks), row.name, {"fontsize": 6, "color": "#888888"}))
                for track in row.tracks or ((),):
                    boxes, fills, edges, hatched = [], [], [], []
                    for span in track:
                        box = [(span.start, y), (span.end, y), (span.end, y + 0.94 * height), (span.start, y + 0.94 * height)]
                        seen.add(hue(span))
                        if span.queue == "wait":
                            hatched.append(box)
                            continue
                        fill = timeline.color(span)
                        boxes.append(box)
                        fills.append(fill)
                        edges.append("#222222" if span.pair is not None else "#ffffff")
                        label = timeline.label(row, span)
                        if label and span.end - span.start > (len(label) + 0.4) * digit * font / 7:
                            middle = (span.start + span.end) / 2, y + 0.48 * height
                            style = {"ha": "center", "va": "center", "fontsize": font, "color": ink(fill)}
                            axis.text(*middle, label, in_layout=False, **style)
                    axis.add_collection(PolyCollection(boxes, facecolors=fills, edgecolors=edges, linewidths=0.4))
                    axis.add_collection(
                        PolyCollection(hatched, facecolors="none", edgecolors=color("wait"), hatch="/////", linewidths=0)
                    )
                    y += height
            y += 0.4
        axis.axvline(timeline.end, color="#000000", linestyle=":", linewidth=0.8)
        axis.set(xlim=(0, end), ylim=(y, -0.3), yticks=[at for at, _, _ in names], yticklabels=[name for _, name, _ in names])
        for text, (_, _, style) in zip(axis.get_yticklabels(), names):
            text.set(**style)
        axis.set_title(timeline.title, loc="left", fontsize=10, fontweight="bold")
        axis.tick_params(axis="x", labelsize=8, length=2)
        axis.tick_params(axis="y", length=0)
        axis.spines[["top", "right", "left"]].set_visible(False)
    axes[-1].set_xlabel(f"time {timelines[-1].unit}".strip(), fontsize=8)
    patterns: dict[str, dict[str, Any]] = {"wait": {"facecolor": "none", "edgecolor": color("wait"), "hatch": "/////"}}
    handles = [
        Patch(**patterns.get(kind, {"facecolor": color(kind)}), label=name) for kind, (_, name) in KINDS.items() if kind in seen
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8, frameon=False)
    figure.savefig(path, format="png")
