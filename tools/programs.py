"""What the programs of a launch ask for, from a few of them that run in Triton's interpreter.

A launch over 4096 tokens is minutes of the interpreter. But where tokens and channels divide into whole tiles, a program differs
from its neighbour on the longest axis of the grid in where its addresses begin and in nothing else: so the first of that axis runs,
the one beside it, and the last, which must ask for what those two foretell. Needs TRITON_INTERPRET=1 before the first import of
triton.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from math import prod
from types import TracebackType
from typing import Any

import numpy as np
from cache_model import LINE, Request
from interpreted import watched
from numpy.typing import NDArray
from torch import Tensor
from triton._C.libtriton.ir import EVICTION_POLICY
from triton.runtime import interpreter

DIFFERENT: Container[str] = {"parameter_sum_kernel"}
"""Kernels whose programs are not alike, so that all of them run."""

Index = tuple[int, int, int]
Asked = list[tuple[bool, bool, NDArray[np.int64]]]
"""Of a program, in order: whether it writes, whether lines may leave first, and addresses, at least one in each 32 bytes and the
last."""


INNER: dict[str, Callable[[Mapping[str, Any]], tuple[int, ...]]] = {
    "stream_gradient_kernel": lambda given: (-(-given["T"] // given["BT"]), 2),
}
"""Of a kernel whose longest axis has several dimensions, the faster ones, given the arguments of a launch."""


@dataclass
class Launch:
    name: str
    arguments: Mapping[str, Any]
    grid: Index
    asked: dict[Index, Asked] = field(default_factory=dict)
    """Of the programs that ran."""

    @cached_property
    def axis(self) -> int:
        """The longest of the grid."""
        return self.grid.index(max(self.grid))

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """That axis as several, the fastest last."""
        inner, whole = INNER[self.name](self.arguments) if self.name in INNER else (), max(self.grid)
        assert whole % prod(inner) == 0, (self.name, self.grid, inner)
        return whole // prod(inner), *inner

    def chosen(self) -> Iterator[Index]:
        """The programs that are to run."""
        along: list[Iterable[int]] = [range(size) for size in self.grid]
        if self.name not in DIFFERENT:
            beside = map(self.beside, range(len(self.shape)))
            along[self.axis] = dict.fromkeys((0, *beside, self.grid[self.axis] - 1))
        return product(*along)

    def programs(self) -> Iterator[list[Request]]:
        """Of all programs, in the order in which a GPU starts them: the first axis is the fastest."""
        for z, y, x in product(*map(range, reversed(self.grid))):
            asked = self.asked.get((x, y, z)) or self.foretold((x, y, z))
            yield [Request(writes, dead, _lines(addresses)) for writes, dead, addresses in asked]

    def foretold(self, index: Index) -> Asked:
        """From the first program and those beside it."""
        first, steps, at = self.asked[self.along(index, 0)], [], index[self.axis]
        for place in reversed(range(len(self.shape))):
            at, step = divmod(at, self.shape[place])
            steps.append((step, self.asked[self.along(index, self.beside(place))]))
        return [
            (writes, dead, addresses + sum(step * int(other[k][2][0] - addresses[0]) for step, other in steps))
            for k, (writes, dead, addresses) in enumerate(first)
        ]

    def along(self, index: Index, at: int) -> Index:
        """The program that is there on the axis."""
        return tuple(at if axis == self.axis else k for axis, k in enumerate(index))  # type: ignore[return-value]

    def beside(self, place: int) -> int:
        """Where on the axis the program is that is one further along a dimension of it; 0 where that has no more."""
        return prod(self.shape[place + 1 :]) if self.shape[place] > 1 else 0

    def check(self) -> None:
        """Raises ValueError if a program that ran asked for something else than was foretold."""
        for index, asked in self.asked.items():
            for (writes, _, addresses), (also, _, other) in zip(asked, self.foretold(index), strict=True):
                if writes != also or _lines(addresses) != _lines(other):
                    raise ValueError(f"{self.name}: program {index} of {self.grid} is not like the first one")


class Recorder:
    """Context manager: in it kernels run a few of their programs; `launches` has what they asked for."""

    def __init__(self) -> None:
        self.launches: list[Launch] = []
        self._asked: Asked = []
        self._places: dict[int, tuple[Tensor, int]] = {}
        self._end = 0

    def __enter__(self) -> Recorder:
        self._watched = watched(self._ask, self._run)
        self._watched.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._watched.__exit__(kind, error, trace)

    def _run(self, executor: Any, arguments: Mapping[str, Any], call: Callable[[], None]) -> None:
        grid = (*(executor.grid(arguments) if callable(executor.grid) else executor.grid), 1, 1)[:3]
        self._place([v for v in arguments.values() if isinstance(v, Tensor)])
        launch = Launch(executor.fn.__name__, arguments, grid)
        ids = interpreter.interpreter_builder
        set_dim, set_idx = ids.set_grid_dim, ids.set_grid_idx
        executor.grid = (1,)
        try:
            ids.set_grid_dim = lambda *_: set_dim(*grid)
            for index in launch.chosen():
                self._asked = launch.asked[index] = []
                ids.set_grid_idx = lambda *_, index=index: set_idx(*index)
                call()
        finally:
            del ids.set_grid_dim, ids.set_grid_idx
            executor.grid = grid
        if launch.name not in DIFFERENT:
            launch.check()
        self.launches.append(launch)

    def _place(self, tensors: list[Tensor]) -> None:
        """Where a GPU would have them: at multiples of 512 bytes. They are kept, so that no other comes to lie there."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._places:
                self._places[storage.data_ptr()] = tensor, self._end
                self._end += -(-storage.nbytes() // 512) * 512
        self._begins = sorted(self._places)

    def _ask(self, writes: bool, found: NDArray[np.int64], pointers: Any, rest: Sequence[Any]) -> None:
        if found.size:
            size = pointers.dtype.element_ty.primitive_bitwidth // 8
            sectors = np.diff(found // 32, prepend=-1) != 0
            ends = np.diff(found, append=found[-1] + 1000) > size
            begin = self._begins[bisect_right(self._begins, int(found[0])) - 1]
            addresses = found[sectors | ends] - begin + self._places[begin][1]
            self._asked.append((writes, EVICTION_POLICY.EVICT_FIRST in rest, addresses))


def _lines(addresses: NDArray[np.int64]) -> list[int]:
    return np.unique(addresses // LINE).tolist()
