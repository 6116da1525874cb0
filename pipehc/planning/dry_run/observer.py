"""Tells a tracker where the program is, from what the executor and the stages say of themselves."""

from __future__ import annotations

from collections.abc import Callable

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
    """Mixed into a kind of stage: it tells its W even where it is a part of a B."""

    def backward_weight(self, microbatch: int) -> None:
        assert self._watch is not None
        ended = self._watch("W", microbatch, "", "compute")
        super().backward_weight(microbatch)
        ended()
