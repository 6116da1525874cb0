"""What a picture consists of, as plain data: panels of curves."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from pipehc.watch.pictures.line import Line
from pipehc.watch.pictures.run import Run

Style = Literal["solid", "dashed", "dotted", "faint", "points"]
_WIDE = 20.0  # from this ratio of the largest to the smallest on, an axis is logarithmic


@dataclass(frozen=True)
class Chosen:
    """A run and the step of it whose depth is shown. Runs keep their number, hence their colour, through all pictures."""

    number: int
    run: Run
    line: Line

    @property
    def label(self) -> str:
        streams = f", {self.line.streams} streams" if self.line.streams > 1 else ""
        return f"{self.run.name} ({self.line.kind}{streams}, step {self.line.step})"


@dataclass(frozen=True)
class Curve:
    """y over x of run `number`; meaning: what tells this style from the panel's others, for its legend."""

    number: int
    x: np.ndarray
    y: np.ndarray
    style: Style = "solid"
    meaning: str = ""


@dataclass(frozen=True)
class Panel:
    """levels: horizontal lines, (value, number of the run, meaning)."""

    title: str
    x: str
    y: str
    curves: Sequence[Curve]
    may_be_log: bool = True
    levels: Sequence[tuple[float, int, str]] = field(default=())

    @property
    def log(self) -> bool:
        return self.may_be_log and wide(curve.y for curve in self.curves)


def wide(figures: Iterable[np.ndarray]) -> bool:
    """Whether the finite figures are positive and span so much that only a logarithmic axis shows the small ones."""
    parts = [part[np.isfinite(part)] for part in figures]
    joined = np.concatenate(parts) if parts else np.empty(0)
    return bool(joined.size and joined.min() > 0 and joined.max() > _WIDE * joined.min())


def filled(panels: Iterable[Panel]) -> list[Panel]:
    """Those in which there is something to see."""
    return [panel for panel in panels if panel.curves]
