"""Proves of a compiled program: at every point of every rank's host, all work issued so far ends without that host doing more.

So one host may wait for an idle device wherever it likes, as many calls do: memory that is given back, a kernel that is loaded
late, a library's workspace. The rule holds for any number of hardware queues from the number of streams on, however slow any
rank or link is. It lets a message depend on what *another* host has yet to issue: if that one waits for an idle device too, and its
device for a message of this host, both wait forever. Where hosts may wait at the same time, more is asked for: `check_hosts_wait`.

The proof. A receive starts when it is issued, when the receives of its edge before it have ended and after its events; a send
likewise; both end when both have started. A Run starts after the Run before it, the messages waited for before it and its
events; the two halves of a pair wait for the messages of both. For every piece of work, a clock holds the last instruction of
every rank that it depends on. The rule says: what an instruction of a rank needs to end lies, on that rank, not behind it.

With several hosts that wait, or with fewer hardware queues than streams, work may also have to wait for whatever was issued
before it, on any stream of its rank. In the worst case, a host that waits after every instruction, or one queue, all of it does:
then every post and every send blocks its rank until the other side gets there. If the program ends even so, it ends wherever hosts
wait, and for any number of queues and any mapping of streams to them, because each adds some of these orders and no others.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence

from pipehc.schedules.order import Clock, join
from pipehc.schedules.program import Instruction, Message, Post, Program, ProgramError, Run, Send, Wait, inputs_first

Event = tuple[int, int]  # rank, number


def check_issued(program: Program) -> Clocks:
    """Raises ProgramError unless the rule holds with as many hardware queues as a rank has streams."""
    return Clocks(program).check()


def check_hosts_wait(program: Program) -> None:
    """Raises ProgramError unless the program ends wherever hosts wait for idle devices, and with any number of hardware queues."""
    rows = [[i for i in row if isinstance(i, (Post, Send))] for row in program.instructions]
    position = [0] * len(rows)
    runnable = list(range(len(rows)))
    while runnable:
        rank = runnable.pop()
        while position[rank] < len(rows[rank]):
            at = rows[rank][position[rank]]
            peer = at.message.target if isinstance(at, Send) else at.message.source
            if position[peer] == len(rows[peer]) or rows[peer][position[peer]].message != at.message:
                break
            position[rank] += 1
            position[peer] += 1
            runnable.append(peer)
    stuck = [f"rank {rank} {_words(row[k])}" for rank, (row, k) in enumerate(zip(rows, position)) if k < len(row)]
    if stuck:
        raise ProgramError(f"if every host waits for its device, nobody gets further: {'; '.join(stuck)}")


def _words(i: Instruction) -> str:
    return f"runs {i.action}" if isinstance(i, Run) else f"{'sends' if isinstance(i, Send) else 'receives'} the {i.message}"


class Clocks:
    """The last instruction of every rank that each piece of work depends on, found in the order in which that becomes known."""

    def __init__(self, program: Program) -> None:
        self.rows = [inputs_first(row) for row in program.instructions]
        self.of_runs: list[dict[int, Clock]] = [{} for _ in self.rows]  # by rank and instruction
        self._known: dict[Message | Event, Clock] = {}  # of messages that have arrived, and of Runs that record an event
        self._started: dict[Message, tuple[int, int, Clock]] = {}  # by one side alone: rank, instruction, clock
        self._ready: list[Iterator[Message | Event]] = []
        self._waiting: dict[Message | Event, list[Iterator[Message | Event]]] = {}

    def check(self) -> Clocks:
        for rank, row in enumerate(self.rows):
            streams: dict[Hashable, list[tuple[int, Instruction]]] = {}
            for index, i in enumerate(row):
                stream: Hashable = (type(i), i.message[4:]) if isinstance(i, (Post, Send)) else None
                streams.setdefault(stream, []).append((index, i))
            sends = {i.event: i.message for i in row if isinstance(i, Send) and i.event is not None}
            self._ready += [self._follow(rank, work, sends) for work in streams.values()]
        while self._ready:
            work = self._ready.pop()
            if (need := next(work, None)) is not None:
                self._waiting.setdefault(need, []).append(work)
        if self._waiting:
            raise ProgramError(f"deadlock: nothing ends what waits for {next(iter(self._waiting))}")
        return self

    def _follow(
        self, rank: int, work: Sequence[tuple[int, Instruction]], sends: Mapping[int, Message]
    ) -> Iterator[Message | Event]:
        """The work of one stream of a rank. Yields what is not known yet, until it is."""
        clock = [-1] * len(self.rows)
        before: list[Message | Event] = []  # what ends before the next piece starts
        for index, i in work:
            needs = [i.message] if isinstance(i, Wait) else [sends.get(event, (rank, event)) for event in i.after]
            for need in before + needs:
                while need not in self._known:
                    yield need
                clock = join(clock, self._known[need])
            if isinstance(i, Wait):
                continue
            clock[rank] = max(clock[rank], index)
            if not isinstance(i, Run):
                self._start(rank, index, i.message, clock)
                before = [i.message]
            else:
                self.of_runs[rank][index] = clock.copy()
                if i.event is not None:
                    self._learn((rank, i.event), clock)

    def _start(self, rank: int, index: int, message: Message, clock: Clock) -> None:
        """One side of a message has started; with the second one it goes through."""
        if message not in self._started:
            self._started[message] = rank, index, clock
            return
        other, other_index, other_clock = self._started.pop(message)
        end = join(clock, other_clock)
        for owner, place in ((rank, index), (other, other_index)):
            if end[owner] > place:
                first, later = (_words(self.rows[owner][k]) for k in (place, end[owner]))
                raise ProgramError(f"rank {owner} {first} before it {later}, without which that cannot end")
        self._learn(message, end)

    def _learn(self, key: Message | Event, clock: Clock) -> None:
        self._known[key] = clock.copy()
        self._ready += self._waiting.pop(key, [])
