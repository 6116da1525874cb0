"""Clocks for recorded steps: the host's on a CPU, events on the queues of a GPU. Times are ms of time.time."""

from __future__ import annotations

import time
from collections.abc import Hashable, Mapping
from typing import Any, Protocol

import torch
import torch.distributed as dist

from pipehc.comm.queues import Queue


class Clock(Protocol):
    """Takes stamps during a step and tells their times after it."""

    def now(self, *queues: str) -> Any:
        """A stamp of when all these queues get to what is issued next; of none, the queue at work."""

    def after(self, work: dist.Work, who: Hashable) -> Any:
        """A stamp of the end of a transfer. For a thread of its own, `who`, since it waits."""

    def ms(self, stamp: Any) -> float:
        """The time of a stamp."""


class HostClock:
    def now(self, *queues: str) -> float:
        return time.time()

    def after(self, work: dist.Work, who: Hashable) -> float:
        work.wait()
        return self.now()

    def ms(self, stamp: float) -> float:
        return 1000 * stamp


class DeviceClock:
    """A stamp is an event on every queue. The first is put beside the host's clock while the device is idle."""

    def __init__(self, device: torch.device, queues: Mapping[str, Queue]) -> None:
        self._device, self._queues = device, queues
        torch.cuda.synchronize(device)
        self._zero, self._host_ms = torch.cuda.Event(enable_timing=True), 1000 * time.time()
        self._zero.record()

    def now(self, *queues: str) -> list[torch.cuda.Event]:
        events: list[torch.cuda.Event] = []

        def record() -> None:
            events.append(torch.cuda.Event(enable_timing=True))
            events[-1].record()

        for name in queues:
            self._queues[name].run(record)
        if not queues:
            record()
        return events

    def after(self, work: dist.Work, who: Hashable) -> list[torch.cuda.Event]:
        """On a queue of its own, so that nothing but the transfer is waited for."""
        stamp = []

        def wait() -> None:
            work.wait()
            stamp.extend(self.now())

        with torch.cuda.device(self._device):
            self._queues["compute"].beside(("clock", who)).run(wait)
        return stamp

    def ms(self, stamp: list[torch.cuda.Event]) -> float:
        for event in stamp:
            event.synchronize()
        return self._host_ms + max(self._zero.elapsed_time(event) for event in stamp)


def clock_of(device: torch.device, queues: Mapping[str, Queue]) -> Clock:
    return DeviceClock(device, queues) if device.type == "cuda" else HostClock()
