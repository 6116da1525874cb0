"""Stage messages over torch.distributed: receives posted ahead, sends that nobody waits for, buffers held until they are free."""

from __future__ import annotations

import datetime
import re
import time
from collections import deque
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist

from pipehc.comm.groups import Edge


class PeerError(RuntimeError):
    """A message did not come or could not be sent: the peer is gone, or slower than the time limit."""


class Waiting(NamedTuple):
    """What this process waits for, and since when (time.monotonic)."""

    what: str
    since: float


# Takes the place of the handle of a send or receive that has just been started: a recorder of transfer times does.
Tracker = Callable[[tuple, Literal["send", "recv"], dist.Work], dist.Work]


class _Pending(NamedTuple):
    work: dist.Work
    tensor: torch.Tensor
    peer: int  # rank of the world


class Mailbox:
    """The messages of one rank for one step. Every message is one tensor of `shape` and `dtype`.

    groups: a process group per directed edge (see `edge_groups`). shape, dtype, device: of every message. timeout_s: how long a
    wait may take before PeerError. `waiting` may be read by other threads; `tracker` may be set between two steps.
    """

    def __init__(
        self,
        groups: dict[Edge, dist.ProcessGroup],
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        timeout_s: float = 120.0,
    ) -> None:
        self._peers = {edge: _peer(group) for edge, group in groups.items()}
        self._groups, self._shape, self._dtype, self._device = groups, shape, dtype, device
        self._timeout = datetime.timedelta(seconds=timeout_s)
        self._received: dict[tuple, _Pending] = {}
        self._sent: list[tuple[tuple, _Pending]] = []
        self.waiting: Waiting | None = None
        self.tracker: Tracker | None = None
        self._on_device: deque[tuple[str, dist.Work]] = deque(maxlen=64)

    def post(self, message: tuple, edge: Edge) -> None:
        """Posts the receive of `message` on `edge`. Posts of an edge must have the order of the peer's sends."""
        tensor = torch.empty(self._shape, dtype=self._dtype, device=self._device)
        try:
            work = dist.irecv(tensor, group=self._groups[edge], group_src=_position(edge, edge[0]))
        except RuntimeError as error:
            raise PeerError(f"cannot receive the {message}: {first_line(error)}") from error
        self._received[message] = self._pending(message, "recv", work, tensor, edge)

    def wait(self, message: tuple) -> torch.Tensor:
        """The tensor of a posted message, once it has arrived; on CUDA the current stream waits, the host does not."""
        pending = self._received.pop(message)
        self._finish(pending, f"waiting for the {message}")
        return pending.tensor

    def send(self, message: tuple, edge: Edge, tensor: torch.Tensor) -> None:
        """Starts sending and returns; the tensor is held until the peer has it. Raises ValueError on a wrong shape or dtype."""
        if tuple(tensor.shape) != self._shape or tensor.dtype != self._dtype:
            raise ValueError(
                f"{message}: the stage returned {tuple(tensor.shape)} {tensor.dtype}, "
                f"its neighbour expects {self._shape} {self._dtype}"
            )
        tensor = tensor.detach().contiguous()
        try:
            work = dist.isend(tensor, group=self._groups[edge], group_dst=_position(edge, edge[1]))
        except RuntimeError as error:
            raise PeerError(f"cannot send the {message}: {first_line(error)}") from error
        self._sent.append((message, self._pending(message, "send", work, tensor, edge)))

    def drain(self) -> None:
        """Waits until every send is done. At the end of a step, when every peer has posted all it will."""
        for message, pending in self._sent:
            self._finish(pending, f"sending the {message}")
        self._sent.clear()
        assert not self._received, f"posted but never used: {list(self._received)}"

    def unfinished(self) -> list[str]:
        """Messages that a CUDA stream still waits for, though the host went on; of the last 64. For reports, from any thread."""
        return [doing for doing, work in list(self._on_device) if not work.is_completed()]

    def _pending(
        self, message: tuple, kind: Literal["send", "recv"], work: dist.Work | None, tensor: torch.Tensor, edge: Edge
    ) -> _Pending:
        assert work is not None
        if self.tracker is not None:
            work = self.tracker(message, kind, work)
        return _Pending(work, tensor, self._peers[edge])

    def _finish(self, pending: _Pending, doing: str) -> None:
        doing = f"{doing} (process {pending.peer}, {_bytes(pending.tensor)})"
        self.waiting = Waiting(doing, time.monotonic())
        try:
            # CUDA: wait() with a limit would block the host; there the limit is the process group's own.
            if pending.tensor.is_cuda:
                done = pending.work.wait()
                self._on_device.append((self.waiting.what, pending.work))
            else:
                done = pending.work.wait(self._timeout)
        except RuntimeError as error:
            waited = time.monotonic() - self.waiting.since
            clock = time.strftime("%H:%M:%S", time.localtime(time.time() - waited))
            raise PeerError(f"{doing} failed after {waited:.1f} s, since {clock}: {first_line(error)}") from error
        if done is False:
            raise PeerError(f"{doing} took longer than {self._timeout.total_seconds():.0f} s")
        self.waiting = None


def _position(edge: Edge, rank: int) -> int:
    """Position in the edge's group, whose ranks torch has sorted (pipeline position order = global order)."""
    return sorted(edge).index(rank)


def _peer(group: dist.ProcessGroup) -> int:
    """The other rank of the world in a group of two."""
    return next(rank for rank in dist.get_process_group_ranks(group) if rank != dist.get_rank())


def _bytes(tensor: torch.Tensor) -> str:
    return f"{tensor.numel() * tensor.element_size()} bytes"


def first_line(error: Exception) -> str:
    """gloo's errors open with the place in its sources and end with a greeting; neither helps a user."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return re.sub(r"^\[\S+\] ", "", line).split(" This is typically")[0]
