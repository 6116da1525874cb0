"""Schedules as CSV: one line per rank, one cell per action, the format of torch.distributed.pipelining.

    s.to_csv("s.csv")                                   ours, with R and lanes; Schedule.from_csv reads it, and what torch writes:
    schedule._dump_csv("t.csv", format="compute_only")  (or compute_comms: its messages are skipped, `compile` makes its own)
    to_torch_csv(s, "s.csv"); runtime._load_csv("s.csv", format="compute_only")   one-lane schedules in torch's runtime

The placement needs no column of its own: every stage has actions, and those stand in the line of its rank.

What spreadsheets make of such a file is read too: a byte-order mark, UTF-16, semicolons or tabs between cells, quotes around them,
small letters, empty cells, and lines without actions at the end. Such a line anywhere else would be a rank without a stage, and is
refused: the ranks are counted by lines. Refused are also the names of torch up to 2.5, where B beside a W is what is now called I.
"""

from __future__ import annotations

import codecs
import csv
import re
from os import PathLike
from pathlib import Path

from pipehc.schedules.actions import Cell, flatten, parse
from pipehc.schedules.placement import Placement, infer

Rows = tuple[tuple[Cell, ...], ...]

# What torch's lowering adds to compute actions: messages, and parameter gathering and gradient reduction for FSDP.
_TORCH_ONLY = re.compile(r"\d+((SEND|RECV)_[FB]\d+|UNSHARD|RESHARD|REDUCE_GRAD)", re.IGNORECASE)

# Between cells; a pair has a semicolon inside its parentheses.
_SEPARATOR = re.compile(r"[,;\t](?![^()]*\))")


def write_rows(rows: Rows, path: str | PathLike[str]) -> None:
    """Writes one line per rank, one cell per action."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([[str(cell) for cell in row] for row in rows])


def read_rows(path: str | PathLike[str]) -> Rows:
    """Reads what `write_rows` or torch wrote, or what a spreadsheet made of it. Empty cells and torch's messages are skipped.

    Raises ValueError, naming file, line and cell, for anything else.
    """
    lines = [_cells(line) for line in _text(path).splitlines()]
    while lines and not lines[-1]:
        del lines[-1]
    rows: list[tuple[Cell, ...]] = []
    for number, cells in enumerate(lines, start=1):
        try:
            rows.append(tuple(parse(cell) for cell in cells if not _TORCH_ONLY.fullmatch(cell)))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
    _refuse_old_names(rows, path)
    return tuple(rows)


def _text(path: str | PathLike[str]) -> str:
    data = Path(path).read_bytes()
    utf_16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode("utf-16" if utf_16 else "utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise ValueError(f"{path}: is not text in UTF-8, or in UTF-16 with a byte-order mark; save it as CSV")
    return text


def _cells(line: str) -> list[str]:
    """The cells of a line that are not empty, without quotes."""
    cells = (cell.strip().strip('"').strip() for cell in _SEPARATOR.split(line))
    return [cell for cell in cells if cell]


def _refuse_old_names(rows: list[tuple[Cell, ...]], path: str | PathLike[str]) -> None:
    """Up to 2.5 torch knew no I: B was the gradient of the input where a W followed, and the whole backward elsewhere."""
    for number, row in enumerate(rows, start=1):
        actions = set(flatten(row))
        for action in flatten(row):
            weights = action._replace(kind="W")
            if action.kind == "B" and weights in actions:
                raise ValueError(
                    f"{path}, line {number}: has both {action} and {weights}, but B is the full backward, W included; "
                    "torch up to 2.5 wrote B for the gradient of the input alone: call it I there"
                )


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
    idle = [rank for rank, row in enumerate(rows) if not row]
    if idle:
        raise ValueError(f"{path}, line {idle[0] + 1}: rank {idle[0]} has no action; only at its end may a file have empty lines")
    lanes, stages = (1 + max(key[i] for key in where) for i in (0, 1))
    # One at a time: a slip of the finger can make these numbers huge.
    missing = next(((lane, stage) for lane in range(lanes) for stage in range(stages) if (lane, stage) not in where), None)
    if missing:
        raise ValueError(
            f"{path}: no action for (lane, stage) {missing} of {lanes} lanes of {stages} stages; both count from 0"
        )
    return infer(tuple(tuple(where[lane, stage] for stage in range(stages)) for lane in range(lanes)))


def microbatches_of(rows: Rows, path: str | PathLike[str]) -> int:
    """How many micro-batches the actions of `rows` have. Raises ValueError, naming `path` and rank, unless they are 0, 1, 2, ..."""
    for rank, row in enumerate(rows):
        actions = [action for action in flatten(row) if action.lane == 0]
        begun = {action.stage for action in actions if action.microbatch == 0}
        first = next((action for action in actions if action.stage not in begun), None)
        if first:
            raise ValueError(
                f"{path}, line {rank + 1}: stage {first.stage} on rank {rank} begins with {first} and has no micro-batch 0; "
                "micro-batches count from 0"
            )
    found = {action.microbatch for row in rows for action in flatten(row)}
    missing = next(number for number in range(len(found) + 1) if number not in found)
    if missing < len(found):
        raise ValueError(f"{path}: has micro-batch {max(found)}, but no rank has micro-batch {missing}; they count from 0")
    return len(found)
