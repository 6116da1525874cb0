"""Command line: python -m pipehc.schedules show dualpipe --ranks 8 --microbatches 20 [--html FILE ...]"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from pipehc.schedules.auto import auto_report
from pipehc.schedules.check import ScheduleError
from pipehc.schedules.compile import compile
from pipehc.schedules.costs import Costs
from pipehc.schedules.draw import Timeline, chrome_trace, page, png, recorded, simulated, svg
from pipehc.schedules.families import FAMILIES, build
from pipehc.schedules.recording import Recording, measured_costs
from pipehc.schedules.schedule import Schedule

_TIMES = {
    "f": ("forward", 1.0),
    "b": ("input gradient (a full backward is b + w)", 1.0),
    "w": ("weight gradient", 1.0),
    "r": ("recompute; if it is not 0, every backward has one", 0.0),
    "high": ("part of f and of b on the high-priority queue; if it is not 0, the program uses that queue", 0.0),
    "pair": ("an overlapped forward and full backward, together (default f + b + w)", None),
    "link": ("time a message holds its directed link", 0.0),
    "latency": ("added after it", 0.0),
}


_SIZES = ("ranks", "microbatches", "chunks", "forward")
_SEARCH = ("max_live", "placements", "time_limit", "seed")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command. Returns 0, or 2 after an error that the user can mend, told in a sentence on stderr."""
    options = _parser().parse_args(arguments)
    try:
        _show(options)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        head = "error: cannot run this schedule: " if isinstance(error, ScheduleError) else "error: "
        print(f"{head}{error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pipehc.schedules", description="Generates, simulates and draws schedules.")
    show = parser.add_subparsers(required=True, metavar="show").add_parser(
        "show", help="draw a schedule in the terminal, or to files"
    )
    what = f"{', '.join(FAMILIES)}, auto (a search), a CSV file, or recorded steps (JSON files, one or more)"
    show.add_argument("names", nargs="+", metavar="NAME", help=what)
    show.add_argument("--step", type=int, metavar="N", help="only this one of the recorded steps")
    show.add_argument("--ranks", type=int, metavar="P", help="pipeline ranks (not for a CSV file)")
    show.add_argument("--microbatches", type=int, metavar="M", help="micro-batches of one step, both directions together")
    show.add_argument("--chunks", type=int, metavar="V", help="stages per rank, for interleaved")
    show.add_argument("--forward", action="store_true", help="forwards only (evaluation)")
    show.add_argument("--compare", metavar="NAME2", help="a second schedule below the first, on the same time scale")
    times = show.add_argument_group("costs", "times of 1/P of the model for one micro-batch, in any unit")
    for name, (text, default) in _TIMES.items():
        times.add_argument(f"--{name}", type=float, default=default, help=text)
    search = show.add_argument_group("auto")
    search.add_argument("--max-live", type=float, metavar="N", help="activations of 1/P of the model that fit on a rank")
    search.add_argument("--placements", metavar="P,P", help="where stages may lie (default: linear,v,bidirectional)")
    search.add_argument("--time-limit", type=float, metavar="S", help="seconds (default: 10)")
    search.add_argument("--seed", type=int, metavar="N", help="default: 0")
    files = show.add_argument_group("files", "written instead of the grid in the terminal; several may be given")
    for name in ("csv", "svg", "png", "html"):
        files.add_argument(f"--{name}", metavar="FILE")
    files.add_argument("--trace", metavar="FILE", help="Chrome trace JSON, for ui.perfetto.dev")
    return parser


def _show(options: argparse.Namespace) -> None:
    recordings = [Recording.load(name) for name in options.names if name.endswith(".json")]
    timelines = _of_recordings(recordings, options) if recordings else _of_schedules(options)
    if timelines and not _write(timelines, options):
        from rich.console import Console

        from pipehc.schedules.draw.terminal import show

        # A pipe or a file has no width of its own: rich would take 80 columns.
        show(timelines, Console() if sys.stdout.isatty() else Console(width=160))


