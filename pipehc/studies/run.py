"""One run of a study: which configuration, and what distinguishes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Factor = str | int | float


@dataclass(frozen=True)
class Run:
    """One run of the trainer or of a dry run.

    name: its folder below OUT/runs; unique.  factors: what distinguishes it, columns of results.csv; the seed is `seed`.
    settings: section.key=value.  base: of the configuration; `small` is the package's own, others are files of the folder that
    --configs names.
    """

    name: str
    factors: Mapping[str, Factor]
    settings: tuple[str, ...]
    base: str = "small"
