"""What `--search` is asked for on the command line, checked before anything takes long."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

from pipehc.config.loading import to_yaml
from pipehc.config.schema import Config
from pipehc.config.strict_yaml import ConfigError
from pipehc.planning.dry_run import command
from pipehc.planning.dry_run.hardware import Hardware


class Question(NamedTuple):
    """memory_gib: of each GPU. write: a file that does not exist, for the fastest configuration."""

    gpus: int
    memory_gib: float
    hardware: Hardware
    imbalance: float
    write: str | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("search", "the fastest layout over a number of GPUs; every time is simulated")
    group.add_argument("--search", action="store_true", help="search for one; takes --gpu and --imbalance, too")
    group.add_argument("--gpus", metavar="N", help="how many GPUs")
    group.add_argument("--memory", metavar="GIB", help="memory of each (default: that of --gpu); with --recomputation, too")
    group.add_argument("--write", metavar="FILE", help="write the configuration of the fastest; FILE must not exist")


def asked(args: argparse.Namespace) -> bool:
    """Whether there is a search to make. Raises ConfigError for its arguments without it, or others with it."""
    own = ("gpus", "write") if args.recomputation else ("gpus", "memory", "write")
    given = [name for name in own if getattr(args, name) is not None]
    if given and not args.search:
        also = " or --recomputation" if given[0] == "memory" else ""
        raise ConfigError(f"--{given[0]} {getattr(args, given[0])}: only with --search{also}")
    for name in ("dry_run", "ranks", "html") if args.search else ():
        if getattr(args, name):
            raise ConfigError(f"--{name.replace('_', '-')}: not with --search")
    return args.search


def question(args: argparse.Namespace) -> Question:
    """Raises ConfigError that names flag, value and what is allowed."""
    hardware, _, imbalance = command.asked(args)
    if args.gpus is None:
        raise ConfigError("--search: needs --gpus N, the number of GPUs")
    try:
        gpus = int(args.gpus)
    except ValueError:
        gpus = 0
    if not 1 <= gpus <= MOST:
        raise ConfigError(f"--gpus {args.gpus}: must be a whole number from 1 to {MOST}")
    given = memory(args)
    if args.write is not None:
        path = Path(args.write)
        if path.exists() or path.is_symlink():
            raise ConfigError(f"--write {args.write}: exists; must be a new file")
        if not path.name or not path.absolute().parent.is_dir():
            raise ConfigError(f"--write {args.write}: must be a new file in a folder that exists")
    return Question(gpus, hardware.memory_gib if given is None else given, hardware, imbalance, args.write)


def memory(args: argparse.Namespace) -> float | None:
    """GiB of a GPU, if --memory says so. Raises ConfigError."""
    if args.memory is None:
        return None
    try:
        found = float(args.memory)
    except ValueError:
        found = 0.0
    if not 0 < found < float("inf"):
        raise ConfigError(f"--memory {args.memory}: must be a number of GiB above 0")
    return found


MOST = 1_000_000  # a typing error must not search for ages


def write(config: Config, path: str) -> None:
    """Writes it to a new file. Raises ConfigError if that cannot be."""
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(to_yaml(config))
    except OSError as error:
        raise ConfigError(f"--write {path}: cannot be written: {error}") from error
