"""Lowers a schedule to a program: adds messages, posts receives ahead, waits as late as possible, sends as early as possible."""

from __future__ import annotations

from pipehc.schedules.actions import Action, Pair, flatten
from pipehc.schedules.check import check
from pipehc.schedules.program import Instruction, Message, Post, Program, Run, Send, Wait
from pipehc.schedules.schedule import Schedule
from pipehc.schedules.verify import verify


def compile(schedule: Schedule, *, ahead: int = 2, split_backward: bool = True, recompute: bool = False) -> Program:
    """The program of `schedule`, checked before and verified after.

    ahead: receives posted per directed edge before the first of them is needed; it bounds the receive buffers.
    split_backward: a full backward whose input gradient goes to another rank becomes I, send, W: the neighbour starts earlier.
    recompute: an R before the wait for the gradient that needs it, for every backward that has none in the schedule.
    Raises ScheduleError if the schedule cannot run, ValueError if `ahead` is not positive.
    """
    if ahead < 1:
        raise ValueError(f"ahead = {ahead}: must be at least 1")
    check(schedule)
    lowered = [_lower_row(schedule, rank, split_backward, recompute) for rank in range(schedule.ranks)]
    sent: dict[tuple[int, int], list[Message]] = {}
    for row in lowered:
        for instruction in row:
            if isinstance(instruction, Send):
                sent.setdefault((instruction.message.source, instruction.message.target), []).append(instruction.message)
    program = Program(schedule, tuple(_add_posts(rank, row, sent, ahead) for rank, row in enumerate(lowered)))
    verify(program)
    return program


def incoming(schedule: Schedule, action: Action) -> Message | None:
    """The message that `action` needs from another rank, if any."""
    placement, (kind, stage, microbatch, lane) = schedule.placement, action
    if kind == "F" and stage:
        source, name = placement.rank(lane, stage - 1), "activation"
    elif kind in "BI" and stage + 1 < placement.stages:
        source, name = placement.rank(lane, stage + 1), "gradient"
    else:
        return None
    target = placement.rank(lane, stage)
    return None if source == target else Message(name, lane, stage, microbatch, source, target)  # type: ignore[arg-type]


def outgoing(schedule: Schedule, action: Action) -> Message | None:
    """The message that carries the result of `action` to another rank, if any."""
    kind, stage, microbatch, lane = action
    if kind == "F" and stage + 1 < schedule.placement.stages:
        return incoming(schedule, Action("F", stage + 1, microbatch, lane))
    if kind in "BI" and stage:
        return incoming(schedule, Action("I", stage - 1, microbatch, lane))
    return None


def _lower_row(schedule: Schedule, rank: int, split_backward: bool, recompute: bool) -> list[Instruction]:
    """Waits, runs and sends of one rank. The forward half of a pair sends before its backward half waits."""
    row: list[Instruction] = []
    recomputed = {action for action in flatten(schedule.rows[rank]) if action.kind == "R"}

    def lower(action: Action, pair: int | None) -> None:
        if recompute and action.kind in "BI" and (again := action._replace(kind="R")) not in recomputed:
            row.append(Run(again, pair))
        if (message := incoming(schedule, action)) is not None:
            row.append(Wait(message))
        out = outgoing(schedule, action)
        split = split_backward and action.kind == "B" and out is not None
        row.append(Run(action._replace(kind="I") if split else action, pair))
        if out is not None:
            row.append(Send(out))
        if split:
            row.append(Run(action._replace(kind="W"), pair))

    pairs = 0
    for cell in schedule.rows[rank]:
        if isinstance(cell, Pair):
            lower(cell.forward, pairs)
            lower(cell.backward, pairs)
            pairs += 1
        else:
            lower(cell, None)
    return row


def _add_posts(
    rank: int, row: list[Instruction], sent: dict[tuple[int, int], list[Message]], ahead: int
) -> tuple[Instruction, ...]:
    """Inserts the posts: on each edge in the order of the peer's sends, `ahead` receives before they must be posted.

    A receive must be posted before its own wait and, since an edge is a FIFO, before the wait for anything sent after it.
    """
    waits = {i.message: position for position, i in enumerate(row) if isinstance(i, Wait)}
    posts: dict[int, list[Instruction]] = {}
    for (_, target), messages in sorted(sent.items()):
        if target != rank:
            continue
        latest = [waits[message] for message in messages]
        for k in range(len(latest) - 2, -1, -1):
            latest[k] = min(latest[k], latest[k + 1])
        for k, message in enumerate(messages):
            posts.setdefault(latest[k - ahead] if k >= ahead else 0, []).append(Post(message))
    result: list[Instruction] = []
    for position, instruction in enumerate(row):
        result += posts.get(position, [])
        result.append(instruction)
    return tuple(result)
