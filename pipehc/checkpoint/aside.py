"""Names that nothing has yet, for what lies in the way and is not ours to delete."""

import os
from pathlib import Path


def free_name(path: Path) -> Path:
    """`path`, or with NAME-1, NAME-2 ... (before a file's suffix) the first that nothing has: no dangling link either."""
    other, number = path, 0
    while os.path.lexists(other):
        number += 1
        other = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return other


def set_aside(path: Path) -> Path | None:
    """Renames a file, a folder or a link (not what it points to) to a free name, which it returns.

    None where there is nothing, or an empty file: that stays.
    """
    if not os.path.lexists(path) or (path.is_file() and not path.is_symlink() and not path.stat().st_size):
        return None
    other = free_name(path)
    path.rename(other)
    return other
