"""Opens the files of the report, and reads numbers that may be anything."""

from __future__ import annotations

import gzip
import json
import math
import zlib
from pathlib import Path
from typing import Any

_LARGEST = 1e18  # of times in us or ns: anything more is no time


def is_sqlite(path: Path) -> bool:
    """Raises ValueError, naming the file, if it cannot hold a trace at all."""
    if path.is_dir():
        raise ValueError(f"{path}: is a folder, not a file")
    if path.suffix in (".nsys-rep", ".qdrep"):
        raise ValueError(f"{path}: export it first: nsys export --type sqlite {path.name}")
    with open(path, "rb") as file:
        head = file.read(16)
    if not head:
        raise ValueError(f"{path}: is empty")
    return head.startswith(b"SQLite format 3") or path.suffix in (".sqlite", ".db")


def load(path: Path) -> Any:
    """The JSON of a file, which may be gzipped whatever its name. Raises ValueError, naming the file."""
    data = path.read_bytes()
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{path}: is a gzip file that is cut off or damaged: {error}") from None
    text = data.decode(json.detect_encoding(data), errors="replace")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        cut_off = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string")
        what = "is JSON that was cut off" if cut_off and text.lstrip()[:1] in ("{", "[") else "is neither JSON nor SQLite"
        raise ValueError(f"{path}: {what}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is no trace: {error}") from None


def number(value: Any) -> float | None:
    """A finite number that may be written as a string, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        found = float(value)
    except (ValueError, OverflowError):
        return None
    return found if math.isfinite(found) and abs(found) < _LARGEST else None


def whole(value: Any) -> int | None:
    """The same of an integer, exact even where a float is not."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    found = number(value)
    return int(found) if found is not None and found == int(found) else None
