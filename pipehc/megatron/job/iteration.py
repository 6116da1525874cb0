"""Which iteration of its own count a training loop is in."""

from __future__ import annotations

import sys

from megatron.core import rerun_state_machine


class Iterations:
    """Numbers the training steps of a job as its log does, from 1, and after a resume from where it went on.

    megatron.training says it in its arguments, Megatron Bridge in Megatron's rerun state machine. For a loop that says it nowhere,
    steps are counted in this process.
    """

    def __init__(self) -> None:
        self._last = 0
        self._machine_offset: int | None = None

    def next(self) -> int:
        """The number of the training step that begins."""
        self._last = self._of_training() or self._of_machine() or self._last + 1
        return self._last

    def _of_training(self) -> int | None:
        arguments = getattr(sys.modules.get("megatron.training.global_vars"), "_GLOBAL_ARGS", None)
        done: int | None = getattr(arguments, "curr_iteration", None)
        return None if done is None else done + 1

    def _of_machine(self) -> int | None:
        machine = rerun_state_machine._GLOBAL_RERUN_STATE_MACHINE
        if machine is None or machine.state is rerun_state_machine.RerunState.NOT_RUNNING_YET:
            return None
        if self._machine_offset is None:  # loops that never told it where they start have it count from 0
            self._machine_offset = 1 if machine.current_iteration == 0 else 0
        return machine.current_iteration + self._machine_offset
