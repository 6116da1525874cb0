"""The manifest of a checkpoint folder: what makes it complete, and how damage is told.

A manifest is written last and names every other file with its size and CRC-32. CRC-32 finds accidents (lost pages, flipped
bits), not forgery, at several GB/s a core, so that it costs less than the writing itself.
"""

import hashlib
import json
import os
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipehc.checkpoint.flat_slices import Stored

NAME = "manifest.json"
FORMAT = 1


@dataclass(frozen=True)
class File:
    size: int  # bytes
    crc32: int


@dataclass(frozen=True)
class Manifest:
    """`serial` counts commits in one folder: the newest checkpoint is the last committed, not the one of the highest step."""

    step: int
    serial: int
    layout: str
    world_size: int
    has_rank_state: bool
    extra: dict[str, Any]
    tensors: dict[str, Stored]
    files: dict[str, File]


def digest(path: Path) -> File:
    size, crc = 0, 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return File(size, crc)


def write(folder: Path, manifest: Manifest) -> None:
    """Write and sync the manifest of `folder`."""
    content = json.dumps(asdict(manifest))
    with open(folder / NAME, "w") as file:
        json.dump({"format": FORMAT, "crc32": zlib.crc32(content.encode()), "content": content}, file)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(folder)


def read(folder: Path) -> Manifest:
    """The manifest of a complete checkpoint folder.

    Raises ValueError saying what is wrong where the manifest is missing or damaged, or a file is missing or of another size.
    Contents are not read: see `damaged`.
    """
    path = folder / NAME
    if not os.path.isfile(path):
        raise ValueError(f"{folder} is no complete checkpoint: it has no {NAME}")
    raw = _bytes(path)
    try:
        outer = json.loads(raw)
        version, crc, content = outer["format"], outer["crc32"], outer["content"]
        intact = zlib.crc32(content.encode()) == crc
    except (ValueError, KeyError, TypeError, AttributeError):
        version, content, intact = FORMAT, "", False
    if version != FORMAT:
        raise ValueError(f"{path} has format {version!r}; this version reads {FORMAT}")
    if not intact:
        raise ValueError(f"{path} is damaged")
    fields = json.loads(content)
    fields["files"] = {name: File(**file) for name, file in fields["files"].items()}
    fields["tensors"] = {name: Stored(tuple(t["shape"]), t["dtype"]) for name, t in fields["tensors"].items()}
    manifest = Manifest(**fields)
    for name, file in manifest.files.items():
        if not os.path.isfile(folder / name):
            raise ValueError(f"{folder} is damaged: {name} is missing")
        if (size := (folder / name).stat().st_size) != file.size:
            raise ValueError(f"{folder} is damaged: {name} has {size} bytes instead of {file.size}")
    return manifest


def identity(folder: Path) -> str:
    """The same for every copy of a checkpoint, wherever it lies, and for no other: its manifest holds all checksums."""
    return hashlib.blake2b(_bytes(folder / NAME), digest_size=16).hexdigest()


def damaged(folder: Path, files: dict[str, File]) -> list[str]:
    """Names of those files whose contents differ from what was written."""
    return [name for name, file in files.items() if not os.path.isfile(folder / name) or digest(folder / name) != file]


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None


def sync_folder(folder: Path) -> None:
    """Make names in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
