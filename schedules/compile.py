"""Lowers a schedule to a program: adds messages, posts receives ahead, waits as late as possible, sends as early as possible."""

from __future__ import annotations

from dataclasses import replace

from pipehc.schedules.actions import Action, Pair, flatten
from pipehc.schedules.buffers import Reuse, ReuseByDependence, ReuseByTime, add_events, assign_slots
from pipehc.schedules.check import check
from pipehc.schedules.dependence import Dependence
from pipehc.schedules.issued import Clocks, check_hosts_wait
from pipehc.schedules.order import incoming, outgoing
from pipehc.schedules.posting import add_posts
from pipehc.schedules.program import ComputeQueue, Instruction, Placed, Program, ProgramError, Run, Send, Wait
from pipehc.schedules.reductions import reductions
from pipehc.schedules.schedule import Schedule
from pipehc.schedules.verify import verify


def compile(
    schedule: Schedule,
    *,
    ahead: int = 4,
    split_backward: bool = True,
    recompute: bool = False,
    high: bool = False,
    hosts_wait: bool = False,
) -> Program:
    """The program of `schedule`, checked before and verified after.

    ahead: receives posted on a directed edge beyond those that the current cell waits for; it bounds the receive buffers.
    split_backward: a full backward whose input gradient goes to another rank becomes I, send, W: the neighbour starts earlier.
    recompute: an R before the wait for the gradient that needs it, for every backward that has none in the schedule.
    hosts_wait: safe also where hosts wait for idle devices, several at once, in the middle of a step, and where a rank has fewer
        hardware queues than streams (CUDA_DEVICE_MAX_CONNECTIONS), at the price of receives that are posted later. For CUDA.
    high: the last piece of a forward and the first of a backward run on the high-priority queue (mHC's post-residual of the MLP),
        except on the last stage, where the loss comes in between.
    Raises ScheduleError if the schedule cannot run, ValueError if `ahead` is not positive.
    """
    if ahead < 1:
        raise ValueError(f"ahead = {ahead}: must be at least 1")
    earliest = check(schedule).earliest
    lowered = [_lower_row(schedule, rank, split_backward, recompute, high) for rank in range(schedule.ranks)]
    dependence = Dependence(lowered, earliest)
    placed = add_posts(lowered, dependence, earliest, ahead, hosts_wait)
    if hosts_wait:
        # Every message has gone through before its rank goes on, so any buffer is safe; by time, nobody is kept waiting for one. A
        # pair has two messages for one edge. What evaluations send is little of what memory there is.
        spare = ahead + 1 if schedule.forward_only else 2
        program, clocks = _with_buffers(schedule, placed, ReuseByTime(placed, earliest), spare, most=ahead + 1)
        check_hosts_wait(program)
    else:
        try:
            program, clocks = _with_buffers(schedule, placed, ReuseByTime(placed, earliest), ahead + 1)
        except ProgramError:  # few schedules need more buffers than time suggests
            program, clocks = _with_buffers(schedule, placed, ReuseByDependence(placed, dependence), ahead + 1)
    return replace(program, reductions=reductions(program, clocks, hosts_wait))


def _with_buffers(
    schedule: Schedule, rows: list[list[Placed]], reuse: Reuse, spare: int, most: int | None = None
) -> tuple[Program, Clocks]:
    slots = assign_slots(schedule, rows, reuse, spare, most)
    program = Program(schedule, tuple(add_events(schedule, row) for row in slots))
    return program, verify(program)


def _lower_row(schedule: Schedule, rank: int, split_backward: bool, recompute: bool, high: bool) -> list[Placed]:
    """Waits, runs and sends of one rank. The forward half of a pair sends before its backward half waits."""
    row: list[Placed] = []
    recomputed = {action for action in flatten(schedule.rows[rank]) if action.kind == "R"}
    last = schedule.placement.stages - 1

    def lower(cell: int, action: Action, pair: int | None) -> None:
        def add(instruction: Instruction) -> None:
            row.append(Placed(cell, instruction))

        backward = action.kind in "BI"
        # On the last stage the loss comes between the last FFN's forward and its backward.
        special: ComputeQueue = "high" if high and action.stage != last else "compute"
        if recompute and backward and (again := action._replace(kind="R")) not in recomputed:
            add(Run(again, pair))
        if (message := incoming(schedule, action)) is not None:
            add(Wait(message, special if backward else "compute"))
        out = outgoing(schedule, action)
        split = split_backward and action.kind == "B" and out is not None
        entry, exit = (special if backward else "compute"), (special if action.kind == "F" else "compute")
        add(Run(action._replace(kind="I") if split else action, pair, entry, exit))  # type: ignore[arg-type]
        if out is not None:
            add(Send(out))
        if split:
            add(Run(action._replace(kind="W"), pair))

    pairs = 0
    for index, cell in enumerate(schedule.rows[rank]):
        if isinstance(cell, Pair):
            lower(index, cell.forward, pairs)
            lower(index, cell.backward, pairs)
            pairs += 1
        else:
            lower(index, cell, None)
    return row

