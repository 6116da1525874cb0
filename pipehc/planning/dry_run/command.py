"""What the commands share that make dry runs: their flags, and what they print."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console

from pipehc.config.strict_yaml import ConfigError
from pipehc.planning.dry_run.hardware import Hardware, load_hardware

if TYPE_CHECKING:
    from pipehc.planning.dry_run.summary import DryRun
    from pipehc.schedules import Costs


class Asked(NamedTuple):
    """ranks: pipeline ranks to run; None: those that differ."""

    hardware: Hardware
    ranks: tuple[int, ...] | None
    imbalance: float


def add_arguments(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--gpu", default="h100", metavar="GPU", help="a100, b200, h100, h200 or a .yaml file (default: %(default)s)"
    )
    parser.add_argument("--ranks", metavar="R,R", help="pipeline ranks to run (default: those that differ)")
    parser.add_argument(
        "--imbalance", default="1", metavar="X", help="rows of the busiest rank's experts, of the mean (default: 1)"
    )
    parser.add_argument("--html", metavar="FILE", help="draw the simulated step")
    parser.add_argument("--costs", metavar="FILE", help="only write what every stage costs: JSON, for Costs.from_json")


def asked(args: argparse.Namespace, size: int | None = None, key: str = "") -> Asked:
    """Raises ConfigError that names flag, value and what is allowed.

    size, key: how many pipeline ranks there are, and what says it; without it `check_ranks` is to be called when it is known.
    """
    hardware = load_hardware(args.gpu)
    ranks = None
    if args.ranks is not None:
        ranks = tuple(_number(text, f"--ranks {args.ranks}", int, _allowed(size, key)) for text in args.ranks.split(","))
        if size is not None:
            check_ranks(ranks, size, key)
    imbalance = _number(args.imbalance, f"--imbalance {args.imbalance}", float, "a number from 1 on")
    if not 1 <= imbalance < float("inf"):
        raise ConfigError(f"--imbalance {args.imbalance}: must be a number from 1 on")
    return Asked(hardware, ranks, imbalance)


def check_ranks(ranks: Sequence[int] | None, size: int, key: str) -> None:
    """ConfigError for pipeline ranks that there are not."""
    if ranks is not None and not all(0 <= rank < size for rank in ranks):
        raise ConfigError(f"--ranks {','.join(map(str, ranks))}: must be {_allowed(size, key)}")


def _allowed(size: int | None, key: str) -> str:
    return f"pipeline ranks{'' if size is None else f' from 0 to {key} - 1 = {size - 1}'}, with commas between them"


def show(found: DryRun, plain: DryRun | None, args: argparse.Namespace) -> None:
    """Prints a dry run, and draws it if asked. plain: the same with the plain residual."""
    from pipehc.planning.dry_run.report import show as show_tables
    from pipehc.planning.dry_run.summary import summary

    result = summary(found)
    without = None if plain is None else summary(plain)
    if args.html:
        _draw(found, args.html)
    if args.json:
        print(json.dumps(result | {"plain_residual": without}, indent=2))
    else:
        show_tables(result, without, console())


def console() -> Console:
    """For tables. A pipe or a file has no width of its own: rich would take 80 columns."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 100)


def write_costs(costs: Costs, path: str) -> None:
    try:
        Path(path).write_text(costs.to_json() + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--costs {path}: cannot be written: {error}") from error


def _draw(dry: DryRun, path: str) -> None:
    from pipehc.schedules.draw.page import page
    from pipehc.schedules.draw.timeline import simulated

    if dry.step is None:
        raise ConfigError("--html: the step is not simulated without all stages: leave out --ranks")
    title = f"{dry.job.schedule} on {dry.hardware.name}: simulated from a dry run"
    try:
        Path(path).write_text(page([replace(simulated(dry.program, dry.step.costs, title), unit="ms")]), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--html {path}: cannot be written: {error}") from error


def _number(text: str, given: str, type: Callable[[str], Any], allowed: str) -> Any:
    try:
        return type(text)
    except ValueError:
        raise ConfigError(f"{given}: must be {allowed}") from None
