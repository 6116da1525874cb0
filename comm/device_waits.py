"""What CUDA streams wait for after the host went on: whether the device makes progress, and what it has not come through."""

from __future__ import annotations

import threading
from contextlib import nullcontext

import torch
import torch.distributed as dist

_MOST = 256  # kept without a look


class DeviceWaits:
    """Transfers on `device` that its streams wait for. All methods may be called from any thread."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._lock = threading.Lock()
        self._open: list[tuple[str, dist.Work]] = []
        self._finished = 0

    def add(self, what: str, work: dist.Work) -> None:
        """A stream waits for `work`."""
        with self._lock:
            self._open.append((what, work))
            if len(self._open) > _MOST:
                self._sort_out()

    def look(self) -> tuple[int, list[str]]:
        """How many have finished since the start, and what the others are, the oldest first."""
        with self._lock:
            self._sort_out()
            return self._finished, [what for what, _ in self._open]

    def _sort_out(self) -> None:
        if not self._open:
            return
        # A thread starts on device 0, and to ask anything there makes a context, hundreds of MB of every rank, on that device.
        with torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext():
            still = [(what, work) for what, work in self._open if not work.is_completed()]
        self._finished += len(self._open) - len(still)
        self._open = still
