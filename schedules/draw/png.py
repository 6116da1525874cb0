"""PNG by matplotlib, which is an extra: `pip install pipehc[viz]`."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike

from pipehc.schedules.draw.colors import KINDS, color, ink
from pipehc.schedules.draw.timeline import Timeline

_HEIGHTS = {"compute": 1.0, "high": 0.5, "comm": 0.25}  # of one track
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
    heights = [sum(_HEIGHTS[row.name] * max(1, len(row.tracks)) + 0.3 for row in t.rows) for t in timelines]
    figure = Figure(figsize=(width, sum(heights) * _INCHES + 0.8 * len(timelines) + 0.5), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(timelines), 1, squeeze=False, sharex=True, height_ratios=heights)[:, 0]
    seen: set[str] = set()
    # A label is written where it fits: width of a digit in data units, for the font below.
    digit = 0.062 * end / (width - 1.5)
    for axis, timeline in zip(axes, timelines):
        y, centers = 0.0, []
        for rank in range(timeline.ranks):
            centers.append(y + 0.5)
            for row in (row for row in timeline.rows if row.rank == rank):
                height = _HEIGHTS[row.name]
                for track in row.tracks or ((),):
                    boxes, fills, edges, hatched = [], [], [], []
                    for span in track:
                        box = [(span.start, y), (span.end, y), (span.end, y + 0.94 * height), (span.start, y + 0.94 * height)]
                        seen.add("wait" if span.queue == "wait" else span.kind)
                        if span.queue == "wait":
                            hatched.append(box)
                            continue
                        fill = color(span.kind, *timeline.chunk(span)) if row.name != "comm" else color(span.kind)
                        boxes.append(box)
                        fills.append(fill)
                        edges.append("#222222" if span.pair is not None else "#ffffff")
                        label = str(span.microbatch)
                        if row.name == "compute" and span.microbatch >= 0 and span.end - span.start > (len(label) + 0.4) * digit:
                            middle = (span.start + span.end) / 2, y + 0.48
                            axis.text(*middle, label, ha="center", va="center", fontsize=7, color=ink(fill))
                    axis.add_collection(PolyCollection(boxes, facecolors=fills, edgecolors=edges, linewidths=0.4))
                    axis.add_collection(
                        PolyCollection(hatched, facecolors="none", edgecolors=color("wait"), hatch="/////", linewidths=0)
                    )
                    y += height
            y += 0.3
        axis.axvline(timeline.end, color="#000000", linestyle=":", linewidth=0.8)
        axis.set(xlim=(0, end), ylim=(y, -0.3), yticks=centers, yticklabels=[f"rank {rank}" for rank in range(timeline.ranks)])
        axis.set_title(timeline.title, loc="left", fontsize=10, fontweight="bold")
        axis.tick_params(labelsize=8, length=2)
        axis.spines[["top", "right", "left"]].set_visible(False)
    axes[-1].set_xlabel(f"time {timelines[-1].unit}".strip(), fontsize=8)
    handles = [Patch(facecolor=color(kind), label=name) for kind, (_, name) in KINDS.items() if kind in seen]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8, frameon=False)
    figure.savefig(path, format="png")
