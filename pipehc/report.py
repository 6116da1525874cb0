"""Says where the time of a step went, per rank: computing, bubble, communication, recomputation, and the three largest losses.

    python -m pipehc.report runs/x/trace/step-0000*.json           steps that pipehc recorded (trace.steps)
    python -m pipehc.report rank0.json rank1.json.gz               Chrome traces of torch.profiler, a file a rank
    python -m pipehc.report report.sqlite                          Nsight Systems: nsys export --type sqlite report.nsys-rep

A row is a rank, or a GPU of it, in one step. A profiler's trace is cut where its ProfilerStep ranges say; --step 12 or 12-14,20
chooses. compute + exposed + copies + bubble is the step.

`exposed` is communication that no computation hides. A GPU's communication kernel looks the same while bytes move and while the
peer is not ready; steps that pipehc recorded tell the two apart. Which kernels counted as communication is printed; those of
libraries that are not known count as computation, until --communication names them. Recomputation is found in GPU traces by the
ranges that trace.nvtx opens.
"""

from __future__ import annotations

import argparse
import json
import re
import sqlite3
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipehc.watch.profiles import files, nsight, recorded, torch_profiler
from pipehc.watch.profiles.model import Hints, Rank


def main(arguments: list[str] | None = None) -> int:
    """Returns 0, or 2 after an error that the user can mend, told in a sentence on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m pipehc.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--step", metavar="N[-M][,...]", help="only these steps")
    parser.add_argument("--communication", metavar="REGEX", help="kernels that communicate, besides the known ones")
    parser.add_argument("--high-streams", default="", metavar="7,20", help="of a GPU trace that does not say")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    try:
        wanted = None if options.step is None else _steps(options.step)
        hints = Hints(_streams(options.high_streams), _pattern(options.communication))
        ranks = _named([(path, rank) for path in options.files for rank in read(path, hints)])
        ranks = ranks if wanted is None else _chosen(ranks, wanted)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps([asdict(rank) | {"bubble": rank.bubble} for rank in ranks], indent=1))
    else:
        show(ranks, Console(width=None if sys.stdout.isatty() else 160))
    return 0


def read(path: Path, hints: Hints | None = None) -> list[Rank]:
    """The rows of one file, of any of the three kinds. Raises ValueError, naming the file, for others; OSError."""
    hints = hints or Hints()
    if files.is_sqlite(path):
        try:
            return nsight.read(path, hints)
        except sqlite3.Error as error:
            raise ValueError(f"{path}: is no export of Nsight Systems: {error}") from None
    data = files.load(path)
    if isinstance(data, dict) and "traceEvents" in data:
        return torch_profiler.read(path, data, hints)
    if isinstance(data, list) and any(isinstance(event, dict) and "ph" in event for event in data):
        return torch_profiler.read(path, data, hints)
    if isinstance(data, dict) and "spans" in data:
        return recorded.read(path, data)
    raise ValueError(f"{path}: is JSON, but neither a Chrome trace (no traceEvents) nor a step that pipehc recorded (no spans)")


def show(ranks: Sequence[Rank], console: Console) -> None:
    """Prints a table, the largest losses of each row in words, what counted as communication, and what to know of the figures."""
    table = Table(box=None, pad_edge=False)
    headings = ("", "step ms", "compute", "bubble", "communication", "exposed", "copies", "recompute", "hidden", "high delay")
    for heading in headings:
        table.add_column(heading, justify="right" if heading else "left", no_wrap=not heading)
    for r in ranks:
        parts = (_part(ms, r.total) for ms in (r.compute, r.bubble, r.communication, r.exposed, r.copies, r.recompute))
        hidden = f"{r.hidden:.1f} ({100 * r.hidden / r.recompute:.0f} %)" if r.recompute else ""
        high_delay = "-" if r.high_delay is None else _ms(r.high_delay, r.total)
        table.add_row(escape(r.name), _ms(r.total, r.total), *parts, hidden, high_delay)
    console.print(table)
    lines = []
    for r in ranks:
        losses = "; ".join(f"{_ms(loss.ms, r.total)} ms ({100 * loss.ms / r.total:.1f} %): {loss.why}" for loss in r.largest())
        lines.append(f"{r.name} lost {losses}" if losses else f"{r.name} lost nothing worth a word")
    for r in ranks:
        if r.messages is not None:
            found = ", ".join(f"{m.name} {_ms(m.ms, r.total)} ms ({m.count})" for m in r.messages)
            lines.append(f"{r.name} counted as communication: {found or 'no kernel; --communication REGEX names yours'}")
    lines += list(dict.fromkeys(f"note: {note}" for r in ranks for note in r.notes))
    for line in lines:
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def _ms(ms: float, total: float) -> str:
    return f"{ms:.{1 if total >= 1 else 4}f}"


def _part(ms: float, total: float) -> str:
    return f"{_ms(ms, total)} ({100 * ms / total:.1f} %)" if total else "0"


def _steps(text: str) -> set[int]:
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,9})(?:-(\d{1,9}))?\s*", part)
        if match is None or int(match[2] or match[1]) - int(match[1]) not in range(1_000_000):
            raise ValueError(f"--step {text}: must be a step, a range of them or several, such as 12 or 12-14,20")
        found.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return found


def _streams(text: str) -> frozenset[int]:
    try:
        return frozenset(int(stream) for stream in text.split(",") if stream.strip())
    except ValueError:
        raise ValueError(f"--high-streams {text}: must be numbers of streams, such as 7,20") from None


def _pattern(text: str | None) -> re.Pattern[str] | None:
    try:
        found = None if text is None else re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"--communication {text}: must be a regular expression: {error}") from None
    if found is not None and found.search(""):
        raise ValueError(f"--communication {text!r}: matches every name; must match those of kernels that communicate")
    return found


def _named(found: Sequence[tuple[Path, Rank]]) -> list[Rank]:
    """With the file before names that rows of several files have."""
    times = Counter(rank.name for _, rank in found)
    return [replace(rank, name=f"{path} {rank.name}") if times[rank.name] > 1 else rank for path, rank in found]


def _chosen(ranks: list[Rank], wanted: set[int]) -> list[Rank]:
    """The rows of the steps wanted. Raises ValueError if there is none."""
    there = sorted({rank.step for rank in ranks if rank.step is not None})
    chosen = [rank for rank in ranks if rank.step in wanted]
    if not chosen:
        what = f"there are {', '.join(map(str, there))}" if there else "the files do not number their steps"
        raise ValueError(f"--step: no such step; {what}")
    return chosen


if __name__ == "__main__":
    sys.exit(main())
