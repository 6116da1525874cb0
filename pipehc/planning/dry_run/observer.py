"""Tells a tracker where the program is, from what the executor and the stages say of themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial

from pipehc.model.stage import ChainStage
from pipehc.planning.dry_run.tracker import Tracker, Where
from pipehc.schedules.program import Instruction, Run
from pipehc.watch.trace import Node


class Observer:
    """Of instructions and nodes: in a node of an action, else in an instruction."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker

    def begin(self, instruction: Instruction) -> None:
        if isinstance(instruction, Run):
            kind, stage, microbatch, _ = instruction.action
            self._tracker.enter(Where("B" if kind == "I" else kind, stage, microbatch))
        else:
            self._tracker.enter(Where("step", node=type(instruction).__name__))

    def end(self, instruction: Instruction) -> None:
        self._tracker.leave()

    def node(self, of: Node) -> Callable[[], None]:
        self._tracker.enter(Where(of.kind, of.stage, of.microbatch, of.name, of.queue))
        return self._tracker.leave


class TellingStage(ChainStage):
    """Mixed into a kind of stage: it tells its W, and whose it is, even where it is a part of a B."""

    def backward_weight(self, microbatch: int) -> None:
        with self._told(microbatch, ""):
            super().backward_weight(microbatch)

    def around(self, microbatch: int) -> Callable[[str], AbstractContextManager[object]]:
        return partial(self._told, microbatch)

    @contextmanager
    def _told(self, microbatch: int, node: str) -> Iterator[None]:
        """Of a node with the name that it has in pairs, where the end of an FFN has no turn of its own."""
        block, _, kind = node.rpartition(".")
        assert self._watch is not None
        ended = self._watch("W", microbatch, f"{block}.mlp" if kind == "mlp_post" else node, "compute")
        yield
        ended()
