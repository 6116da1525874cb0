"""Starts the sum of a stage's gradients over its replicas where the program says so: as a rule, after its last weight gradient."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from pipehc.schedules.program import Held, Instruction, Program, Run


class EarlyReduction:
    """An `Observer` of one rank for one step.

    start: called with (lane, stage) once all weight gradients of it are computed, as `Program.reductions` says.
    expect: called before that, where the next instruction is its last W, and nothing but that W.
    """

    def __init__(
        self, program: Program, rank: int, start: Callable[[Held], None], expect: Callable[[Held], None] = lambda held: None
    ) -> None:
        self._start, self._expect = start, expect
        self._owed = Counter(held for held in map(_weight_gradient_of, program.instructions[rank]) if held is not None)
        self._left = list(program.reductions[rank])
        self._issued = 0

    def begin(self, instruction: Instruction) -> None:
        held = _weight_gradient_of(instruction)
        if held is None or self._owed[held] > 1 or self._left[:1] != [(held, self._issued + 1)]:
            return
        # In a pair, or as a part of B, gradients that autograd computes may come after the first of those that W does.
        if isinstance(instruction, Run) and instruction.action.kind == "W" and instruction.pair is None:
            self._expect(held)

    def end(self, instruction: Instruction) -> None:
        self._issued += 1
        if (held := _weight_gradient_of(instruction)) is not None:
            self._owed[held] -= 1
        while self._left and self._left[0][1] <= self._issued:
            (held, _), *self._left = self._left
            assert not self._owed[held], f"weight gradients of {held} are owed still"
            self._start(held)


def _weight_gradient_of(instruction: Instruction) -> Held | None:
    if isinstance(instruction, Run) and instruction.action.kind in "BW":
        return instruction.action.lane, instruction.action.stage
    return None
