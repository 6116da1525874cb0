"""A schedule: for every rank an ordered list of actions. Data, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from pipehc.schedules.actions import Cell, flatten
from pipehc.schedules.interchange import microbatches_of, placement_of, read_rows, write_rows
from pipehc.schedules.placement import Placement


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
        """Writes one line per rank, one cell per action; see `interchange`."""
        write_rows(self.rows, path)

    @staticmethod
    def from_csv(path: str | PathLike[str]) -> Schedule:
        """Reads what `to_csv`, torch or a spreadsheet wrote; name, placement and number of micro-batches follow from the file.

        Raises ValueError, naming file, line and cell, for anything else.
        """
        rows = read_rows(path)
        placement = placement_of(rows, path)
        forward_only = all(action.kind == "F" for row in rows for action in flatten(row))
        return Schedule(Path(path).stem, placement, microbatches_of(rows, path), rows, forward_only)


def lane_microbatches(microbatches: int, lanes: int, lane: int) -> range:
    """Micro-batches of `lane`: contiguous and equal shares (lanes divide `microbatches` in every valid schedule)."""
    return range(microbatches * lane // lanes, microbatches * (lane + 1) // lanes)
