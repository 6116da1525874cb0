"""The papers' pictures of runs, from what `diagnostics.interval` and the trainer wrote into their folders.

    python -m pipehc.diagnostics runs/a runs/b                   tables of the last diagnosed step, and the course over steps
    python -m pipehc.diagnostics runs/a runs/b --png a.png       one picture
    python -m pipehc.diagnostics runs/a runs/b --html a.html     one page, without network: pictures, tables, warnings

RUN is a run folder or a file diagnostics.jsonl. Gaps of the loss are to the first one. Pictures need matplotlib:
pip install 'pipehc[viz]'.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from pipehc.watch.pictures.panel import Chosen
from pipehc.watch.pictures.run import read_runs
from pipehc.watch.pictures.terminal import show


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0, or 2 after an error that the user can mend, told in a sentence on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m pipehc.diagnostics", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--step", type=int, metavar="N", help="the diagnosed step whose depth is shown (default: the last one)")
    parser.add_argument("--maps", metavar="L,L", help="sub-layers whose maps are drawn, from 0 (default: first, middle, last)")
    parser.add_argument("--png", type=Path, metavar="FILE", help="write one picture instead of printing tables")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page instead of printing tables")
    options = parser.parse_args(arguments)
    try:
        _run(options)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _run(options: argparse.Namespace) -> None:
    chosen = [Chosen(number, run, run.at(options.step)) for number, run in enumerate(read_runs(options.runs))]
    sublayers = _sublayers(options.maps, max(one.line.sublayers for one in chosen))
    if options.png:
        from pipehc.watch.pictures.figure import save_png  # needs an extra

        save_png(chosen, options.png, sublayers)
    if options.html:
        from pipehc.watch.pictures.page import page

        options.html.write_text(page(chosen, sublayers), encoding="utf-8")
    if not options.png and not options.html:
        show(chosen, Console(width=None if sys.stdout.isatty() else 140))


def _sublayers(text: str | None, deepest: int) -> list[int] | None:
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) < deepest for part in parts):
        raise ValueError(f"--maps {text}: must be sub-layers from 0 to {deepest - 1}, such as 0,{deepest // 2}")
    return [int(part) for part in parts]


if __name__ == "__main__":
    sys.exit(main())
