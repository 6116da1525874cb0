"""Reads run folders: their diagnosed steps, their metrics, and what their configuration aims at."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from pipehc.watch.metrics import CONFIG, DIAGNOSTICS, METRICS
from pipehc.watch.pictures.line import Line, Metrics


@dataclass(frozen=True)
class Run:
    """lines: by step, ascending, at least one. target_gain: of harmonized, None where no configuration tells."""

    name: str
    lines: dict[int, Line]
    metrics: dict[int, Metrics]
    target_gain: float | None = None

    @property
    def last(self) -> Line:
        return self.lines[max(self.lines)]

    @property
    def warnings(self) -> list[tuple[int, str]]:
        """With the step of each."""
        return [(step, text) for step, line in self.lines.items() for text in line.warnings]

    def at(self, step: int | None) -> Line:
        """The diagnosed step `step`, by default the last one. Raises ValueError, saying which there are."""
        if step is None:
            return self.last
        if step not in self.lines:
            there = _alternatives(step, list(self.lines))
            raise ValueError(f"--step {step}: {self.name} has no such diagnosed step; must be {there}")
        return self.lines[step]


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Each path is a run folder or a file diagnostics.jsonl, perhaps with the rest of one beside it. Raises ValueError, OSError."""
    whole = [path.resolve() for path in paths]
    for path, found in zip(paths, whole):
        if whole.count(found) > 1:
            raise ValueError(f"{path}: is named twice; every run must be another one")
    folders = [path if path.is_dir() else path.parent for path in whole]
    times = Counter(folder.name for folder in folders)
    usual = [path.is_dir() or path.name == DIAGNOSTICS for path in whole]
    names = [folder.name if times[folder.name] == 1 and plain else str(path) for path, folder, plain in zip(paths, folders, usual)]
    return [_read_run(path, name) for path, name in zip(paths, names)]


def _read_run(path: Path, name: str) -> Run:
    if not path.exists():
        raise ValueError(f"{path}: there is no such run folder")
    file = path / DIAGNOSTICS if path.is_dir() else path
    if not file.exists():
        raise ValueError(f"{path}: has no {DIAGNOSTICS}; a training writes one where its diagnostics.interval, in steps, is not 0")
    lines = _records(file, Line)
    if not lines:
        raise ValueError(f"{file}: has no whole line yet; a training writes one every diagnostics.interval steps")
    # What lies beside a file of another name, such as diagnostics-1.jsonl, may be of another training.
    beside = file.name == DIAGNOSTICS
    metrics = _records(file.parent / METRICS, Metrics) if beside and (file.parent / METRICS).exists() else {}
    target = _target_gain(file.parent / CONFIG) if beside and lines[max(lines)].kind == "harmonized" else None
    return Run(name, lines, metrics, target)


def _records[R: (Line, Metrics)](path: Path, model: type[R]) -> dict[int, R]:
    """By step, ascending. A crash may have cut the last line, which is then left out. Raises ValueError, naming line and fault."""
    texts = path.read_text(errors="replace").splitlines()
    found: dict[int, R] = {}
    for number, text in enumerate(texts, 1):
        try:
            value = json.loads(text)
        except ValueError:
            if number == len(texts):
                break
            raise ValueError(f"{path}, line {number}: is damaged: must be one JSON object") from None
        if not isinstance(value, dict):
            raise ValueError(f"{path}, line {number}: is damaged: must be one JSON object")
        try:
            record = model.model_validate(value)
        except ValidationError as error:
            raise ValueError(f"{path}, line {number}: {_fault(error)}") from None
        found[record.step] = record
    return dict(sorted(found.items()))


def _fault(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    text = first["msg"].removeprefix("Value error, ")
    return f"{where}: {text}" if where else text


def _target_gain(path: Path) -> float | None:
    try:
        found: Any = yaml.safe_load(path.read_text())
        return float(found["residual"]["target_gain"])
    except FileNotFoundError:
        return None
    except (yaml.YAMLError, KeyError, TypeError, ValueError):
        raise ValueError(f"{path}: has no readable residual.target_gain; must be the file that the training saved") from None


def _alternatives(step: int, there: list[int]) -> str:
    if len(there) <= 12:
        return f"one of {', '.join(map(str, there))}"
    near = sorted(sorted(there, key=lambda other: abs(other - step))[:2])
    return f"one of {len(there)} from {there[0]} to {there[-1]}, the nearest are {near[0]} and {near[1]}"
