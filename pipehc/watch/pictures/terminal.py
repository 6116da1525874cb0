"""Tables in the terminal: a run's depth at one step, and its courses over steps."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipehc.watch.pictures.columns import Column, columns, courses
from pipehc.watch.pictures.line import Line
from pipehc.watch.pictures.panel import Chosen, wide

_ROWS = 20  # of a table before it leaves some out
_WARNINGS = 5
_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 24  # of a sparkline


def show(chosen: Sequence[Chosen], console: Console) -> None:
    """Prints every run."""
    for one in chosen:
        found = columns(one.line, brief=True)
        rows = _rows(one.line.sublayers, found)
        console.print(f"[bold]{escape(one.label)}[/], {one.line.sublayers} sub-layers", highlight=False, soft_wrap=True)
        console.print(_table(one.line, found, rows))
        said = [] if len(rows) > one.line.sublayers else [_left_out(one.line.sublayers)]
        for course in courses(one.run):
            said.append(f"{course.name}: {sparkline(course.values)}  {course.text()}")
        warnings = one.run.warnings
        said += [f"warning at step {step}: {text}" for step, text in warnings[:_WARNINGS]]
        if len(warnings) > _WARNINGS:
            said.append(f"and {len(warnings) - _WARNINGS} more warnings")
        for text in (*said, ""):
            console.print(text, soft_wrap=True, markup=False, highlight=False)


def sparkline(values: np.ndarray) -> str:
    """At most 24 bars over time, each the largest of its part; logarithmic where the figures span much; × is not finite."""
    largest = [part.max() for part in np.array_split(values, min(_WIDTH, len(values)))]
    finite = np.array([value for value in largest if math.isfinite(value)])
    if not finite.size:
        return "×" * len(largest)
    scale = np.log if wide([finite]) else np.asarray
    low, high = scale(finite.min()), scale(finite.max())
    step = (high - low) / (len(_BARS) - 1) or 1.0
    return "".join(_BARS[round(float((scale(v) - low) / step))] if math.isfinite(v) else "×" for v in largest)


def _rows(sublayers: int, found: Sequence[Column]) -> list[int]:
    """All, or every k-th, the last and the extremes. The row `sublayers` is the end of the depth."""
    if sublayers <= _ROWS:
        return list(range(sublayers + 1))
    extremes = {row for column in found if (row := column.extreme_row) is not None}
    return sorted({*range(0, sublayers, _stride(sublayers)), sublayers - 1, sublayers, *extremes})


def _stride(sublayers: int) -> int:
    return math.ceil(sublayers / (_ROWS // 2))


def _left_out(sublayers: int) -> str:
    return (
        f"rows: one of every {_stride(sublayers)} sub-layers, the last, the end of the depth, and extremes of columns (*)"
    )


def _table(line: Line, found: Sequence[Column], rows: Sequence[int]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("sub-layer", no_wrap=True)
    groups = [column.group for column in found]
    for number, column in enumerate(found):
        group = column.group if groups.index(column.group) == number else ""
        table.add_column(f"{group}\n{column.name}", justify="right", no_wrap=True)
    for row in rows:
        name = "end" if row == line.sublayers else f"{row} {line.name_of(row)}"
        table.add_row(name, *(f"{column.cell(row)}{'*' if row == column.extreme_row else ' '}" for column in found))
    return table
