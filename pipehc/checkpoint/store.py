"""Checkpoints: committed atomically, verified, readable by every layout.

A folder of checkpoints holds `step-XXXXXXXX/` (complete) and, while one is written or after a crash, `.tmp-*`. Tensors are
keyed by global names and cut as each rank holds them (flat_slices.py). A commit is: every rank's files synced, the manifest
with their checksums synced, one rename. A crash before the rename leaves the previous checkpoint the newest, one after it
the new one. All ranks must see the same folder (one machine, or a shared file system).

Nothing else that lies there fails a save: what is in the way of a name is renamed, what cannot be deleted is left with a warning,
and of a link only the link goes, never what it points to. Only what has the name of a checkpoint is pruned as an old one.
"""

import io
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipehc.checkpoint import flat_slices, manifest
from pipehc.checkpoint.aside import free_name
from pipehc.checkpoint.flat_slices import FlatSlice, Held
from pipehc.checkpoint.manifest import File, Manifest
from pipehc.comm.ranks import Ranks

__all__ = ["Checkpoints", "FlatSlice", "Restored"]

# `.old-` is a complete checkpoint whose step was saved again, until the new one is committed.
_COMMITTED = re.compile(r"(\.old-\d+-)?step-(\d+)")
# What a save that was cut off leaves; a number at the end where the name was taken.
_TEMPORARY = re.compile(rf"\.tmp-(delete-)?{_COMMITTED.pattern}(-\d+)?")


@dataclass(frozen=True)
class Restored:
    """What a checkpoint holds beside tensors. `rank_state` is None unless world size and layout are those of the writer."""

    step: int
    extra: dict[str, Any]
    rank_state: dict[str, Any] | None


