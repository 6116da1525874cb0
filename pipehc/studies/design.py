"""What a study is: runs, what is measured of each, what all of them say. Plain data; nothing here starts or reads anything."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from pipehc.studies.outcome import Outcome
from pipehc.studies.run import Factor, Run

Scale = Literal["small", "paper"]
Verdict = Literal["agrees", "differs", "open", "measured"]


class Row(NamedTuple):
    """A run that is over, in numbers.

    values: what the study measures; None where there is nothing to measure.  broke_at: the step at which the loss or the gradient
    norm was no finite number; None: it came to its end.
    """

    name: str
    factors: Mapping[str, Factor]
    values: Mapping[str, float | None]
    broke_at: int | None = None


@dataclass(frozen=True)
class Table:
    """Cells are texts as they are to be read; the first column is what a row is about."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


@dataclass(frozen=True)
class Statement:
    """A sentence that a rule chose. verdict: whether the numbers agree with what was published; `open`: they do not decide."""

    verdict: Verdict
    text: str


@dataclass(frozen=True)
class Figure:
    """draw: fills a matplotlib Figure of `inches`."""

    name: str
    title: str
    draw: Callable[[Any], None]
    inches: tuple[float, float] = (8.0, 4.0)


@dataclass(frozen=True)
class Report:
    tables: Sequence[Table]
    statements: Sequence[Statement]
    figures: Sequence[Figure] = ()
    rules: Sequence[str] = field(default=())  # how statements were chosen, with thresholds


@dataclass(frozen=True)
class Study:
    """seeds: how many, by scale, unless the user says.  command: what each run is, `pipehc.train` or `pipehc.plan`.
    parts: of how many equal parts of a training the ends must be evaluated.
    side_by_side: False where a run takes all cores itself."""

    name: str
    question: str
    seeds: Mapping[str, int]
    runs: Callable[[Scale, int], list[Run]]
    measure: Callable[[Outcome], dict[str, float | None]]
    summarise: Callable[[Sequence[Row]], Report]
    command: Literal["train", "plan"] = "train"
    side_by_side: bool = True
    parts: int = 1
