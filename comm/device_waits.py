"""What CUDA streams wait for after the host went on: whether the device makes progress, and what it has not come through.

Nobody asks CUDA or NCCL for that: in the hang that is to be reported, a call that asks may wait for a lock of theirs, and keep
Python's as long. A thread for each stream waits for its events instead, without Python's lock, and only counts.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from queue import SimpleQueue
from typing import Protocol

import torch


class Event(Protocol):
    """A place in a stream."""

    def synchronize(self) -> None:
        """Waits until the device has come to it; other threads run meanwhile."""


# A stream, and a place in it that is newly marked.
Mark = Callable[[], tuple[Hashable, Event]]


class DeviceWaits:
    """Transfers on `device` that its streams wait for. All methods may be called from any thread.

    mark: marks where the current stream is; None: with events of CUDA.
    """

    def __init__(self, device: torch.device, mark: Mark | None = None) -> None:
        self._device, self._mark = device, mark or self._mark_stream
        self._lock = threading.Lock()
        self._open: dict[int, str] = {}  # by number, the oldest first
        self._added = 0
        self._threads: dict[Hashable, SimpleQueue[tuple[int, Event]]] = {}

    def add(self, what: str) -> None:
        """The current stream waits for a transfer from here on."""
        stream, event = self._mark()
        with self._lock:
            self._added += 1
            self._open[self._added] = what
            if stream not in self._threads:
                self._threads[stream] = SimpleQueue()
                # A daemon: it may wait for ever.
                threading.Thread(target=self._follow, args=(self._threads[stream],), name="device waits", daemon=True).start()
            self._threads[stream].put((self._added, event))

    def look(self) -> tuple[int, list[str]]:
        """How many have finished since the start, and what the others are, the oldest first."""
        with self._lock:
            return self._added - len(self._open), list(self._open.values())

    def _follow(self, waits: SimpleQueue[tuple[int, Event]]) -> None:
        # A thread starts on device 0, and to ask anything there makes a context, hundreds of MB of every rank, on that device.
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        while True:
            number, event = waits.get()
            event.synchronize()
            with self._lock:
                del self._open[number]

    def _mark_stream(self) -> tuple[Hashable, Event]:
        event = torch.cuda.Event(blocking=True)  # who waits for it leaves the processor to others
        event.record()
        return torch.cuda.current_stream(self._device).stream_id, event
