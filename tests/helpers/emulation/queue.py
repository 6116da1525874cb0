"""What the product is given as its queues."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch

from emulation.device import Device, Event, Stream
from emulation.launch import Launches

Skip = Callable[[str, str], bool]


def never(kind: str, queue: str) -> bool:
    return False


class EmulatedQueue:
    """As `comm.queues.CudaQueue`. skip: asked at every wait, hold and event, with its kind and queue, whether to leave it out."""

    ahead = True

    def __init__(self, launches: Launches, stream: Stream, skip: Skip = never) -> None:
        self._launches, self._stream, self._skip = launches, stream, skip
        self._beside: dict[Hashable, EmulatedQueue] = {}

    def run(self, work: Any) -> None:
        with self._launches.on(self._stream):
            end = work()
            if end is not None:
                end()

    def event(self) -> Event:
        return Event(self._stream, 0) if self._skip("event", self._stream.name) else self._stream.event()

    def wait(self, event: Event) -> None:
        if not self._skip("wait", self._stream.name):
            self._device.wait(self._stream, event)

    def push(self) -> None:
        pass

    def hold(self, tensor: torch.Tensor) -> None:
        if not self._skip("hold", self._stream.name):
            self._launches.memory.hold(tensor, self._stream)

    def beside(self, name: Hashable) -> EmulatedQueue:
        if name not in self._beside:
            kind, *edge = name  # type: ignore[misc]
            stream = self._device.stream(f"{kind.__name__} {edge}")
            self._beside[name] = EmulatedQueue(self._launches, stream, self._skip)
        return self._beside[name]

    @property
    def _device(self) -> Device:
        return self._launches.device


def make_queues(launches: Launches, skip: Skip = never) -> dict[str, EmulatedQueue]:
    device = launches.device
    streams = {"compute": device.default} | {name: device.stream(name) for name in ("high", "communication")}
    return {name: EmulatedQueue(launches, stream, skip) for name, stream in streams.items()}
