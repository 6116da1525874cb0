"""Schedules as CSV: one line per rank, one cell per action, the format of torch.distributed.pipelining.

    s.to_csv("s.csv")                                   ours, with R and lanes; Schedule.from_csv reads it, and what torch writes:
    schedule._dump_csv("t.csv", format="compute_only")  (or compute_comms: its messages are skipped, `compile` makes its own)
    to_torch_csv(s, "s.csv"); runtime._load_csv("s.csv", format="compute_only")   one-lane schedules in torch's runtime

The placement needs no column of its own: every stage has actions, and those stand in the line of its rank.
"""

from __future__ import annotations

import csv
import re
from os import PathLike

from pipehc.schedules.actions import Cell, flatten, parse
from pipehc.schedules.placement import Placement, infer

Rows = tuple[tuple[Cell, ...], ...]

# What torch's lowering adds to compute actions: messages, and parameter gathering and gradient reduction for FSDP.
_TORCH_ONLY = re.compile(r"\d+((SEND|RECV)_[FB]\d+|UNSHARD|RESHARD|REDUCE_GRAD)")


def write_rows(rows: Rows, path: str | PathLike[str]) -> None:
    """Writes one line per rank, one cell per action."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([[str(cell) for cell in row] for row in rows])


def read_rows(path: str | PathLike[str]) -> Rows:
    """Reads what `write_rows` or torch wrote. Empty cells and torch's messages are skipped.

    Raises ValueError, naming file, line and cell, for anything else.
    """
    rows: list[tuple[Cell, ...]] = []
    with open(path, newline="", encoding="utf-8") as file:
        for number, line in enumerate(csv.reader(file), start=1):
            cells = [cell.strip() for cell in line]
            try:
                rows.append(tuple(parse(cell) for cell in cells if cell and not _TORCH_ONLY.fullmatch(cell)))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from None
    return tuple(rows)


def placement_of(rows: Rows, path: str | PathLike[str]) -> Placement:
    """The placement that the actions of `rows` imply. Raises ValueError, naming `path`, if a stage is on two ranks or on none."""
    where: dict[tuple[int, int], int] = {}
    for rank, row in enumerate(rows):
        for action in flatten(row):
            first = where.setdefault((action.lane, action.stage), rank)
            if first != rank:
                raise ValueError(f"{path}: stage {action.stage} of lane {action.lane} is on ranks {first} and {rank}")
    if not where:
        raise ValueError(f"{path}: has no action in it")
    lanes, stages = (1 + max(key[i] for key in where) for i in (0, 1))
    missing = [(lane, stage) for lane in range(lanes) for stage in range(stages) if (lane, stage) not in where]
    if missing:
        raise ValueError(f"{path}: no action for (lane, stage) {missing[0]} of {lanes} lanes of {stages} stages")
    idle = [rank for rank, row in enumerate(rows) if not row]
    if idle:
        raise ValueError(f"{path}, line {idle[0] + 1}: rank {idle[0]} has no action")
    return infer(tuple(tuple(where[lane, stage] for stage in range(stages)) for lane in range(lanes)))
