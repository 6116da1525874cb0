"""Where a training starts: anew, from weights alone, from a checkpoint that the user names, or where the run itself stood.

Every checkpoint carries the starts that led to it, so that the same command, after a crash or by torchrun, goes on instead of
starting over: what a run has saved since it started from PATH wins over PATH.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from pipehc.checkpoint import manifest
from pipehc.checkpoint.aside import free_name, set_aside
from pipehc.checkpoint.manifest import Manifest
from pipehc.checkpoint.store import Checkpoints
from pipehc.comm.once import job_id
from pipehc.comm.ranks import Ranks
from pipehc.config.changes import Change, Effect, changes, saved_values, unknown
from pipehc.config.messages import show
from pipehc.config.schema import Config
from pipehc.config.strict_yaml import ConfigError
from pipehc.data.batches import DataInfo
from pipehc.watch.metrics import DIAGNOSTICS, METRICS

if TYPE_CHECKING:
    from pipehc.trainer import Trainer

_WEIGHTS = ("weights.", "buffers.")  # of a trainer's state: what belongs to the model, without the optimizer


@dataclass(frozen=True)
class Origin:
    """One start of a run. `checkpoint` identifies the content that lay at `path`; `job` is the torchrun that made the start."""

    kind: Literal["new", "weights", "resume"]
    path: str | None
    checkpoint: str | None
    job: str | None


@dataclass(frozen=True)
class Start:
    """path: the checkpoint to load; None: none.  key: of the configuration, with its value, for messages.  own: it is what the
    run saved last.  origins: of all that will be saved.  notes: lines to say."""

    path: Path | None
    key: str
    own: bool
    weights_only: bool
    origins: tuple[Origin, ...]
    notes: tuple[str, ...]

    def state(self) -> list[dict[str, Any]]:
        """JSON-able, for checkpoints to carry as 'starts'."""
        return [asdict(origin) for origin in self.origins]


def choose(config: Config, checkpoints: Checkpoints, data: DataInfo, ranks: Ranks) -> Start:
    """Decides, and compares the checkpoint's configuration and data with these. Collective.

    Raises ConfigError, on every rank, for a checkpoint that cannot be used, or that another model or other data wrote.
    """
    try:
        job = ranks.on_main(job_id)
        anew = config.checkpoint.resume == "never" and job is None
        if config.checkpoint.resume != "never":
            ranks.on_main(lambda: _check_link(config, checkpoints.folder))
        newest = None if anew else checkpoints.newest()
        return ranks.on_main(lambda: _choose(config, newest, data, job))
    except ValueError as error:
        raise ConfigError(str(error)) from error


def load(start: Start, checkpoints: Checkpoints, trainer: Trainer) -> int:
    """Loads the checkpoint that was chosen, if one was. Returns the number of steps done. Collective; raises ConfigError."""
    if start.path is None:
        return 0
    state = trainer.state()
    try:
        if start.weights_only:
            weights = {name: tensor for name, tensor in state.items() if name.startswith(_WEIGHTS)}
            restored = checkpoints.load(start.path, weights, prefixes=_WEIGHTS)
        else:
            restored = checkpoints.load(start.path, state)
    except ValueError as error:
        raise ConfigError(f"{start.key}: {error}") from error
    trainer.after_load()
    if "feedback" in restored.extra:  # the s of Harmonized HC is part of the function that the weights were trained for
        trainer.feedback.load(restored.extra["feedback"])
    trainer.apply_feedback()
    if start.weights_only:
        return 0
    if restored.rank_state is not None:
        torch.set_rng_state(restored.rank_state["rng"])
    trainer.samples_seen = restored.extra["samples"]
    return restored.step


def make_room(start: Start, config: Config, checkpoints: Checkpoints, ranks: Ranks) -> None:
    """Sets aside what another course left in the run folder, lest it be pruned as old checkpoints of this one. Collective."""
    if start.own or config.checkpoint.resume == "auto":
        return
    files = [checkpoints.folder.parent / name for name in (METRICS, DIAGNOSTICS)]
    if start.path is not None and not start.weights_only and checkpoints.folder.resolve() in start.path.resolve().parents:
        if checkpoints.set_aside_later_than(start.path):  # a run that goes back
            for file in files:
                ranks.on_main(partial(_copy_aside, file))
        return
    for path in (checkpoints.folder, *files):
        ranks.on_main(partial(set_aside, path))


def _copy_aside(file: Path) -> None:
    if file.is_file():
        shutil.copy(file, free_name(file))


def _choose(config: Config, newest: Path | None, data: DataInfo, job: str | None) -> Start:
    wish, weights = config.checkpoint.resume, config.checkpoint.weights
    named = wish if wish not in ("auto", "never") else weights
    kind: Literal["new", "weights", "resume"] = "new" if named is None else "weights" if named == weights else "resume"
    key = f"checkpoint.resume: {wish!r}" if kind != "weights" else f"checkpoint.weights: {weights!r}"
    own = None if newest is None else manifest.read(newest)
    if newest is not None and own is not None:
        origins = tuple(Origin(**origin) for origin in own.extra.get("starts", ()))
        if (wish == "auto" and weights is None) or _came_from(origins, kind, named, job if wish == "never" else None):
            why = [] if named is None else [f"{key}: this run started there; to start there again, set another run.folder"]
            notes = _compare(config, own, newest, f"checkpoint.resume: {wish!r}", data)
            return Start(newest, key, True, False, origins, (*why, *notes))
        if wish == "auto":
            raise ValueError(
                f"{key}: {config.run.folder} holds a training, at step {own.step} in {newest.name}, that did not start there; set "
                "another run.folder, checkpoint.weights=null to go on with it, or checkpoint.resume=never to set it aside"
            )
    if named is None:
        return Start(None, key, False, False, (Origin("new", None, None, job),), ())
    path = Path(named)
    own_folder = (Path(config.run.folder) / "checkpoints").resolve()
    if kind == "weights" and own_folder in path.resolve().parents:
        raise ValueError(f"{key}: lies in the run folder itself; set another run.folder for the new training")
    found = _read(path, key)
    notes = _compare(config, found, path, key, data, weights_only=kind == "weights")
    origin = Origin(kind, str(path.resolve()), manifest.identity(path), job)
    if kind == "weights":
        notes = [f"starting with the weights of {path}, as they were after step {found.step}", *notes]
        return Start(path, key, False, True, (origin,), tuple(notes))
    earlier = tuple(Origin(**origin) for origin in found.extra.get("starts", ()))
    return Start(path, key, False, False, (*earlier, origin), tuple(notes))


def _check_link(config: Config, folder: Path) -> None:
    """A disk that is not mounted must not make a run start over."""
    if folder.is_symlink() and not folder.exists():
        raise ValueError(
            f"run.folder: {config.run.folder!r}: its {folder.name} is a link to {folder.readlink()}, which is not there; must lead "
            "to the checkpoints (checkpoint.resume=never sets the link aside)"
        )


def _came_from(origins: Iterable[Origin], kind: str, named: str | None, job: str | None) -> bool:
    """Whether one of these starts is the one that the configuration asks for.

    job: the torchrun that must have made it, where every new one is to start anew (checkpoint.resume=never).
    """
    place = named and str(Path(named).resolve())
    # What lay at the place may have been pruned or moved since, so either will do.
    content = manifest.identity(Path(named)) if named and (Path(named) / manifest.NAME).is_file() else None
    return any(
        origin.kind == kind
        and (job is None or origin.job == job)
        and (origin.path == place or (content is not None and origin.checkpoint == content))
        for origin in origins
    )


def _read(path: Path, key: str) -> Manifest:
    try:
        return manifest.read(path)
    except ValueError as error:
        folders = [path, path / "checkpoints"]
        inside = sorted(str(found.parent) for folder in folders for found in folder.glob(f"step-*/{manifest.NAME}"))
        hint = f"; it holds checkpoints, name one of them: {', '.join(inside)}" if inside else ""
        raise ValueError(f"{key}: {error}{hint}") from None


def _compare(
    config: Config, found: Manifest, path: Path, key: str, data: DataInfo, weights_only: bool = False
) -> list[str]:
    """Lines on what differs from the configuration and data of a checkpoint. Raises ValueError for what must not."""
    saved, extra = saved_values(found.extra.get("config")), found.extra
    if not weights_only and (lacks := [name for name in ("data", "samples", "feedback") if name not in extra]):
        raise ValueError(f"{key}: {path} was not written by this trainer: it lacks {', '.join(lacks)}")
    notes = []
    if saved is None:
        notes.append(f"{path} does not say with which configuration it was written: that its model is this one is taken on trust")
    elif strange := unknown(saved):
        notes.append(f"{path} was written with keys that this version does not have: {', '.join(strange)}")
    different = changes(saved, config) if saved is not None else []
    critical = [change for change in different if change.effect is Effect.MODEL]
    critical += _data_changes(config, different, extra, data, weights_only)
    refused = [change for change in critical if change.key not in config.checkpoint.allow_changes]
    if refused:
        raise ValueError(_refusal(refused, key, path, weights_only))
    other = [] if weights_only else [change for change in different if change not in critical]
    if said := [*critical, *other]:
        notes.append("changed since the checkpoint: " + ", ".join(_text(change, " -> ") for change in said))
    return notes


def _data_changes(
    config: Config, different: list[Change], extra: dict[str, Any], data: DataInfo, weights_only: bool
) -> list[Change]:
    """What made the data another one: keys that differ, or else what lies under the same paths."""
    if weights_only:  # other data is what it is for, but the weights know tokens by their numbers
        before = extra.get("vocabulary")
        if None in (before, data.vocabulary) or before == data.vocabulary:
            return []
        keys = [change for change in different if change.key in ("data.tokenizer", "data.end_of_document")]
        return keys or [Change("data.tokenizer", "other content under this name", config.data.tokenizer, Effect.DATA)]
    if extra["data"] == data.fingerprint:
        return []
    keys = [change for change in different if change.effect is Effect.DATA]
    return keys or [Change("data.paths", "other content", list(config.data.paths), Effect.DATA)]


def _refusal(refused: list[Change], key: str, path: Path, weights_only: bool) -> str:
    data = all(change.effect is not Effect.MODEL for change in refused)
    what = "other tokens" if weights_only and data else "other data" if data else "another model"
    lines = [f"{key}: {path} was written for {what}", *(_text(change, " in the checkpoint, now ") for change in refused)]
    ways = [f"checkpoint.allow_changes=[{', '.join(change.key for change in refused)}] goes on all the same"]
    if not weights_only:
        ways += [f"another run.folder with checkpoint.weights={path} takes the weights alone"] if data else []
        ways += ["another run.folder or checkpoint.resume=never starts anew"]
    return "\n  ".join([*lines, f"must be what they were; {'; '.join(ways)}"])


def _text(change: Change, between: str) -> str:
    return f"{change.key}: {show(change.before)}{between}{show(change.now)}"