def _of_schedules(options: argparse.Namespace) -> list[Timeline]:
    """Simulations; none if only a CSV file was asked for, which is written."""
    if len(options.names) > 1:
        raise ValueError(f"{' '.join(options.names)}: several names are for recorded steps; a second schedule is --compare NAME2")
    if options.step is not None:
        raise ValueError(f"--step {options.step}: is for recorded steps")
    names = options.names + ([options.compare] if options.compare else [])
    if "auto" not in names:
        _refuse(options, _SEARCH, "only auto takes it")
    if all(name.endswith(".csv") for name in names):
        _refuse(options, _SIZES, "a CSV file has its own schedule")
    costs = Costs(**{name: getattr(options, name) for name in _TIMES})
    schedules = [_schedule(name, options, costs) for name in names]
    if _only_csv(schedules, options):
        return []
    return [simulated(compile(schedule, recompute=costs.r > 0, high=costs.high > 0), costs) for schedule in schedules]


def _refuse(options: argparse.Namespace, names: Iterable[str], why: str) -> None:
    """ValueError for the first of these options that was given."""
    for name in names:
        value, default = getattr(options, name), _TIMES[name][1] if name in _TIMES else None
        if value != default and value is not False:
            raise ValueError(f"--{name.replace('_', '-')} {value}: {why}")


def _of_recordings(recordings: list[Recording], options: argparse.Namespace) -> list[Timeline]:
    """Every recorded step below its own simulation, with the times that it took on average."""
    others = [name for name in options.names if not name.endswith(".json")]
    if others or options.compare:
        raise ValueError(f"{others[0] if others else '--compare'}: recorded steps are shown below their own simulations, alone")
    _refuse(options, (*_SIZES, *_SEARCH, *_TIMES), "recorded steps have their own")
    if options.step is not None:
        there = ", ".join(sorted({str(r.step) for r in recordings if r.step is not None})) or "files that do not number them"
        recordings = [recording for recording in recordings if recording.step == options.step]
        if not recordings:
            raise ValueError(f"--step {options.step}: no such step; there are {there}")
    if _only_csv([recording.schedule for recording in recordings], options):
        return []
    timelines = []
    for recording in recordings:
        predicted = simulated(recording.program(), measured_costs(recording), f"predicted: {recording.title}")
        timelines.append(replace(predicted, unit="ms", where=recording.where))
        timelines.append(recorded(recording.spans, f"measured: {recording.title}", where=recording.where))
    return timelines


def _only_csv(schedules: list[Schedule], options: argparse.Namespace) -> bool:
    """Writes the CSV file if one was asked for. Returns whether it was all."""
    if options.csv:
        if len(schedules) > 1:
            raise ValueError(f"--csv {options.csv}: holds one schedule, and there are {len(schedules)}")
        schedules[0].to_csv(options.csv)
    return bool(options.csv) and not (options.svg or options.png or options.html or options.trace)


def _schedule(name: str, options: argparse.Namespace, costs: Costs) -> Schedule:
    if name.endswith(".csv"):
        return Schedule.from_csv(name)
    missing = [f"--{key}" for key in ("ranks", "microbatches") if getattr(options, key) is None]
    if missing and (name in FAMILIES or name == "auto"):
        raise ValueError(f"{name}: needs {' and '.join(missing)}")
    if name == "auto":
        if options.forward:
            raise ValueError("auto: searches training steps; for --forward name a family")
        places = tuple((options.placements or "linear,v,bidirectional").split(","))
        limit = 10.0 if options.time_limit is None else options.time_limit
        found = auto_report(options.ranks, options.microbatches, costs, options.max_live, places, limit, options.seed or 0)
        best = "" if found.named is None else f"; best named schedule {found.named}: {found.named_makespan:g}"
        print(f"auto: step {found.makespan:g}, proven lower bound {found.lower_bound:g}{best}", file=sys.stderr)
        return found.schedule
    # In a comparison, chunks are meant for the one schedule that takes them.
    chunks = None if options.compare and name in FAMILIES and FAMILIES[name].chunks is None else options.chunks
    # An unknown name is told first: then nobody has asked for sizes.
    sizes = (1 if size is None else size for size in (options.ranks, options.microbatches))
    return build(name, *sizes, chunks=chunks, forward=options.forward)


def _write(timelines: list[Timeline], options: argparse.Namespace) -> bool:
    """Writes the files asked for. Returns whether there was one."""
    for path, make in ((options.svg, svg), (options.html, page), (options.trace, chrome_trace)):
        if path:
            Path(path).write_text(make(timelines), encoding="utf-8")
    if options.png:
        png(timelines, options.png)
    return any((options.svg, options.html, options.trace, options.png))


if __name__ == "__main__":
    sys.exit(main())
