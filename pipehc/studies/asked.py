"""What the user asked for, as a configuration a run: bases, settings, overrides; and whether a folder holds that same run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipehc.config.loading import load_config, to_yaml
from pipehc.config.messages import show
from pipehc.config.schema import Config
from pipehc.config.strict_yaml import ConfigError
from pipehc.studies.run import Run

CONFIG = "config.yaml"
_SMALL = Path(__file__).parent / "small.yaml"


@dataclass(frozen=True)
class Place:
    """out: of the study.  configs: the folder of the papers' configurations.  overrides: of the user, for every run."""

    out: Path
    configs: Path = Path("configs")
    overrides: tuple[str, ...] = ()

    def folder(self, run: Run) -> Path:
        return self.out / "runs" / run.name


def configuration(run: Run, place: Place) -> Config:
    """Raises ConfigError, naming the run, for what cannot be trained."""
    base = _SMALL if run.base == "small" else place.configs / run.base
    if not base.is_file():
        raise ConfigError(
            f"--configs {place.configs}: no file {run.base}; must be the folder of the papers' configurations, `configs`"
        )
    folder = f"run.folder={json.dumps(str(place.folder(run).resolve()))}"
    try:
        return load_config(base, [*run.settings, *place.overrides, folder])
    except ConfigError as error:
        raise ConfigError(f"run {run.name}: {error}") from None


def check_overrides(runs: Sequence[Run], overrides: Sequence[str]) -> None:
    """Raises ConfigError for a key by which the runs of the study differ, and for those that are not the user's to set."""
    settings = [dict(setting.split("=", 1) for setting in run.settings) for run in runs]
    for override in overrides:
        key = override.partition("=")[0].strip()
        if len({values.get(key) for values in settings}) > 1:
            raise ConfigError(f"override {override!r}: the runs of this study differ in {key}; must be a key in which they do not")
        if key == "run.folder":
            raise ConfigError(f"override {override!r}: a run's folder has its name; --out chooses the folder of all")


def check_parts(run: Run, config: Config, parts: int) -> None:
    """Raises ConfigError unless the end of every one of so many equal parts of the training is evaluated."""
    steps, interval = config.train.steps, config.evaluation.interval
    if steps % parts or not interval or steps // parts % interval:
        raise ConfigError(
            f"run {run.name}: train.steps: {steps} with evaluation.interval: {interval}: the study compares losses after every "
            f"1/{parts} of the steps; must be a multiple of {parts}, and that part of it of the interval"
        )


def compare(run: Run, config: Config, folder: Path) -> None:
    """Raises ConfigError if `folder` holds a run with another configuration (run.folder aside: a study may be moved)."""
    path = folder / CONFIG
    if not path.exists() or path.read_text() == to_yaml(config):
        return
    before, now = (_flat(c) for c in (load_config(path), config))
    different = [
        f"{key}: {show(before.get(key))} there, now {show(now.get(key))}" for key in now if before.get(key) != now.get(key)
    ]
    if different:
        raise ConfigError(
            "\n  ".join(
                [f"--out: {folder} holds run {run.name} with another configuration; must be the same, or another --out", *different]
            )
        )


def _flat(config: Config) -> dict[str, Any]:
    data = config.model_dump(mode="json")
    return {f"{s}.{k}": v for s, keys in data.items() for k, v in keys.items() if f"{s}.{k}" != "run.folder"}
