"""The figures of a run as columns by depth and as courses over steps, for the tables of the terminal and of the page."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pipehc.watch.pictures.line import Distance, Line
from pipehc.watch.pictures.run import Run
from pipehc.watch.pictures.steps import over_steps


@dataclass(frozen=True)
class Column:
    """values: [L], or [L + 1] with the end of the depth; extreme: which of them is the one to look at, if any is."""

    group: str
    name: str
    values: np.ndarray
    extreme: Literal["largest", "smallest", "none"] = "largest"

    def cell(self, row: int) -> str:
        return figure(self.values[row]) if row < len(self.values) else ""

    @property
    def extreme_row(self) -> int | None:
        """What is not finite is the most extreme; of equals the first."""
        if self.extreme == "none":
            return None
        return int(self.values.argmax() if self.extreme == "largest" else self.values.argmin())


@dataclass(frozen=True)
class Course:
    """Figures over steps."""

    name: str
    steps: np.ndarray
    values: np.ndarray
    extreme: Literal["largest", "smallest"]

    def text(self) -> str:
        row = int(self.values.argmax() if self.extreme == "largest" else self.values.argmin())
        first, last, extreme = (figure(self.values[i]) for i in (0, -1, row))
        return f"{first} to {last}, {self.extreme} {extreme} at step {self.steps[row]}"


def columns(line: Line, brief: bool = False) -> list[Column]:
    """Those of which the line has figures. brief: of the distances that from this kind's manifold alone, and no H_pre, H_post."""
    found = []
    for group, gains in (("gain", line.gain), ("composite", line.composite)):
        if gains is not None:
            found += [Column(group, "forward", gains.forward), Column(group, "backward", gains.backward)]
    if line.distance is not None:
        found += _distances(line.kind, line.distance, brief)
    for name, norms in (("H_pre", line.h_pre_norm), ("H_post", line.h_post_norm)):
        if norms is not None and not brief:
            found.append(Column("norm", name, norms))
    if line.similarity is not None:
        # All 1 where the streams start as copies: the largest says nothing.
        found.append(Column("streams", "cosine", line.similarity, "none"))
    if line.stream_norm is not None:
        smallest, largest = line.stream_norm.min(1), line.stream_norm.max(1)
        if line.streams == 1:
            found.append(Column("streams", "norm", largest))
        else:
            found += [Column("streams", "least norm", smallest, "smallest"), Column("streams", "most", largest)]
    if line.gradient is not None:
        found.append(Column("gradient", "norm", line.gradient))
    if line.transported is not None:
        found.append(Column("gradient", "transported", line.transported))
    return found


def _distances(kind: str, distance: Distance, brief: bool) -> list[Column]:
    if not brief:
        return [Column("distance", name, getattr(distance, name)) for name in ("rows", "columns", "orthogonality")]
    sums = np.maximum(distance.rows, distance.columns)
    # Rows and columns of Birkhoff's matrices, of the isometries that keep the mean, and of blends of the two sum to 1.
    on = {"mhc": sums, "hybrid": sums, "isohc": np.maximum(sums, distance.orthogonality)}
    return [Column("distance", "manifold", on[kind])] if kind in on else []


def courses(run: Run) -> list[Course]:
    """Loss, composite gain, similarity and, of harmonized, s: those of which the run has figures."""
    lines = list(run.lines.values())
    found = []
    steps, losses = over_steps(run, "loss")
    if len(steps):
        found.append(Course("loss", steps, losses, "smallest"))
    else:
        found += _course("loss of the diagnosed steps", lines, [line.loss for line in lines], "smallest")
    gains = [None if line.composite is None else float(line.composite.largest.max()) for line in lines]
    found += _course("composite gain, largest over the depth", lines, gains, "largest")
    alike = [None if line.similarity is None else float(line.similarity[-1]) for line in lines]
    found += _course("cosine of streams at the end of the depth", lines, alike, "largest")
    return found + _course("s", lines, [line.s for line in lines], "smallest")


def _course(name: str, lines: list[Line], values: list[float | None], extreme: Literal["largest", "smallest"]) -> list[Course]:
    pairs = [(line.step, value) for line, value in zip(lines, values) if value is not None]
    return [Course(name, np.array([s for s, _ in pairs]), np.array([v for _, v in pairs]), extreme)] if pairs else []


def figure(value: float) -> str:
    """As few characters as tell four digits or, of small and large ones, two."""
    if not math.isfinite(value):
        return "not finite"
    if value == 0 or 0.001 <= abs(value) < 10_000:
        return f"{value:z.3f}" if abs(value) < 100 else f"{value:.0f}"
    return f"{value:.1e}"
