"""The allocator: memory is a stream's; what is freed is written over at once, on that stream, as its next owner would.

As with CUDA's: to free a tensor takes effect when the host lets go of it, whatever streams still have to do with it, except those
that `hold` named: then the memory stays until the host sees that these have come by.
"""

from __future__ import annotations

import weakref

import numpy
import torch

from emulation.device import Device, Event, Stream


class Block:
    """Memory of one tensor. raw: all of it, uint8. made: the stream that it was asked for on. holders: others that use it."""

    def __init__(self, raw: torch.Tensor, made: Stream) -> None:
        self.raw, self.made = raw, made
        self.holders: dict[int, Stream] = {}


class Memory:
    """What is asked for through `empty`; all other tensors are never freed."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._blocks: dict[int, Block] = {}  # by address
        self._freed: list[Block] = []
        self._held: list[tuple[list[Event], Block]] = []
        device.before_issue = self.reuse

    def empty(self, size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Unwritten: NaN, and -1."""
        last = sum((n - 1) * step for n, step in zip(size, stride)) + 1 if all(size) else 0
        nbytes = last * dtype.itemsize
        if not nbytes:
            return torch.empty_strided(size, stride, dtype=dtype)
        memory = numpy.full(nbytes, 255, numpy.uint8)
        owner = memory[:]  # lives as long as the tensor's storage
        block = Block(torch.from_numpy(memory), self._device.current)
        weakref.finalize(owner, self._freed.append, block).atexit = False
        storage = torch.from_numpy(owner).untyped_storage()
        self._blocks[storage.data_ptr()] = block
        return torch.empty(0, dtype=dtype).set_(storage, 0, size, stride)

    def block(self, tensor: torch.Tensor) -> Block | None:
        return self._blocks.get(tensor.untyped_storage().data_ptr())

    def alias(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same numbers for work that runs later, without keeping the tensor from being freed."""
        block = self.block(tensor)
        storage = (tensor if block is None else block.raw).untyped_storage()
        return torch.empty(0, dtype=tensor.dtype).set_(storage, tensor.storage_offset(), tensor.size(), tensor.stride())

    def hold(self, tensor: torch.Tensor, stream: Stream) -> None:
        """record_stream."""
        block = self.block(tensor)
        if block is not None and stream is not block.made:
            block.holders[id(stream)] = stream

    def reuse(self) -> None:
        """Gives freed memory to somebody else, who writes to it."""
        if not self._freed and not self._held:
            return
        while self._freed:
            block = self._freed.pop()
            self._blocks.pop(block.raw.untyped_storage().data_ptr())
            self._held.append(([stream.event() for stream in block.holders.values()], block))
        waiting = []
        for events, block in self._held:
            if not events or all(event.done for event in events):
                self._device.put(block.made, "reuses memory", lambda raw=block.raw: raw.fill_(255) is not None)
            else:
                waiting.append((events, block))
        self._held = waiting
