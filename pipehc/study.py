"""Repeats a study of the papers: python -m pipehc.study NAME [--scale small|paper] [--seeds N] [--out DIR] [section.key=value ...]

NAME is ablation, init, overhead, retrieval, scaling or stability. Every run is an ordinary training with a folder of its own,
OUT/runs/RUN. What is over is never run again: stopped or killed, the same command goes on. At the end OUT holds report.md,
results.csv and figures. `small` is made for two cores and minutes; `paper` has the papers' sizes, for GPUs:

    python -m pipehc.study scaling --scale paper --launch 'torchrun --nproc-per-node 8' 'data.paths=[DATA/corpus_text_document]'
"""

from __future__ import annotations

import argparse
import fcntl
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from rich.console import Console

from pipehc.config.strict_yaml import ConfigError
from pipehc.studies.asked import Place, check_overrides
from pipehc.studies.catalogue import STUDIES
from pipehc.studies.document import check_matplotlib, rows_of, show, write_all
from pipehc.studies.facts import facts
from pipehc.studies.runner import Runner, StudyError

_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0; 1 when a run failed; 2 for a question that cannot be answered; 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="python -m pipehc.study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("name", metavar="NAME", help=", ".join(STUDIES))
    parser.add_argument("overrides", metavar="section.key=value", nargs="*", help="for every run; not what the runs differ in")
    parser.add_argument("--scale", default="small", choices=("small", "paper"), help="default: %(default)s")
    parser.add_argument("--seeds", metavar="N", help="seeds 1 to N (default: what the study says)")
    parser.add_argument("--out", metavar="DIR", type=Path, help="default: runs/study-NAME-SCALE")
    parser.add_argument("--jobs", metavar="N", help="runs at a time (default: one a core; with --launch 1)")
    parser.add_argument("--launch", metavar="COMMAND", default="", help="what starts a run: COMMAND -m pipehc.train ...")
    parser.add_argument(
        "--configs", metavar="DIR", type=Path, default=Path("configs"), help="of the papers' sizes (default: %(default)s)"
    )
    args = parser.parse_intermixed_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 160)
    given = sys.argv[1:] if argv is None else list(argv)
    try:
        return _study(args, shlex.join(["python", "-m", "pipehc.study", *given]), console)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except StudyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped: what is over is kept, the same command goes on", file=sys.stderr)
        return _INTERRUPTED


def _study(args: argparse.Namespace, command: str, console: Console) -> int:
    if args.name not in STUDIES:
        raise ConfigError(f"NAME {args.name}: must be one of {', '.join(STUDIES)}")
    study = STUDIES[args.name]
    if args.seeds is not None and not study.seeds[args.scale]:
        raise ConfigError(f"--seeds {args.seeds}: {study.name} trains nothing, so it has no seeds")
    seeds = study.seeds[args.scale] if args.seeds is None else _count(args.seeds, "--seeds")
    cores = os.cpu_count() or 1
    jobs = (1 if args.launch or not study.side_by_side else cores) if args.jobs is None else _count(args.jobs, "--jobs")
    check_matplotlib()
    runs = study.runs(args.scale, seeds)
    check_overrides(runs, args.overrides)
    out = args.out or Path("runs") / f"study-{study.name}-{args.scale}"
    place = Place(out, args.configs, tuple(args.overrides))
    with _occupied(out):
        outcomes = Runner(study, place, jobs, shlex.split(args.launch), console).outcomes(runs)
        rows = rows_of(study, outcomes)
        report = study.summarise(rows)
        write_all(study, report, rows, outcomes, facts(command, outcomes), out)
    show(report, console)
    console.print(f"report.md, results.csv and figures are in {out}", markup=False, highlight=False)
    return 0


def _count(text: str, flag: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 1000:
        raise ConfigError(f"{flag} {text}: must be a whole number from 1 to 1000")
    return int(text)


def _occupied(out: Path) -> BinaryIO:
    """Holds the folder against a second study until the file is closed or this process is gone."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / ".lock", "ab")  # noqa: SIM115 - the caller closes it
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(f"--out {out}: another study runs there; must be a folder of its own") from None
    except OSError as error:
        raise ConfigError(f"--out {out}: {error.strerror}; must be a folder to write into") from error
    return lock


if __name__ == "__main__":
    sys.exit(main())
