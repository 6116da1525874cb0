"""Ranges for profilers around every instruction and node: NVTX for Nsight Systems, and those of torch.profiler.

They open and close on the thread that issues the work in them, backwards too (`recompute.graph.run_backward`): so they hold the
kernels that are launched inside. Without a profiler they cost next to nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from pipehc.schedules.draw.colors import color
from pipehc.schedules.program import Instruction, Post, Run, Send, Wait
from pipehc.watch.trace import Node

DOMAIN = "pipehc"


def available() -> bool:
    """Whether the package nvtx is there, in a version whose domains have ranges: 0.2.12 or newer."""
    try:
        import nvtx
    except ImportError:
        return False
    return hasattr(nvtx.get_domain(DOMAIN), "push_range")


class Domain(Protocol):
    """As much of an NVTX domain as is used."""

    def get_event_attributes(self, message: str, color: int, category: str) -> Any: ...

    def push_range(self, attributes: Any) -> Any: ...

    def pop_range(self) -> Any: ...


class _Range:
    """One that is open."""

    def __init__(self, name: str) -> None:
        self.record = torch.profiler.record_function(name)
        self.over = False


class Markers:
    """An `Observer` of instructions, and of their nodes.

    held: (lane, stage) of all that this rank holds. domain: None: that of NVTX with our name; ImportError without the package nvtx.

    A range's category is the queue of its work as recordings have it (compute, high, communication; send or receive for messages),
    its colour that of our drawings: hue by the kind of work, tint by the stage.
    """

    def __init__(self, held: Sequence[tuple[int, int]], domain: Domain | None = None) -> None:
        if domain is None:
            import nvtx

            domain = nvtx.get_domain(DOMAIN)
        self._domain = domain
        self._chunk = {key: position for position, key in enumerate(sorted(held))}
        self._attributes: dict[str, Any] = {}  # made once: steps are alike
        self._open: list[_Range] = []
        self._close: Callable[[], None] | None = None

    def begin(self, instruction: Instruction) -> None:
        match instruction:
            case Run(action):
                what, category, hue = str(action), "compute", self._tinted(action.kind, action.lane, action.stage)
            case Wait(message, queue):
                what, category, hue = str(message), queue, color("wait")
            case Post(message) | Send(message):
                category = "receive" if isinstance(instruction, Post) else "send"
                what, hue = str(message), color(message.kind)
        self._close = self._range(f"{type(instruction).__name__} {what}", category, hue)

    def end(self, instruction: Instruction) -> None:
        assert self._close is not None
        self._close()

    def node(self, of: Node) -> Callable[[], None]:
        kind = "exchange" if of.queue == "communication" else of.kind
        where = f" @{of.lane}" if of.lane else ""
        return self._range(f"node {of}{where}", of.queue, self._tinted(kind, of.lane, of.stage))

    def _tinted(self, kind: str, lane: int, stage: int) -> str:
        return color(kind, self._chunk[lane, stage], len(self._chunk))

    def _range(self, name: str, category: str, hue: str) -> Callable[[], None]:
        """Opens a range; returns what closes it.

        Ranges nest: one that is over before those that were opened inside of it closes with the last of them. Only all-to-alls of a
        CPU, which end among the work of other nodes, come to that.
        """
        if name not in self._attributes:
            self._attributes[name] = self._domain.get_event_attributes(name, int(hue[1:], 16), category)
        self._domain.push_range(self._attributes[name])
        opened = _Range(name)
        opened.record.__enter__()
        self._open.append(opened)

        def close() -> None:
            opened.over = True
            while self._open and self._open[-1].over:
                self._open.pop().record.__exit__(None, None, None)
                self._domain.pop_range()

        return close
