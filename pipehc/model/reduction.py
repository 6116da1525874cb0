"""Starts the sum of a stage's gradients over its replicas when the last of its weight gradients is there: during the cool-down."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from pipehc.schedules.program import Instruction, Program, Run

Held = tuple[int, int]  # lane, stage


class EarlyReduction:
    """An `Observer` of one rank for one step.

    start: called with (lane, stage) once all weight gradients of it are computed, stages in the order of `reduction_order`.
    expect: called before that, where the next instruction is its last W, and nothing but that W.
    """

    def __init__(
        self, program: Program, rank: int, start: Callable[[Held], None], expect: Callable[[Held], None] = lambda held: None
    ) -> None:
        self._start, self._expect = start, expect
        self._owed = Counter(held for held in map(_weight_gradient_of, program.instructions[rank]) if held is not None)
        by_stage = {stage: (lane, stage) for lane, stage in self._owed}
        self._order = [by_stage[stage] for stage in reduction_order(program, rank)]

    def begin(self, instruction: Instruction) -> None:
        held = _weight_gradient_of(instruction)
        if held is None or self._owed[held] > 1 or self._order[:1] != [held]:
            return
        # In a pair, or as a part of B, gradients that autograd computes may come after the first of those that W does.
        if isinstance(instruction, Run) and instruction.action.kind == "W" and instruction.pair is None:
            self._expect(held)

    def end(self, instruction: Instruction) -> None:
        held = _weight_gradient_of(instruction)
        if held is None:
            return
        self._owed[held] -= 1
        while self._order and not self._owed[self._order[0]]:
            self._start(self._order.pop(0))


def reduction_order(program: Program, rank: int) -> list[int]:
    """The stages of `rank` as their weight gradients end, first the one that ends first.

    With two lanes the mirrored rank holds the same stages and must reduce them in the same order: that of the lower one of the two.
    """
    schedule = program.schedule
    if schedule.placement.lanes == 2:
        rank = min(rank, schedule.ranks - 1 - rank)
    last = {held[1]: index for index, i in enumerate(program.instructions[rank]) if (held := _weight_gradient_of(i)) is not None}
    return sorted(last, key=last.__getitem__)


def _weight_gradient_of(instruction: Instruction) -> Held | None:
    if isinstance(instruction, Run) and instruction.action.kind in "BW":
        return instruction.action.lane, instruction.action.stage
    return None
