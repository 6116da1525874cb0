"""A schedule: for every rank an ordered list of actions. Data, and nothing else."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from pipehc.schedules.actions import Cell, flatten, parse
from pipehc.schedules.placement import Placement, infer


@dataclass(frozen=True)
class Schedule:
    """What each rank does, in order, for one step.

    `rows[rank]` is a tuple of actions and pairs; `microbatches` counts both lanes together. With two lanes the first half of the
    micro-batches travels on lane 0, the second half on lane 1.
    """

    name: str
    placement: Placement
    microbatches: int
    rows: tuple[tuple[Cell, ...], ...]
    forward_only: bool = False

    @property
    def ranks(self) -> int:
        return self.placement.ranks

    def lane_microbatches(self, lane: int) -> range:
        """The micro-batches that travel on `lane`."""
        return lane_microbatches(self.microbatches, self.placement.lanes, lane)

    def __str__(self) -> str:
        head = f"{self.name}: {self.ranks} ranks, {self.placement.stages} stages, {self.microbatches} micro-batches"
        return "\n".join([head, *(f"{rank}: " + " ".join(map(str, row)) for rank, row in enumerate(self.rows))])

    def to_csv(self, path: str | PathLike[str]) -> None:
        """Writes one line per rank, one cell per action: the format of torch.distributed.pipelining."""
        with open(path, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([[str(cell) for cell in row] for row in self.rows])

    @staticmethod
    def from_csv(path: str | PathLike[str]) -> Schedule:
        """Reads what `to_csv` or torch wrote (compute actions; empty cells are skipped). The placement follows from the actions.

        Raises ValueError, naming file, line and cell, for anything else.
        """
        rows: list[tuple[Cell, ...]] = []
        with open(path, newline="", encoding="utf-8") as file:
            for number, line in enumerate(csv.reader(file), start=1):
                try:
                    rows.append(tuple(parse(cell) for cell in line if cell.strip()))
                except ValueError as error:
                    raise ValueError(f"{path}, line {number}: {error}") from None
        where: dict[tuple[int, int], int] = {}
        microbatches: set[int] = set()
        kinds: set[str] = set()
        for rank, row in enumerate(rows):
            for action in flatten(row):
                kinds.add(action.kind)
                microbatches.add(action.microbatch)
                first = where.setdefault((action.lane, action.stage), rank)
                if first != rank:
                    raise ValueError(f"{path}: stage {action.stage} of lane {action.lane} is on ranks {first} and {rank}")
        if not where:
            raise ValueError(f"{path}: has no action in it")
        lanes, stages = (1 + max(key[i] for key in where) for i in (0, 1))
        missing = [(lane, stage) for lane in range(lanes) for stage in range(stages) if (lane, stage) not in where]
        if missing:
            raise ValueError(f"{path}: no action for (lane, stage) {missing[0]} of {lanes} lanes of {stages} stages")
        table = tuple(tuple(where[lane, stage] for stage in range(stages)) for lane in range(lanes))
        return Schedule(Path(path).stem, infer(table), 1 + max(microbatches), tuple(rows), forward_only=kinds == {"F"})


def lane_microbatches(microbatches: int, lanes: int, lane: int) -> range:
    """Micro-batches of `lane`: contiguous and equal shares (lanes divide `microbatches` in every valid schedule)."""
    return range(microbatches * lane // lanes, microbatches * (lane + 1) // lanes)
