"""What a run left in its folder, and whether it is over."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pipehc.studies.run import Run
from pipehc.watch.metrics import DIAGNOSTICS, METRICS, read_lines
from pipehc.watch.whole_file import write_whole

LOG = "log.txt"
ANSWER = "answer.json"  # what a dry run prints
_DONE = "outcome.json"
# The trainer's own words, of a loss and of a gradient norm.
_BROKE = re.compile(r"(?:the loss of step (\d+) is \S+|step (\d+): the gradient norm is [^,;\s]+)[,;][^\n]*no weight was changed")


@dataclass(frozen=True)
class End:
    """broke_at: step of a loss or gradient norm that was not finite, which is a result; None: the run came to its end."""

    broke_at: int | None
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """A run that is over. metrics, diagnostics: the lines of its files, by step."""

    run: Run
    folder: Path
    end: End

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        return read_lines(self.folder / METRICS)

    @cached_property
    def diagnostics(self) -> list[dict[str, Any]]:
        return read_lines(self.folder / DIAGNOSTICS)

    @cached_property
    def answer(self) -> dict[str, Any]:
        """Of a dry run."""
        return json.loads((self.folder / ANSWER).read_text())

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The configuration, by sections."""
        from pipehc.config.strict_yaml import read_yaml

        return read_yaml(self.folder / "config.yaml")

    def last(self, key: str) -> float | None:
        """The last value of a metric. None where the run broke off: what it had reached is not comparable."""
        return (
            None
            if self.end.broke_at is not None
            else next((m[key] for m in reversed(self.metrics) if m.get(key) is not None), None)
        )

    def at(self, key: str, step: int) -> float | None:
        """The metric of this very step."""
        return next((line.get(key) for line in self.metrics if line["step"] == step), None)


def read_end(folder: Path) -> End | None:
    """None: the run has not ended yet."""
    try:
        return End(**json.loads((folder / _DONE).read_text()))
    except FileNotFoundError:
        return None


def write_end(folder: Path, end: End) -> None:
    write_whole(folder / _DONE, json.dumps(asdict(end)) + "\n")


def broke_at(log: str) -> int | None:
    """The step at which the trainer says that loss or gradient norm are not finite; None if it says no such thing."""
    found = _BROKE.search(log)
    return int(found[1] or found[2]) if found else None
