"""The run folder: one training at a time, and what an earlier one left there is never lost."""

from __future__ import annotations

import errno
import fcntl
from pathlib import Path
from typing import BinaryIO

from pipehc.comm.ranks import Ranks

# File systems without locks: whoever uses them has to take care himself.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP}


class RunFolder:
    """The folder `path`, made if it is missing, and held against other trainings until this object or its process is gone.

    Collective. Raises ValueError, on every rank, if it cannot be made or written, or if another training holds it: for example
    one whose torchrun was killed, and whose processes have not noticed yet.
    """

    def __init__(self, path: Path, ranks: Ranks) -> None:
        self.path = path
        self._lock: BinaryIO | None = None
        ranks.on_main(self._occupy)

    def _occupy(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / ".lock", "ab")  # noqa: SIM115 - held open; "ab": whatever has the name keeps its content
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"run.folder: {str(self.path)!r}: another training runs there; must be a folder of its own") from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise ValueError(f"run.folder: {str(self.path)!r}: {error.strerror}; must be a folder to write into") from None
