"""Stage messages over torch.distributed: receives posted ahead into pooled buffers, sends that are held until the peer has them."""

from __future__ import annotations

import datetime
import re
import time
from collections.abc import Callable, Hashable
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist

from pipehc.comm.device_waits import DeviceWaits
from pipehc.comm.groups import Edge
from pipehc.comm.host_memory import HostSlots


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


Transport = Literal["device", "host"]
"""What carries messages: NCCL where they lie on CUDA, or gloo through host memory. On a CPU both are gloo's; `host` copies, too."""

_Slot = tuple[Edge, int]  # of an edge: compiled programs number its receive buffers, and its sends in flight


class Mailbox:
    """The messages of one rank, step after step. Every message is one tensor of `shape` and `dtype`.

    A receive lies in the buffer of its slot, which is made once and used again by every later message of that slot: whoever posts
    promises that all use of the one before has ended. A send keeps its tensor until `delivered`, or until `drain`.

    groups: a process group per directed edge (see `edge_groups`). shape, dtype, device: of every message. timeout_s: how long a
    wait of the host may take before PeerError. transport: `host` sends all messages through host memory. first_through_host:
    whether the first step of every kind does, see `begin`; None: on CUDA. `waiting` may be read by other threads; `tracker` may be
    set between two steps.

    Through host memory the host waits: in `send` for all that the current stream was given before, in `wait` and `delivered` for
    the peer. So it computes the same, and hides little behind computation.
    """

    def __init__(
        self,
        groups: dict[Edge, dist.ProcessGroup],
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        timeout_s: float = 120.0,
        first_through_host: bool | None = None,
        transport: Transport = "device",
    ) -> None:
        self._peers = {edge: _peer(group) for edge, group in groups.items()}
        self._groups, self._shape, self._dtype, self._device = groups, shape, dtype, torch.device(device)
        self._timeout = datetime.timedelta(seconds=timeout_s)
        self._buffers: dict[_Slot, torch.Tensor] = {}
        self._storages: set[int] = set()  # of those: not their data's addresses, which are all 0 without data (dry runs)
        self._received: dict[tuple, tuple[_Slot, _Pending]] = {}
        self._sent: dict[_Slot, tuple[tuple, _Pending]] = {}
        self.waiting: Waiting | None = None
        self.tracker: Tracker | None = None
        self._first_through_host = self._device.type == "cuda" if first_through_host is None else first_through_host
        self._transport = transport
        self._through_host = transport == "host"
        self._on_host = HostSlots(shape, dtype, self._device)
        self._begun: set[Hashable] = set()
        self._on_device = DeviceWaits(self._device)

    def begin(self, kind: Hashable) -> None:
        """Call before a step, on all ranks. kind: what tells programs apart that run different kernels.

        The first step of a kind loads kernels and connects groups, which may wait until the device is idle; it never is while NCCL
        waits there for a message that depends on that kernel. So this step's messages go from host to host, at any speed.
        """
        self._through_host = self._transport == "host" or (self._first_through_host and kind not in self._begun)
        self._begun.add(kind)
        if not self._through_host:
            self._on_host.release()

    @property
    def host_waits(self) -> bool:
        """Whether it is the host that waits for the messages of this step: gloo's, each of which only one may wait for."""
        return self._through_host or self._device.type != "cuda"

    def post(self, message: tuple, edge: Edge, slot: int = 0) -> None:
        """Posts the receive of `message` on `edge`. Posts of an edge must have the order of the peer's sends."""
        assert all(other != (edge, slot) for other, _ in self._received.values()), f"{message}: something is posted into its slot"
        tensor = self._buffer((edge, slot))  # made in any case: asking for memory, too, may wait for an idle device
        if self._through_host:
            tensor = self._on_host.receiving((edge, slot))
        try:
            work = dist.irecv(tensor, group=self._groups[edge], group_src=_position(edge, edge[0]))
        except RuntimeError as error:
            raise PeerError(f"cannot receive the {message}: {first_line(error)}") from error
        self._received[message] = (edge, slot), self._pending(message, "recv", work, tensor, edge)

    def wait(self, message: tuple) -> torch.Tensor:
        """The tensor of a posted message, once it has arrived; on CUDA the current stream waits, the host only with `host`."""
        slot, pending = self._received.pop(message)
        self._finish(pending, f"waiting for the {message}")
        if self._through_host:
            self._on_host.land(slot, self._buffers[slot])
        # Detached: what a stage does to it, such as ask for its gradient, must not stay with the buffer.
        return self._buffers[slot].detach()

    def send(self, message: tuple, edge: Edge, tensor: torch.Tensor, slot: int = 0) -> None:
        """Starts sending and returns; the tensor is held until the peer has it. Raises ValueError on a wrong shape or dtype."""
        if tuple(tensor.shape) != self._shape or tensor.dtype != self._dtype:
            raise ValueError(
                f"{message}: the stage returned {tuple(tensor.shape)} {tensor.dtype}, "
                f"its neighbour expects {self._shape} {self._dtype}"
            )
        assert (edge, slot) not in self._sent, f"{message}: no event says that what was sent from its slot before has arrived"
        tensor = tensor.detach()
        if self._through_host:
            tensor = self._on_host.sending((edge, slot), tensor)
        else:
            tensor = tensor.contiguous()
            if tensor.untyped_storage()._cdata in self._storages:
                tensor = tensor.clone()  # a stage that hands on what it got: its buffer may be used again before this is sent
        try:
            work = dist.isend(tensor, group=self._groups[edge], group_dst=_position(edge, edge[1]))
        except RuntimeError as error:
            raise PeerError(f"cannot send the {message}: {first_line(error)}") from error
        self._sent[edge, slot] = message, self._pending(message, "send", work, tensor, edge)

    def delivered(self, edge: Edge, slot: int) -> torch.Tensor:
        """Waits until the peer has what was sent from a slot, returns what it was sent from and lets go of it; on CUDA the current
        stream waits."""
        message, pending = self._sent.pop((edge, slot))
        self._finish(pending, f"sending the {message}")
        return pending.tensor

    def drain(self) -> list[torch.Tensor]:
        """`delivered` for every send that is left. At the end of a step, when every peer has posted all it will."""
        assert not self._received, f"posted but never used: {list(self._received)}"
        return [self.delivered(edge, slot) for edge, slot in list(self._sent)]

    def on_device(self) -> tuple[int, list[str]]:
        """How many waits of the past CUDA streams came through, and which not yet, though the host went on. From any thread."""
        return self._on_device.look()

    def _buffer(self, slot: _Slot) -> torch.Tensor:
        if slot not in self._buffers:
            self._buffers[slot] = torch.empty(self._shape, dtype=self._dtype, device=self._device)
            self._storages.add(self._buffers[slot].untyped_storage()._cdata)
        return self._buffers[slot]

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
            # CUDA: wait() with a limit would block the host; there the limits are the process group's own, and a watchdog's.
            if pending.tensor.is_cuda:
                done = pending.work.wait()
                self._on_device.add(doing)
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
