"""What a rank of a job leaves behind when it waits in vain inside a step."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist

from pipehc.comm.messages import Mailbox, PeerError, first_line
from pipehc.comm.once import say_once
from pipehc.comm.watchdog import Watchdog


@dataclass
class HangReport:
    """timeout_s: how long a rank may wait inside a step. folder: for a file a rank: the reason, its last instructions, its stacks.

    Signals stay the job's own business.
    """

    timeout_s: float
    folder: Path

    @cached_property
    def watchdog(self) -> Watchdog:
        """Observes instructions. Made when the process knows its rank."""
        return Watchdog(self.folder / f"rank{dist.get_rank():05}.txt", self.timeout_s, self._expire)

    @contextmanager
    def around(self, where: str, mailbox: Mailbox) -> Iterator[None]:
        """Around one step, `where` in words."""
        self.watchdog.watch(mailbox)
        with self.watchdog.limited(where):
            try:
                yield
            except PeerError as error:
                self.watchdog.dump(f"failed {where}: {first_line(error)}")
                raise

    def _expire(self, what: str) -> NoReturn:
        """Nobody else would end this process: its main thread is blocked."""
        say_once(f"pipehc: rank {dist.get_rank()} ended: {what}; every rank that waited has a report in {self.folder}/", "end")
        self.watchdog.dump(what)
        os._exit(1)
