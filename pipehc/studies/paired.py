"""Differences between runs of one seed: the same samples in the same order, and the same initial weights where both have them.

What seeds share cancels in such a difference, so its spread is far smaller than that of the losses themselves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Literal, NamedTuple

from pipehc.studies.design import Row, Verdict
from pipehc.studies.run import Factor

# Two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom; 1.96 from 31 on, 4 % too small at worst.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
      2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)  # fmt: skip

RULE = (
    "A difference counts as one when the 95 % interval of its mean over seeds (Student's t, paired by seed) leaves zero out; of "
    "many comparisons in a table, one in twenty will do so by chance."
)


class Gap(NamedTuple):
    """Of paired differences. error: standard error of the mean.  half: half of the 95 % interval.  single: every difference."""

    mean: float
    error: float
    half: float
    single: tuple[float, ...]

    @property
    def side(self) -> Literal[-1, 0, 1]:
        """-1: below zero beyond chance, 1: above, 0: not decided."""
        return 0 if abs(self.mean) <= self.half or self.mean == 0 else 1 if self.mean > 0 else -1

    def __str__(self) -> str:
        return f"{self.mean:+.4f} ± {self.half:.4f}"


class Spread(NamedTuple):
    mean: float
    deviation: float
    low: float
    high: float
    number: int

    def __str__(self) -> str:
        return f"{self.mean:.4f} ({self.deviation:.4f}; {self.low:.4f} to {self.high:.4f})"


def shown(found: object | None) -> str:
    """In a cell of a table."""
    return "" if found is None else str(found)


def spread(values: Sequence[float]) -> Spread | None:
    """Mean, standard deviation (0 of a single value) and range."""
    if not values:
        return None
    return Spread(fmean(values), stdev(values) if len(values) > 1 else 0.0, min(values), max(values), len(values))


def paired(rows: Sequence[Row], reference: Sequence[Row], value: str) -> Gap | None:
    """Of `value` in rows less that of the reference with the same seed. None with fewer than two such pairs: no spread is known.

    ValueError: two rows of one seed, which are no pairs.
    """
    others, own = _by_seed(reference, value), _by_seed(rows, value)
    return gap([own[seed] - others[seed] for seed in own if seed in others])


def gap(single: Sequence[float]) -> Gap | None:
    if len(single) < 2:
        return None
    error = stdev(single) / math.sqrt(len(single))
    free = len(single) - 1
    return Gap(fmean(single), error, error * (_T[free - 1] if free <= len(_T) else 1.96), tuple(single))


def where(rows: Sequence[Row], **factors: Factor) -> list[Row]:
    """Rows with these factors."""
    return [row for row in rows if all(row.factors.get(key) == value for key, value in factors.items())]


def values(rows: Sequence[Row], key: str) -> list[float]:
    """Those that were measured."""
    return [value for row in rows if (value := row.values.get(key)) is not None]


def cells(rows: Sequence[Row], *factors: str) -> list[tuple[Factor, ...]]:
    """The combinations of these factors that occur, in their order."""
    return list(dict.fromkeys(tuple(row.factors[factor] for factor in factors) for row in rows))


def judged(found: Gap | None, subject: str, expected: Literal[-1, 1], paper: str) -> tuple[Verdict, str]:
    """Verdict and sentence on a gap that was published with the sign `expected`. paper: what it says."""
    if found is None:
        return "open", f"{subject}: fewer than two pairs of seeds came to their end; {paper}."
    if not found.side:
        return "open", f"{subject}: {found}, no difference beyond chance at this size; {paper}."
    return ("agrees" if found.side == expected else "differs"), f"{subject}: {found}; {paper}."


def _by_seed(rows: Sequence[Row], value: str) -> dict[Factor, float]:
    found: dict[Factor, float] = {}
    for row in rows:
        measured = row.values.get(value)
        if measured is not None:
            if row.factors["seed"] in found:
                raise ValueError(f"{row.name}: another row has its seed {row.factors['seed']}; rows must differ in the seed alone")
            found[row.factors["seed"]] = measured
    return found
