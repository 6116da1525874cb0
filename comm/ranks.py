"""Steps that all ranks take together or not at all: an error on one rank is raised on every rank."""

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

L = TypeVar("L")
M = TypeVar("M")


class RankError(RuntimeError):
    """A step of all ranks failed on one of them; the message says on which, and why."""


class Ranks:
    """The processes of one group (default: the default group), or this process alone where no group is initialised.

    Objects are pickled and sent by the group's own backend: give a gloo group where the default one is NCCL. A rank that
    dies surfaces as the backend's RuntimeError on its peers, after the group's timeout at the latest.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.distributed = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank(group) if self.distributed else 0
        self.size = dist.get_world_size(group) if self.distributed else 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def exchange(self, local: Callable[[], L], main: Callable[[list[L]], M]) -> M:
        """Run `local` on every rank, then `main` on rank 0 over the results in rank order; return its result on every rank.

        An exception on any rank is raised on all of them, as ValueError where it was one, else as RankError; its message
        names the rank if there are several.
        """
        mine: tuple[L | None, Exception | None]
        try:
            mine = local(), None
        except Exception as error:
            mine = None, _portable(error, self.rank, self.size)
        everyone = self._gather(mine)
        outcome: tuple[M | None, Exception | None] = None, None
        if everyone is not None:
            failure = next((error for _, error in everyone if error is not None), None)
            try:
                outcome = (None, failure) if failure else (main([result for result, _ in everyone]), None)  # type: ignore[misc]
            except Exception as error:
                outcome = None, _portable(error, 0, 1)
        result, failure = self._broadcast(outcome)
        if failure is not None:
            raise failure
        return result  # type: ignore[return-value]

    def on_main(self, main: Callable[[], M]) -> M:
        """Run `main` on rank 0 alone; return its result, or raise its error, on every rank."""
        return self.exchange(lambda: None, lambda _: main())

    def _gather(self, value: L) -> list[L] | None:
        if not self.distributed:
            return [value]
        gathered: list | None = [None] * self.size if self.is_main else None
        dist.gather_object(value, gathered, dst=self._main_global(), group=self.group)
        return gathered

    def _broadcast(self, value: M) -> M:
        if not self.distributed:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=self._main_global(), group=self.group)
        return values[0]

    def _main_global(self) -> int:
        return dist.get_global_rank(self.group, 0) if self.group is not None else 0


def _portable(error: Exception, rank: int, size: int) -> Exception:
    """An exception that survives pickling, whatever the original's constructor wants."""
    where = f"rank {rank}: " if size > 1 else ""
    if isinstance(error, ValueError):
        return ValueError(f"{where}{error}")
    return RankError(f"{where}{type(error).__name__}: {error}")
