"""Draws panels and heat maps with matplotlib, which is an extra: as one PNG, or as an SVG for every part of a page."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipehc.watch.pictures.depth import depth_panels
from pipehc.watch.pictures.maps import HeatMap, heat_maps
from pipehc.watch.pictures.panel import Chosen, Panel
from pipehc.watch.pictures.steps import step_panels

try:
    from matplotlib import colormaps, rc_context
    from matplotlib.figure import Figure, SubFigure
    from matplotlib.lines import Line2D
except ModuleNotFoundError:
    raise ModuleNotFoundError("pictures need matplotlib: pip install 'pipehc[viz]' (the tables of the terminal do not)") from None

_STYLES: dict[str, dict[str, Any]] = {
    "solid": {"linestyle": "-", "linewidth": 1.5},
    "dashed": {"linestyle": "--", "linewidth": 1.2},
    "dotted": {"linestyle": ":", "linewidth": 1.6},
    "faint": {"linestyle": "-", "linewidth": 0.7, "alpha": 0.4},
    "points": {"linestyle": "none", "marker": "o", "markersize": 4, "markerfacecolor": "none"},
}
_SETTINGS: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "legend.fontsize": 8,
    "legend.framealpha": 0.7,
    "legend.edgecolor": "none",
    "svg.fonttype": "none",  # text stays text: small, and found by a search
}
_ACROSS = 3  # panels in a row
_PANEL = (5.0, 3.1)  # inches
_MAP = 3.1
_ANNOTATED = 8  # streams up to which the entries of a map are written into it


def save_png(chosen: Sequence[Chosen], path: Path, sublayers: Sequence[int] | None = None) -> None:
    """All pictures in one, the heat maps of each run in a row of their own below the panels."""
    panels = [*step_panels(chosen), *depth_panels(chosen)]
    mapped = [(one, found) for one in chosen if (found := heat_maps(one.line, sublayers))]
    heights = [_height(len(panels), chosen), *(_MAP + 0.2 for _ in mapped)]
    width = max(_ACROSS * _PANEL[0], *(_MAP * len(found) for _, found in mapped), 0)
    with rc_context(_SETTINGS):
        figure = Figure(figsize=(width, sum(heights)), dpi=100, layout="constrained")
        parts = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
        _draw_panels(parts[0], panels, chosen)
        across = max((len(found) for _, found in mapped), default=0)
        for part, (one, found) in zip(parts[1:], mapped):
            _draw_maps(part, found, f"Mean maps of {one.label}", across)
        figure.savefig(path, format="png")


def panels_svg(panels: Sequence[Panel], chosen: Sequence[Chosen], name: str) -> str:
    """An <svg> element. name: another one for every picture of a page."""
    with rc_context(_SETTINGS | {"svg.hashsalt": name}):
        figure = Figure(figsize=(min(len(panels), _ACROSS) * _PANEL[0], _height(len(panels), chosen)), layout="constrained")
        _draw_panels(figure, panels, chosen)
        return _svg(figure)


def maps_svg(found: Sequence[HeatMap], name: str) -> str:
    """An <svg> element."""
    with rc_context(_SETTINGS | {"svg.hashsalt": name}):
        figure = Figure(figsize=(_MAP * len(found), _MAP + 0.3), layout="constrained")
        _draw_maps(figure, found, None, len(found))
        return _svg(figure)


def color(number: int, runs: int) -> Any:
    """Of run `number` of `runs`: the same in every picture."""
    return colormaps["tab10"](number) if runs <= 10 else colormaps["turbo"](0.05 + 0.9 * number / (runs - 1))


def _height(panels: int, chosen: Sequence[Chosen]) -> float:
    return -(-panels // _ACROSS) * _PANEL[1] + 0.25 * -(-len(chosen) // _ACROSS) + 0.2


def _draw_panels(figure: Figure | SubFigure, panels: Sequence[Panel], chosen: Sequence[Chosen]) -> None:
    across = min(len(panels), _ACROSS)
    axes = figure.subplots(-(-len(panels) // across), across, squeeze=False).flatten()
    for axis, panel in zip(axes, panels):
        _draw_panel(axis, panel, len(chosen))
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    handles = [Line2D([], [], color=color(one.number, len(chosen)), linewidth=2.5, label=one.label) for one in chosen]
    figure.legend(handles=handles, loc="outside upper left", ncols=across, frameon=False, fontsize=9)


def _draw_panel(axis: Any, panel: Panel, runs: int) -> None:
    meanings: dict[str, dict[str, Any]] = {}
    for curve in panel.curves:
        style = dict(_STYLES[curve.style])
        if len(curve.x) == 1:
            style |= {"marker": "o", "markersize": 3}  # a line of one point is not seen
        axis.plot(curve.x, curve.y, color=color(curve.number, runs), **style)
        meanings.setdefault(curve.meaning, _STYLES[curve.style])
    for value, number, meaning in panel.levels:
        style = {"linestyle": "-.", "linewidth": 1.0}
        axis.axhline(value, color=color(number, runs), **style)
        meanings.setdefault(meaning, style)
    axis.set(title=panel.title, xlabel=panel.x, ylabel=panel.y)
    if panel.log:
        axis.set_yscale("log")
    else:
        axis.ticklabel_format(axis="y", useOffset=False)
    if not any(np.isfinite(curve.y).any() for curve in panel.curves):
        axis.text(0.5, 0.5, "nothing here is finite", transform=axis.transAxes, ha="center")
    handles = [Line2D([], [], color="#444444", label=meaning, **style) for meaning, style in meanings.items() if meaning]
    if handles:
        axis.legend(handles=handles, loc="best")


def _draw_maps(figure: Figure | SubFigure, found: Sequence[HeatMap], title: str | None, across: int) -> None:
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    axes = figure.subplots(1, across, squeeze=False)[0]
    for axis, heat_map in zip(axes, found):
        _draw_map(axis, heat_map)
    for axis in axes[len(found) :]:
        axis.set_visible(False)


def _draw_map(axis: Any, heat_map: HeatMap) -> None:
    matrix, n = heat_map.matrix, len(heat_map.matrix)
    finite = matrix[np.isfinite(matrix)]
    most = max(2.0 / n, float(np.abs(finite).max(initial=0)))  # a mean of all streams is no extreme
    axis.pcolormesh(matrix, cmap="RdBu_r", vmin=-most, vmax=most, edgecolors="#ffffff", linewidth=0.5)
    small = 9 if n <= 4 else 7
    if n <= _ANNOTATED:
        for i, row in enumerate(matrix):
            for j, value in enumerate(row):
                ink = "#ffffff" if abs(value) > 0.6 * most else "#000000"
                axis.text(j + 0.5, i + 0.5, _short(value), ha="center", va="center", fontsize=small, color=ink)
    turned = 90 if n > _ANNOTATED else 0
    at = np.arange(n) + 0.5
    axis.set_xticks(at, [_short(value) for value in matrix.sum(0)], fontsize=small, rotation=turned)
    axis.set_yticks(at, [_short(value) for value in matrix.sum(1)], fontsize=small)
    axis.yaxis.tick_right()
    axis.yaxis.set_label_position("right")
    axis.tick_params(length=0)
    axis.grid(False)
    axis.invert_yaxis()
    axis.set_aspect("equal")
    axis.spines[:].set_visible(False)
    scale = "" if n <= _ANNOTATED else f"\nred: up to {_short(most)}, blue: down to {_short(-most)}"
    axis.set_title(heat_map.title + scale, fontsize=9)
    axis.set_xlabel("column sums (backward)", fontsize=8)
    axis.set_ylabel("row sums (forward)", fontsize=8)


def _short(value: float) -> str:
    """At most seven characters."""
    if abs(value) < 99.995:
        return f"{value:z.2f}"
    return f"{value:.0f}" if abs(value) < 9_999.5 else f"{value:.1e}".replace("e+0", "e").replace("e+", "e")


def _svg(figure: Figure) -> str:
    """Without what a page cannot have: a prologue, and names that the groups of every picture share."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = buffer.getvalue()
    return re.sub(r'<g id="[^"]*"', "<g", text[text.index("<svg") :])
