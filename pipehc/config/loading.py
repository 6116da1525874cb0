"""Configuration files to `Config`: reading, overrides, checks against processes and disk, command-line arguments."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipehc.comm.once import say_once
from pipehc.config.changes import EFFECTS, REFUSED, Effect
from pipehc.config.messages import keys, messages, nearest, sections, show
from pipehc.config.schema import Config, data_parallel_problems
from pipehc.config.strict_yaml import ConfigError, dump_yaml, parse_yaml, read_yaml

__all__ = [
    "Config",
    "ConfigError",
    "add_config_arguments",
    "check_data",
    "check_world_size",
    "load_config",
    "run_with_config",
    "to_yaml",
]


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The checked configuration of a YAML file, with `section.key=value` overrides (values in YAML; the last one of a key wins).

    Touches no other file: `check_data` does. Raises ConfigError with one message: a line for every problem, which names the key,
    the value and what is allowed.
    """
    data = read_yaml(path)
    if not isinstance(data, dict):
        what = "is empty" if data is None else f"holds {show(data)}"
        raise ConfigError(f"{path}: {what}; must be a mapping of sections: {', '.join(sections())}")
    for override in overrides:
        _apply(data, override)
    try:
        config = Config.model_validate(data)
        problems = list(_unknown_changes(config))
    except ValidationError as error:
        problems = [problem for detail in error.errors() for problem in messages(detail)]
    if problems:
        raise _error(str(path), problems)
    return config


def to_yaml(config: Config) -> str:
    """The configuration with every key, in YAML that loads back equal."""
    return dump_yaml(config.model_dump(mode="json"))


def check_world_size(config: Config, world_size: int) -> int:
    """The data-parallel size that `world_size` processes leave. Raises ConfigError if it does not fit the configuration."""
    parallel = config.parallel
    model_ranks = parallel.pp * parallel.tp
    layout = f"parallel.pp x tp = {parallel.pp} x {parallel.tp}"
    if parallel.dp is not None and world_size != model_ranks * parallel.dp:
        need = model_ranks * parallel.dp
        raise ConfigError(f"number of processes: {world_size}: must be {need} = {layout} x dp = {parallel.dp} (dp null: any)")
    if world_size < 1 or world_size % model_ranks:
        raise ConfigError(f"number of processes: {world_size}: must be a multiple of {layout} = {model_ranks}")
    dp = world_size // model_ranks
    if problems := list(data_parallel_problems(config, dp)):
        raise _error(f"on {world_size} processes", problems)
    return dp


def check_data(config: Config) -> None:
    """Raises ConfigError if data, tokenizer or the checkpoint to resume from is missing, or the run folder cannot be made."""
    if problems := list(_disk_problems(config)):
        raise _error("on this machine", problems)


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """`--config FILE`, overrides and `--print-config`; parse with `parser.parse_intermixed_args`, run with `run_with_config`."""
    parser.add_argument("--config", metavar="FILE", required=True, help="YAML file, see configs/")
    parser.add_argument("overrides", metavar="section.key=value", nargs="*", help="replaces a value of the file; a YAML value")
    parser.add_argument("--print-config", action="store_true", help="print the configuration with every key, and stop")


def run_with_config(args: argparse.Namespace, body: Callable[[Config], int]) -> int:
    """Loads the configuration that `args` names and runs `body` on it, or prints it with --print-config. Returns the exit code.

    A ConfigError, of loading or of `body`, is one message on standard error and exit code 2. Of several processes one speaks: all
    read the same files, so all fail alike.
    """
    try:
        config = load_config(args.config, args.overrides)
        if not args.print_config:
            return body(config)
    except ConfigError as error:
        # Whichever process comes first, not rank 0: torchrun stops the others as soon as one has ended.
        say_once(f"configuration error: {error}", "end")
        return 2
    if os.environ.get("RANK", "0") == "0":
        print(to_yaml(config), end="")
    return 0


def _apply(data: dict[Any, Any], override: str) -> None:
    """Sets one `section.key=value` in the mapping that was read."""
    shown = show(override)
    name, equals, text = override.partition("=")
    name = name.strip()
    if not equals:
        raise ConfigError(f"override {shown}: has no '='; must be section.key=value, for example train.steps=10")
    section, dot, key = name.partition(".")
    if not dot and section in sections():
        raise ConfigError(f"override {shown}: {section} is a whole section; set its keys: {', '.join(keys(section))}")
    if not dot or section not in sections() or key not in keys(section):
        raise ConfigError(f"override {shown}: unknown key {name!r}; {nearest(section, key)}")
    try:
        value = parse_yaml(text)
    except ConfigError as error:
        raise ConfigError(f"override {shown}: {error}") from None
    values = data.setdefault(section, {})
    if not isinstance(values, dict):
        raise ConfigError(f"{section}: {show(values)}: must be a section with the keys {', '.join(keys(section))}")
    values[key] = value


def _unknown_changes(config: Config) -> Iterator[str]:
    for name in config.checkpoint.allow_changes:
        if EFFECTS.get(name) in (Effect.NONE, Effect.TRAINING):
            yield f"checkpoint.allow_changes: {name!r}: a change of it needs no permission; must be keys that a resume refuses"
        elif name not in REFUSED:
            yield f"checkpoint.allow_changes: {name!r}: no such key; {nearest(*name.partition('.')[::2])}"


def _disk_problems(config: Config) -> Iterator[str]:
    data, checkpoint, run = config.data, config.checkpoint, Path(config.run.folder)
    for place in data.paths:
        if data.kind == "megatron":
            for suffix in (".bin", ".idx"):
                if not Path(place + suffix).is_file():
                    yield f"data.paths: {place!r}: no file {place + suffix}; must be a prefix of a .bin/.idx pair"
        elif not Path(place).exists():
            yield f"data.paths: {place!r}: does not exist; must be a text file or a folder"
        elif not os.access(place, os.R_OK):
            yield f"data.paths: {place!r}: cannot be read; must be a readable text file or folder"
        elif Path(place).is_dir() and not _holds_text(Path(place), data.suffixes):
            yield f"data.paths: {place!r}: holds no file with data.suffixes {list(data.suffixes)}; must hold at least one"
    if data.kind == "text" and data.tokenizer != "bytes" and not Path(data.tokenizer).is_file():
        yield f"data.tokenizer: {data.tokenizer!r}: no such file; must be 'bytes' or a Hugging Face tokenizers JSON file"
    # Of a training that started from there, what it has saved since is enough to go on.
    started = (run / "checkpoints").is_dir()
    if not started and checkpoint.resume not in ("auto", "never") and not Path(checkpoint.resume).is_dir():
        yield f"checkpoint.resume: {checkpoint.resume!r}: no such folder; must be auto, never or the folder of a checkpoint"
    if not started and checkpoint.weights is not None and not Path(checkpoint.weights).is_dir():
        yield f"checkpoint.weights: {checkpoint.weights!r}: no such folder; must be null or the folder of a checkpoint"
    if occupied := next((path for path in (run, *run.parents) if path.exists() and not path.is_dir()), None):
        yield f"run.folder: {config.run.folder!r}: {occupied} is a file; must be a folder, or a path where one can be made"


def _holds_text(folder: Path, suffixes: Sequence[str]) -> bool:
    return any(name.endswith(tuple(suffixes)) for _, _, names in os.walk(folder) for name in names)


def _error(source: str, problems: Sequence[str]) -> ConfigError:
    if len(problems) == 1:
        return ConfigError(f"{source}: {problems[0]}")
    return ConfigError("\n  ".join([f"{source}: {len(problems)} problems", *problems]))
