"""How much of what kernels ask for reaches the memory of a GPU: their requests go through caches, in an order in which a GPU might
make them.

The model: a multiprocessor holds as many programs of a launch as its registers, shared memory and threads allow, and starts the
next one, in the order of their numbers, where one ends. Of all programs under way, the one whose clock is least makes its next
request, whole; that takes it a time for every line of 64 bytes, four times as long for those that come from memory, more or less by
chance. Reads go through a cache of each multiprocessor (L1: least recently used, empty at the start of a launch); what it has not,
and every write, goes to L2, where lines are written when they leave: first those that were asked for with that hint, then the least
recently used; or, whatever the hints, any by chance. L2 stays as it is between launches; in the end everything is written.

What the model leaves out: sectors, the hash that spreads lines over L2's two halves, and how long anything takes in truth. Its
figures are modelled, not measured.
"""

from __future__ import annotations

import heapq
import random
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

LINE = 64
"""Bytes: what L2 fetches at a time. Half a line of its own, so that tiles of 32 channels in bf16 share none."""


class Request(NamedTuple):
    """One load or store of a program: of these lines of memory. dead: with the hint that they may leave first."""

    writes: bool
    dead: bool
    lines: Sequence[int]


Program = Sequence[Request]


@dataclass(frozen=True)
class Device:
    """An H100's, but for its L2: that has 50 MB, of which a multiprocessor may see only the nearer half."""

    l2_bytes: int = 50 * 10**6
    at_random: bool = False
    l1_bytes: int = 128 * 2**10
    multiprocessors: int = 132
    registers: int = 65536
    shared: int = 227 * 2**10
    warps: int = 64

    def resident(self, registers: int, shared: int, warps: int) -> int:
        """Programs of so many registers a thread, bytes of shared memory and warps that a multiprocessor holds."""
        by_registers = self.registers // (-(-registers // 8) * 8 * 32 * warps)
        return max(1, min(by_registers, self.shared // (shared + 1024), self.warps // warps, 32))


@dataclass
class Moved:
    """Bytes."""

    memory_read: int = 0
    memory_written: int = 0
    l2_read: int = 0
    l2_written: int = 0

    def __add__(self, other: Moved) -> Moved:
        return Moved(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    @property
    def memory(self) -> int:
        return self.memory_read + self.memory_written

    @property
    def l2(self) -> int:
        return self.l2_read + self.l2_written


class _LeastRecentlyUsed:
    def __init__(self, size: int) -> None:
        self._size, self._lines, self._dead = size // LINE, OrderedDict[int, bool](), OrderedDict[int, bool]()

    def ask(self, line: int, writes: bool, dead: bool = False) -> tuple[bool, bool]:
        """(whether it was there, whether a line left that must be written)."""
        to = self._dead if dead else self._lines
        for lines in (self._lines, self._dead):
            if (changed := lines.pop(line, None)) is not None:
                to[line] = changed or writes
                return True, False
        to[line] = writes
        if len(self._lines) + len(self._dead) <= self._size:
            return False, False
        return False, (self._dead or self._lines).popitem(last=False)[1]

    def changed(self) -> int:
        """Lines that are still to be written."""
        return sum(self._lines.values()) + sum(self._dead.values())


class _AtRandom:
    def __init__(self, size: int, chance: random.Random) -> None:
        self._size, self._chance = size // LINE, chance
        self._lines, self._order = dict[int, bool](), list[int]()

    def ask(self, line: int, writes: bool, dead: bool = False) -> tuple[bool, bool]:
        if line in self._lines:
            self._lines[line] |= writes
            return True, False
        self._lines[line] = writes
        if len(self._order) < self._size:
            self._order.append(line)
            return False, False
        place = self._chance.randrange(self._size)
        self._order[place], leaves = line, self._order[place]
        return False, self._lines.pop(leaves)

    def changed(self) -> int:
        return sum(self._lines.values())


@dataclass
class Caches:
    """The caches of a device, for launches one after the other; `moved` has what each of them moved."""

    device: Device
    seed: int = 0
    moved: list[Moved] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._chance = random.Random(self.seed)
        size = self.device.l2_bytes
        self._l2 = _AtRandom(size, self._chance) if self.device.at_random else _LeastRecentlyUsed(size)

    def launch(self, programs: Iterator[Program], resident: int) -> None:
        """programs: in the order of their numbers. resident: of them, on a multiprocessor."""
        moved, l1, waiting = Moved(), [_LeastRecentlyUsed(self.device.l1_bytes) for _ in range(self.device.multiprocessors)], []
        self.moved.append(moved)
        slots = ((place, place % len(l1)) for place in range(resident * len(l1)))
        for (place, unit), program in zip(slots, programs):  # in this order: the last slot must not take a program for nothing
            requests = chain(program, chain.from_iterable(programs))  # whoever ends takes the next one
            heapq.heappush(waiting, (self._chance.random(), place, unit, requests))
        while waiting:
            clock, place, unit, requests = heapq.heappop(waiting)
            request = next(requests, None)
            if request is not None:
                took = self._request(request, l1[unit], moved) * (0.7 + 0.6 * self._chance.random())
                heapq.heappush(waiting, (clock + took, place, unit, requests))

    def end(self) -> Moved:
        """What is still to be written after the last launch."""
        return Moved(memory_written=LINE * self._l2.changed())

    def _request(self, request: Request, l1: _LeastRecentlyUsed, moved: Moved) -> float:
        """Its time."""
        writes, dead, lines = request
        missed = 0
        for line in lines:
            if not writes:
                if l1.ask(line, False)[0]:
                    continue
                moved.l2_read += LINE
            else:
                moved.l2_written += LINE
            there, leaves = self._l2.ask(line, writes, dead)
            if not there:
                missed += 1
                if not writes:  # whole lines are written, so that none is fetched for it
                    moved.memory_read += LINE
            if leaves:
                moved.memory_written += LINE
        return 1 + len(lines) + 3 * missed
