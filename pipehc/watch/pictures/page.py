"""One self-contained HTML page, without network and without script: pictures of all runs, then the tables and warnings of each."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import groupby

from pipehc.watch.pictures.columns import Column, columns, courses
from pipehc.watch.pictures.depth import depth_panels
from pipehc.watch.pictures.figure import maps_svg, panels_svg
from pipehc.watch.pictures.line import Line
from pipehc.watch.pictures.maps import heat_maps
from pipehc.watch.pictures.panel import Chosen
from pipehc.watch.pictures.steps import step_panels

_HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>@@TITLE@@</title>
<style>
  body { font: 13px/1.45 system-ui, sans-serif; margin: 12px 16px; color: #222; background: #fff; }
  h1 { font-size: 18px; margin: 4px 0 10px; }
  h2 { font-size: 15px; margin: 22px 0 4px; } h3 { font-size: 13px; margin: 12px 0 2px; }
  svg { max-width: 100%; height: auto; }
  table { border-collapse: collapse; margin: 4px 0 10px; }
  th, td { text-align: right; padding: 1px 12px 1px 0; font-variant-numeric: tabular-nums; }
  th, td { font-weight: normal; white-space: nowrap; }
  th { color: #666; } th:first-child, td:first-child { text-align: left; }
  tbody tr:hover { background: #f2f5fa; }
  .extreme { font-weight: bold; }
  .warning { color: #9c4a00; }
  summary { color: #666; cursor: pointer; }
  .scroll { overflow-x: auto; }
</style>
</head>
<body>
"""


def page(chosen: Sequence[Chosen], sublayers: Sequence[int] | None = None) -> str:
    """The page as text. sublayers: whose maps are drawn, by default the first, the middle and the last.

    Raises ModuleNotFoundError, saying what to install, if matplotlib is missing.
    """
    title = "Diagnostics of " + ", ".join(one.run.name for one in chosen)
    parts = [_HEAD.replace("@@TITLE@@", escape(title)), f"<h1>{escape(title)}</h1>"]
    for name, heading, panels in (
        ("steps", "Over training steps", step_panels(chosen)),
        ("depth", "By depth", depth_panels(chosen)),
    ):
        if panels:
            parts += [f"<h2>{heading}</h2>", panels_svg(panels, chosen, name)]
    for one in chosen:
        parts += _run(one, sublayers)
    return "\n".join((*parts, "</body>", "</html>", ""))


def _run(one: Chosen, sublayers: Sequence[int] | None) -> list[str]:
    parts = [f"<h2>{escape(one.label)}, {one.line.sublayers} sub-layers</h2>"]
    warnings = [f'<li class="warning">step {step}: {escape(text)}</li>' for step, text in one.run.warnings]
    over_steps = [f"<li>{escape(course.name)}: {escape(course.text())}</li>" for course in courses(one.run)]
    parts.append(f"<ul>{''.join((*over_steps, *warnings))}</ul>")
    found = heat_maps(one.line, sublayers)
    if found:
        parts += ["<h3>Mean maps: row i is what stream i becomes</h3>", maps_svg(found, f"maps{one.number}")]
    parts.append(f"<details open><summary>figures of step {one.line.step}; bold: the extreme of a column</summary>")
    return [*parts, _table(one.line, columns(one.line)), "</details>"]


def _table(line: Line, found: Sequence[Column]) -> str:
    groups = [(group, len(list(of_it))) for group, of_it in groupby(column.group for column in found)]
    head = "".join(f'<th colspan="{size}">{escape(group)}</th>' for group, size in groups)
    names = "".join(f"<th>{escape(column.name)}</th>" for column in found)
    rows = []
    for row in range(line.sublayers + 1):
        name = "end" if row == line.sublayers else f"{row} {line.name_of(row)}"
        marks = [' class="extreme"' if row == column.extreme_row else "" for column in found]
        cells = "".join(f"<td{mark}>{column.cell(row)}</td>" for mark, column in zip(marks, found))
        rows.append(f"<tr><td>{name}</td>{cells}</tr>")
    return (
        f'<div class="scroll"><table><thead><tr><th></th>{head}</tr><tr><th>sub-layer</th>{names}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )
