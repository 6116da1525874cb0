"""Host memory that gloo reads and writes, beside tensors of a device: pinned where that is CUDA, so that copies run on streams.

On a CPU the same copies are made, of host memory into other host memory: there is nothing to pin, and nothing to wait for.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable

import torch


class Mark:
    """A point of the current stream: all that was issued there before. On a CPU that has run."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event() if device.type == "cuda" else None
        if self._event is not None:
            self._event.record()

    def hold_stream(self) -> None:
        """What is issued to the stream that is current now starts after it."""
        if self._event is not None:
            self._event.wait()

    def hold_host(self) -> None:
        """Returns when the device has come to it."""
        if self._event is not None:
            self._event.synchronize()


def host_memory(shape: Iterable[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Uninitialised memory of the host for a tensor of `device`."""
    return torch.empty(tuple(shape), dtype=dtype, pin_memory=device.type == "cuda")


def fetching(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Starts a copy to the host, after all that the current stream was given before. Returns what waits for it, and returns it."""
    host = host_memory(tensor.shape, tensor.dtype, tensor.device)
    host.copy_(tensor.detach(), non_blocking=True)
    there = Mark(tensor.device)

    def end() -> torch.Tensor:
        there.hold_host()
        return host

    return end


def fetched(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Copies on the host, complete when this returns: the host waits for all that the current stream was given before."""
    return [end() for end in [fetching(tensor) for tensor in tensors]]


class HostSlots:
    """Host memory beside the slots of a mailbox, made on first use and used again: messages of `shape` and `dtype` on `device`.

    A slot's memory belongs to one message at a time, as its buffer on the device does. All methods act on the current stream.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self._shape, self._dtype, self._device = shape, dtype, device
        self._received: dict[Hashable, torch.Tensor] = {}
        self._sent: dict[Hashable, torch.Tensor] = {}
        self._free: dict[Hashable, Mark] = {}  # where the buffer of a slot may be written to
        self._landed: dict[Hashable, Mark] = {}  # where what came into a slot has left its host memory

    def receiving(self, slot: Hashable) -> torch.Tensor:
        """What the next message of a slot is received into. The use of the slot's buffer has ended here, in the current stream."""
        if slot in self._landed:
            self._landed.pop(slot).hold_host()
        self._free[slot] = Mark(self._device)
        return self._made(self._received, slot)

    def land(self, slot: Hashable, buffer: torch.Tensor) -> None:
        """Copies what has come into a slot to its buffer on the device; the host does not wait."""
        self._free.pop(slot).hold_stream()
        buffer.copy_(self._received[slot], non_blocking=True)
        self._landed[slot] = Mark(self._device)

    def sending(self, slot: Hashable, tensor: torch.Tensor) -> torch.Tensor:
        """The message of a slot on the host. The host waits until it is there, gloo would not."""
        host = self._made(self._sent, slot)
        host.copy_(tensor, non_blocking=True)
        Mark(self._device).hold_host()
        return host

    def release(self) -> None:
        """Gives the memory back, between two steps; copies from it may be under way, which torch's allocator knows."""
        for kept in (self._received, self._sent, self._free, self._landed):
            kept.clear()

    def _made(self, kept: dict[Hashable, torch.Tensor], slot: Hashable) -> torch.Tensor:
        if slot not in kept:
            kept[slot] = host_memory(self._shape, self._dtype, self._device)
        return kept[slot]