class Checkpoints:
    """The checkpoints in one folder. All methods are collective over `group` and agree on their outcome: an error on one rank
    is raised on all, and a rank that dies makes its peers raise RuntimeError within the group's timeout.

    folder: made when first needed.  keep: how many complete ones to keep, at least 1.
    layout: any text that names the parallel layout; state of single ranks (RNG) is given back only to the same one.
    group: a gloo group of all ranks where the default group is NCCL.  warn: called on rank 0 only; default: logging.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        keep: int,
        layout: str = "",
        group: dist.ProcessGroup | None = None,
        warn: Callable[[str], None] | None = None,
    ) -> None:
        if keep < 1:
            raise ValueError(f"checkpoint.keep is {keep}; at least 1 is needed, or the only complete one would be deleted")
        self.folder = Path(folder)
        self._keep, self._layout, self._warn = keep, layout, warn or logging.getLogger(__name__).warning
        self._ranks = Ranks(group)
        self._verified: set[Path] = set()
        self._undeletable: set[Path] = set()

    def save(
        self, step: int, tensors: Mapping[str, Held], extra: Mapping[str, Any], per_rank: Mapping[str, Any] | None = None
    ) -> Path:
        """Write a checkpoint and prune older ones after it is committed; returns its folder.

        tensors: global name to a whole tensor (given by several ranks alike: stored once) or this rank's FlatSlice, or several;
            together the ranks must cover every tensor exactly.
        extra: JSON-able; rank 0's counts; tuples come back as lists.
        per_rank: state of this rank (RNG): tensors, numbers, text and containers of them. On all ranks or on none.

        Raises ValueError for tensors that overlap, leave gaps or disagree, and for state that could not be read again;
        RankError when writing fails on any rank. Nothing is committed then.
        """
        ranks, name = self._ranks, f"step-{step:08d}"
        rank_state = ranks.exchange(lambda: per_rank is not None, _all_or_none)
        stored = ranks.exchange(lambda: flat_slices.pieces(tensors), flat_slices.tile)
        temp = ranks.on_main(lambda: self._begin(name, extra))
        flat_slices.write(temp, tensors, ranks.group)
        if per_rank is not None:
            ranks.exchange(lambda: _write_rank_state(temp / _rank_file(ranks.rank), dict(per_rank)), len)
        names = ranks.on_main(lambda: sorted(path.name for path in temp.iterdir()))
        mine = names[ranks.rank :: ranks.size]

        def commit(digests: list[dict[str, File]]) -> Path:
            files = {name: file for part in digests for name, file in part.items()}
            serial = 1 + max((m.serial for _, m in self._complete(lambda text: None)), default=0)
            content = Manifest(step, serial, self._layout, ranks.size, rank_state, dict(extra), stored, files)
            return self._commit(temp, self.folder / name, content)

        path = ranks.exchange(lambda: {name: manifest.digest(temp / name) for name in mine}, commit)
        self._verified.discard(path)
        ranks.on_main(self._prune)
        return path

    def newest(self) -> Path | None:
        """The last committed checkpoint that is complete and undamaged (contents included), or None; warns of damaged ones."""
        # A checkpoint is read twice on resuming, here and by `load`: the second time from the page cache.
        for path, files in self._ranks.on_main(lambda: [(p, m.files) for p, m in self._complete(self._warn)]):
            if not (bad := self._damaged(path, files)):
                self._verified.add(path)
                return path
            if self._ranks.is_main:
                self._warn(f"skipping checkpoint {path}: the contents of {', '.join(bad)} are damaged")
        return None

    def load(
        self,
        path: str | os.PathLike,
        tensors: Mapping[str, Held],
        strict: bool = True,
        verify: bool = True,
        prefixes: tuple[str, ...] = ("",),
    ) -> Restored:
        """Fill `tensors` in place (whole tensors, or the ranges that this rank holds in the new layout) from checkpoint `path`.

        strict: refuse a checkpoint that holds tensors which no rank asks for, of those whose names begin with one of `prefixes`.
        verify: check checksums first, unless `newest` just did. Raises ValueError for a folder that is no complete checkpoint,
        for damaged contents, and for a tensor that is missing or of another shape or dtype, naming it.
        """
        path, ranks = Path(path), self._ranks
        found = ranks.on_main(lambda: manifest.read(path))
        if verify and path not in self._verified and (bad := self._damaged(path, found.files)):
            raise ValueError(f"{path} is damaged: the contents of {', '.join(bad)} are not what was written")
        stored = {name: tensor for name, tensor in found.tensors.items() if name.startswith(prefixes)}
        ranks.exchange(lambda: flat_slices.pieces(tensors), lambda wanted: flat_slices.match(stored, wanted, strict))
        flat_slices.read(path, tensors, ranks.group)
        return Restored(found.step, found.extra, self._read_rank_state(path, found))

    def set_aside_later_than(self, path: Path) -> Path | None:
        """Moves all that was committed here after `path`, one of these, into a new folder beside this one; returns that folder.

        A run that goes back to `path` would otherwise delete them as old ones of its own.
        """

        def move() -> Path | None:
            serial = manifest.read(path).serial  # of a copy under another name, too
            later = [other for other, m in self._complete(lambda text: None) if m.serial > serial]
            if not later:
                return None
            aside = free_name(self.folder.resolve())  # beside what a link leads to: on the same disk
            aside.mkdir()
            for other in later:
                other.rename(aside / other.name)
            return aside

        return self._ranks.on_main(move)

    def _begin(self, name: str, extra: Mapping[str, Any]) -> Path:
        try:
            json.dumps(dict(extra))
        except (TypeError, ValueError) as error:
            raise ValueError(f"extra state of a checkpoint must be JSON-able: {error}") from error
        self._make_room(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.iterdir():
            if _TEMPORARY.fullmatch(leftover.name):
                self._delete(leftover)
        temp = free_name(self.folder / f".tmp-{name}")
        temp.mkdir()
        return temp

    def _commit(self, temp: Path, path: Path, content: Manifest) -> Path:
        manifest.write(temp, content)
        if path.is_dir():
            number = content.serial
            while os.path.lexists(old := self.folder / f".old-{number}-{path.name}"):
                number += 1
            path.rename(old)
        self._make_room(path)
        temp.rename(path)
        manifest.sync_folder(self.folder)
        return path

    def _make_room(self, path: Path) -> None:
        """Renames what is no folder, and no link to one, but has the name of one."""
        if os.path.lexists(path) and not os.path.isdir(path):
            other = path.rename(free_name(path))
            self._warn(f"{path} is no folder: renamed to {other.name}")

    def _prune(self) -> None:
        """Keep the newest `keep` complete ones. Damaged ones go only when all that is kept is of a later step."""
        complete = [path for path, _ in self._complete(lambda text: None) if not path.name.startswith(".old-")]
        kept = complete[: self._keep]
        if not kept:
            return
        oldest = min(_step(path) for path in kept)
        damaged = [path for path in self._committed() if path not in complete and _step(path) < oldest]
        replaced = [path for path in self._committed() if path.name.startswith(".old-") and path not in damaged]
        for path in [*complete[self._keep :], *replaced, *damaged]:
            try:
                # Renamed first: a crash while deleting must not leave what looks like a damaged checkpoint.
                self._delete(path.rename(free_name(self.folder / f".tmp-delete-{path.name}")))
            except OSError as error:
                self._warn(f"could not delete the old checkpoint {path}: {error}")

    def _delete(self, path: Path) -> None:
        """What cannot be deleted stays, with one warning; so does what is no folder of ours but has such a name."""
        try:
            if path.is_symlink():
                path.unlink()
            elif path.is_dir():
                shutil.rmtree(path)
        except OSError as error:
            if path not in self._undeletable:
                self._undeletable.add(path)
                self._warn(f"could not delete {path}: {error}")

    def _committed(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        return [path for path in self.folder.iterdir() if _COMMITTED.fullmatch(path.name) and os.path.isdir(path)]

    def _complete(self, warn: Callable[[str], None]) -> list[tuple[Path, Manifest]]:
        """Checkpoints whose files are all there with the right size, newest first."""
        found = []
        for path in self._committed():
            try:
                found.append((path, manifest.read(path)))
            except ValueError as error:
                warn(f"skipping checkpoint {path}: {error}")
        return sorted(found, key=lambda item: (item[1].serial, item[1].step), reverse=True)

    def _damaged(self, path: Path, files: dict[str, File]) -> list[str]:
        """Names of damaged files; the ranks share the reading."""
        mine = dict(list(files.items())[self._ranks.rank :: self._ranks.size])
        return self._ranks.exchange(lambda: manifest.damaged(path, mine), lambda parts: sorted(chain.from_iterable(parts)))

    def _read_rank_state(self, path: Path, found: Manifest) -> dict[str, Any] | None:
        ranks = self._ranks
        if not found.has_rank_state:
            return None
        if (found.world_size, found.layout) != (ranks.size, self._layout):
            logging.getLogger(__name__).info(
                "%s: state of single ranks (RNG) not restored: written by %d ranks with layout %r, read by %d with %r",
                path, found.world_size, found.layout, ranks.size, self._layout,
            )  # fmt: skip
            return None
        state: dict[str, Any] = {}
        file = path / _rank_file(ranks.rank)
        ranks.exchange(lambda: state.update(torch.load(file, map_location="cpu", weights_only=True)), len)
        return state


def _all_or_none(given: list[bool]) -> bool:
    if any(given) != all(given):
        raise ValueError(f"per_rank is given by ranks {[r for r, g in enumerate(given) if g]} only; all ranks or none must")
    return all(given)


def _write_rank_state(path: Path, state: dict[str, Any]) -> None:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    try:
        torch.load(buffer, weights_only=True)
    except Exception as error:
        raise ValueError(f"per_rank state could not be read again; give tensors, numbers, text, containers: {error}") from error
    with open(path, "wb") as file:
        file.write(buffer.getbuffer())
        file.flush()
        os.fsync(file.fileno())


def _rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.pt"


def _step(path: Path) -> int:
    match = _COMMITTED.fullmatch(path.name)
    assert match is not None
    return int(match[2])
