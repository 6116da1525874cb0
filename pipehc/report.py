"""Says where the time of a step went, per rank: computing, bubble, communication, recomputation, and the three largest losses.

    python -m pipehc.report runs/x/trace/step-000012.json          a step that pipehc recorded (trace.steps)
    python -m pipehc.report rank0.json rank1.json.gz               Chrome traces of torch.profiler, a file a rank
    python -m pipehc.report report.sqlite                          Nsight Systems: nsys export --type sqlite report.nsys-rep

`exposed` is communication that no computation hides. A GPU's communication kernel looks the same while bytes move and while the
peer is not ready; steps that pipehc recorded tell the two apart. Recomputation is found in GPU traces by the ranges that
trace.nvtx opens.
"""

from __future__ import annotations

import argparse
import json
import sqlite3
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pipehc.watch.profiles import nsight, recorded, torch_profiler
from pipehc.watch.profiles.model import Rank


def main(arguments: list[str] | None = None) -> int:
    """Returns 0, or 2 after an error that the user can mend, told in a sentence on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m pipehc.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--high-streams", default="", metavar="7,20", help="of a GPU trace that does not say")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    try:
        high = {int(stream) for stream in options.high_streams.split(",") if stream}
        ranks = [rank for path in options.files for rank in read(path, high)]
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps([asdict(rank) | {"bubble": rank.bubble} for rank in ranks], indent=1))
    else:
        show(ranks, Console(width=None if sys.stdout.isatty() else 140))
    return 0


def read(path: Path, high: set[int] = frozenset()) -> list[Rank]:  # type: ignore[assignment]
    """The ranks of one file, of any of the three kinds. Raises ValueError, naming the file, for others."""
    if path.suffix in (".sqlite", ".db"):
        try:
            return nsight.read(path, set(high))
        except sqlite3.Error as error:
            raise ValueError(f"{path}: no export of Nsight Systems: {error}") from None
    try:
        data = torch_profiler.load(path)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: neither JSON nor SQLite: {error}") from None
    if isinstance(data, dict) and "traceEvents" in data:
        return torch_profiler.read(path, set(high))
    return recorded.read(path)


def show(ranks: Sequence[Rank], console: Console) -> None:
    """Prints a table, then the largest losses of each rank in words."""
    table = Table(box=None, pad_edge=False)
    for heading in ("", "step ms", "compute", "bubble", "communication", "exposed", "recompute", "hidden", "high delay"):
        table.add_column(heading, justify="right" if heading else "left")
    for r in ranks:
        times = (_part(ms, r.total) for ms in (r.compute, r.bubble, r.communication, r.exposed, r.recompute))
        hidden = f"{r.hidden:.1f} ({100 * r.hidden / r.recompute:.0f} %)" if r.recompute else ""
        table.add_row(r.name, f"{r.total:.1f}", *times, hidden, f"{r.high_delay:.1f}")
    console.print(table)
    for r in ranks:
        losses = "; ".join(f"{loss.ms:.1f} ms ({100 * loss.ms / r.total:.1f} %): {loss.why}" for loss in r.largest())
        console.print(f"{r.name} lost {losses}" if losses else f"{r.name} lost nothing worth a word", soft_wrap=True)


def _part(ms: float, total: float) -> str:
    return f"{ms:.1f} ({100 * ms / total:.1f} %)" if total else "0"


if __name__ == "__main__":
    sys.exit(main())
