"""Proves that a compiled program ends, whatever the timing of its messages, and that it moves the right data.

The argument. Hosts issue instructions in order; posts and sends return at once; a wait ends when its message has arrived. An edge
is a FIFO, so a message arrives when it and all earlier ones of its edge are both sent and posted. If posts and sends of an edge
have the same order, 'all earlier ones' follows from program order. What is left is a graph: program order, and send -> wait.
Without a circle in it some instruction can always go on, at any speed of any rank or link.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipehc.schedules.program import Message, Post, Program, Run, Send, Wait

if TYPE_CHECKING:
    from pipehc.schedules.program import Instruction


class ProgramError(ValueError):
    """A compiled program that could hang or use data that is not there."""


def verify(program: Program) -> int:
    """Raises ProgramError unless the program is safe. Returns the largest number of receives outstanding on one edge."""
    sent, posted = _by_edge(program, Send), _by_edge(program, Post)
    for edge in sorted(sent.keys() | posted.keys()):
        if sent.get(edge, []) != posted.get(edge, []):
            raise ProgramError(f"edge {edge[0]} -> {edge[1]}: sends and posted receives are not the same list in the same order")
    outstanding = max((_check_rank(rank, row) for rank, row in enumerate(program.instructions)), default=0)
    _check_progress(program)
    return outstanding


def _by_edge(program: Program, kind: type[Send] | type[Post]) -> dict[tuple[int, int], list[Message]]:
    found: dict[tuple[int, int], list[Message]] = {}
    for rank, row in enumerate(program.instructions):
        for instruction in row:
            if isinstance(instruction, kind):
                message = instruction.message
                own = message.source if kind is Send else message.target
                if own != rank:
                    raise ProgramError(f"rank {rank} has the {kind.__name__.lower()} of rank {own}'s message: {message}")
                found.setdefault((message.source, message.target), []).append(message)
    return found


def _check_rank(rank: int, row: tuple[Instruction, ...]) -> int:
    """Post before wait before use, result before send, each once."""
    posted: set[Message] = set()
    waited: set[Message] = set()
    done: set[tuple[str, int, int, int]] = set()
    outstanding: dict[int, int] = {}
    peak = 0
    for instruction in row:
        if isinstance(instruction, Run):
            kind, stage, microbatch, lane = instruction.action
            done.add(("F" if kind == "F" else "I" if kind in "BI" else kind, lane, stage, microbatch))
            continue
        message = instruction.message
        if isinstance(instruction, Post):
            if message in posted:
                raise ProgramError(f"rank {rank} posts twice: {message}")
            posted.add(message)
            outstanding[message.source] = outstanding.get(message.source, 0) + 1
            peak = max(peak, outstanding[message.source])
        elif isinstance(instruction, Wait):
            if message not in posted or message in waited:
                raise ProgramError(f"rank {rank} waits for what is not posted, or twice: {message}")
            if (("F" if message.kind == "activation" else "I"), message.lane, message.stage, message.microbatch) in done:
                raise ProgramError(f"rank {rank} waits after the use: {message}")
            waited.add(message)
            outstanding[message.source] -= 1
        else:
            step = -1 if message.kind == "activation" else 1
            result = ("F" if message.kind == "activation" else "I", message.lane, message.stage + step, message.microbatch)
            if result not in done:
                raise ProgramError(f"rank {rank} sends before it has computed: {message}")
    if posted != waited:
        raise ProgramError(f"rank {rank} never waits for: {next(iter(posted - waited))}")
    return peak


def _check_progress(program: Program) -> None:
    position = [0] * len(program.instructions)
    sent: set[Message] = set()
    stuck_on: dict[Message, int] = {}
    runnable = list(range(len(position)))
    while runnable:
        rank = runnable.pop()
        row = program.instructions[rank]
        while position[rank] < len(row):
            instruction = row[position[rank]]
            if isinstance(instruction, Wait) and instruction.message not in sent:
                stuck_on[instruction.message] = rank
                break
            if isinstance(instruction, Send):
                sent.add(instruction.message)
                if instruction.message in stuck_on:
                    runnable.append(stuck_on.pop(instruction.message))
            position[rank] += 1
    if stuck_on:
        waits = "; ".join(f"rank {rank} waits for {message}" for message, rank in stuck_on.items())
        raise ProgramError(f"deadlock: {waits}")
