"""Proves that a compiled program ends, whatever the timing of its messages, and that every piece of work finds the right data.

It ends. Hosts issue instructions in order; posts and sends return at once. A message arrives when it and all earlier ones of its
edge are both sent and posted; if posts and sends of every edge have the same order, 'all earlier ones' follows from program order.
Let every instruction block its whole rank until what it waits for is there: a wait until its message is sent, one after the event
of a send until the peer has posted the receive (gloo and large messages on NCCL complete a send no sooner), a pair until both of
its halves' messages are there. If even then every rank gets to its end, it does so at any speed of any rank, link or queue.

On a device nothing waits for a host: all work issued so far ends without its host doing more, see `issued`.

It finds the right data. Two uses of a tensor, one of them a write, must be ordered by queues, waits and events; and what a piece of
work reads from a buffer must be the message that it means.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from pipehc.schedules.actions import flatten
from pipehc.schedules.issued import Clocks, check_issued
from pipehc.schedules.order import Clock, Order, incoming, outgoing
from pipehc.schedules.program import Edge, Instruction, Message, Post, Program, ProgramError, Run, Send, Wait
from pipehc.schedules.schedule import Schedule


def verify(program: Program) -> Clocks:
    """Raises ProgramError unless the program is safe. Returns what each piece of its work depends on."""
    sent, posted = _by_edge(program, Send), _by_edge(program, Post)
    for edge in sorted(sent.keys() | posted.keys()):
        if sent.get(edge, []) != posted.get(edge, []):
            raise ProgramError(f"edge {edge[0]} -> {edge[1]}: sends and posted receives are not the same list in the same order")
    for rank, row in enumerate(program.instructions):
        _check_work(program.schedule, rank, row)
        _check_messages(program.schedule, rank, row)
        _check_order(program.schedule, rank, row)
    _check_progress(program)
    return check_issued(program)


def _by_edge(program: Program, kind: type[Send] | type[Post]) -> dict[Edge, list[Message]]:
    found: dict[Edge, list[Message]] = {}
    for rank, row in enumerate(program.instructions):
        for instruction in row:
            if isinstance(instruction, kind):
                message = instruction.message
                own = message.source if kind is Send else message.target
                if own != rank:
                    raise ProgramError(f"rank {rank} has the {kind.__name__.lower()} of rank {own}'s message: {message}")
                found.setdefault((message.source, message.target), []).append(message)
    return found


def _check_work(schedule: Schedule, rank: int, row: Sequence[Instruction]) -> None:
    """The rank runs what its schedule says, each once; R may be added, and B is I and W."""
    runs = Counter(split for i in row if isinstance(i, Run) for split in _split(i.action))
    wanted = Counter(split for action in flatten(schedule.rows[rank]) for split in _split(action))
    for action in (wanted - runs) + (runs - wanted):
        if action[0] != "R" or runs[action] != 1:
            raise ProgramError(f"rank {rank} runs {action[1]}{action[0]}{action[2]} {runs[action]} times, not {wanted[action]}")


def _split(action: tuple) -> list[tuple]:
    kind = action[0]
    return [(kind, *action[1:])] if kind != "B" else [("I", *action[1:]), ("W", *action[1:])]


def _check_messages(schedule: Schedule, rank: int, row: Sequence[Instruction]) -> None:
    """Post before wait before use, result before send, each once."""
    posted: set[Message] = set()
    waited: set[Message] = set()
    results: set[Message] = set()
    for instruction in row:
        if isinstance(instruction, Run):
            needed = incoming(schedule, instruction.action)
            if needed is not None and needed not in waited:
                raise ProgramError(f"rank {rank} does not wait, before the use, for the {needed}")
            if (result := outgoing(schedule, instruction.action)) is not None:
                results.add(result)
            continue
        message = instruction.message
        if isinstance(instruction, Post):
            if message in posted:
                raise ProgramError(f"rank {rank} posts twice the {message}")
            posted.add(message)
        elif isinstance(instruction, Wait):
            if message not in posted or message in waited:
                raise ProgramError(f"rank {rank} waits for what is not posted, or twice, for the {message}")
            waited.add(message)
        else:
            if message not in results:
                raise ProgramError(f"rank {rank} sends before it has computed, or twice, the {message}")
            results.remove(message)
    if posted != waited:
        raise ProgramError(f"rank {rank} never waits for the {next(iter(posted - waited))}")
    if results:
        raise ProgramError(f"rank {rank} never sends the {next(iter(results))}")


def _check_order(schedule: Schedule, rank: int, row: Sequence[Instruction]) -> None:
    """Every two uses of a tensor, one of them a write, are ordered; buffers hold what their readers mean."""
    order = Order(schedule, row)
    recorded: dict[int, Clock] = {}
    for index, instruction in enumerate(row):
        after: list[Clock] = []
        if not isinstance(instruction, Wait):
            for event in instruction.after:
                if event not in recorded:
                    raise ProgramError(f"rank {rank}, instruction {index}: nothing before it records event {event}")
                after.append(recorded[event])
        for kind, lane, stage, microbatch in order.misread(instruction):
            what = f"{kind} for stage {stage}@{lane}, micro-batch {microbatch}"
            raise ProgramError(f"rank {rank}, instruction {index}: its buffer does not hold the {what}")
        end, races = order.visit(index, instruction, after)
        for use, location in races:
            what = " ".join(map(str, location))
            if use is None:
                raise ProgramError(f"rank {rank}, instruction {index}: reads '{what}' before anything wrote it")
            raise ProgramError(f"rank {rank}: instructions {use.instruction} and {index} may touch '{what}' at the same time")
        if isinstance(instruction, (Run, Send)) and instruction.event is not None:
            if instruction.event in recorded:
                raise ProgramError(f"rank {rank}, instruction {index}: event {instruction.event} is recorded twice")
            recorded[instruction.event] = end
    _check_pairs(order, rank, row)


def _check_pairs(order: Order, rank: int, row: Sequence[Instruction]) -> None:
    """The halves of a pair may be interleaved: they share no tensor that one of them writes, and do not wait for each other."""
    forward: Run | None = None
    events: set[int | None] = set()
    for instruction in row:
        if isinstance(instruction, Send) and forward is not None and instruction.after == (forward.event,):
            events.add(instruction.event)
        if not isinstance(instruction, Run) or instruction.pair is None:
            continue
        if instruction.action.kind == "F":
            forward, events = instruction, {instruction.event}
        elif forward is not None and forward.pair == instruction.pair:
            one, other = order.pieces(forward), order.pieces(instruction)
            written = {w for piece in one for w in piece.writes} & {x for piece in other for x in piece.reads + piece.writes}
            written |= {w for piece in other for w in piece.writes} & {x for piece in one for x in piece.reads}
            if written or not events.isdisjoint(instruction.after):
                raise ProgramError(f"rank {rank}: {forward.action} and {instruction.action} are a pair, but cannot be interleaved")


def _check_progress(program: Program) -> None:
    rows = [_hoist(row) for row in program.instructions]
    position = [0] * len(rows)
    sent: set[Message] = set()
    posted: set[Message] = set()
    stuck: dict[tuple[str, Message], int] = {}
    sends = [{i.event: i.message for i in row if isinstance(i, Send) and i.event is not None} for row in program.instructions]
    runnable = list(range(len(rows)))
    while runnable:
        rank = runnable.pop()
        row = rows[rank]
        while position[rank] < len(row):
            instruction = row[position[rank]]
            need = _unmet(instruction, sends[rank], sent, posted)
            if need is not None:
                stuck[need] = rank
                break
            if isinstance(instruction, (Post, Send)):
                done, name = (posted, "posted") if isinstance(instruction, Post) else (sent, "sent")
                done.add(instruction.message)
                if (name, instruction.message) in stuck:
                    runnable.append(stuck.pop((name, instruction.message)))
            position[rank] += 1
    if stuck:
        circle = sorted((rank, what, message) for (what, message), rank in stuck.items())
        waits = "; ".join(f"rank {rank} waits until {message} is {what}" for rank, what, message in circle)
        raise ProgramError(f"deadlock: {waits}")


def _unmet(
    instruction: Instruction, sends: dict[int, Message], sent: set[Message], posted: set[Message]
) -> tuple[str, Message] | None:
    """What has to happen on another rank before the instruction can go on."""
    if isinstance(instruction, Wait):
        return None if instruction.message in sent else ("sent", instruction.message)
    for event in instruction.after:
        message = sends.get(event)
        if message is not None and message not in posted:
            return "posted", message
    return None


def _hoist(row: Sequence[Instruction]) -> list[Instruction]:
    """The row with what a pair waits for moved in front of the pair: its halves may be interleaved in any way."""
    result: list[Instruction] = []
    start: dict[int, int] = {}  # pair -> where it begins in the result
    last = {i.pair: k for k, i in enumerate(row) if isinstance(i, Run) and i.pair is not None}
    current: int | None = None
    for k, instruction in enumerate(row):
        if isinstance(instruction, Run) and instruction.pair is not None and instruction.pair not in start:
            current = instruction.pair
            start[current] = len(result)
        if current is not None and k < last[current] and isinstance(instruction, Wait):
            result.insert(start[current], instruction)
            start[current] += 1
        else:
            result.append(instruction)
    return result
