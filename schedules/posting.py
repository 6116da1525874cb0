"""When receives are posted: ahead of their use, but never before all that their message depends on has been issued on this rank.

On CUDA a receive is a kernel that occupies its stream until its message comes, and a send one until the peer receives. If a
message depended on something that its receiver has yet to issue, then at that point of the receiver's host the device would
have work that cannot end: whatever waits there for an idle device would hang (see `issued`). So a post stands behind the last
cell of its rank on which its message depends, by whatever way through other ranks.

Where several hosts wait for idle devices at once, that is not enough: what a receive needs may still have to be issued by a host
that waits for a message of this one. And with fewer hardware queues than streams (CUDA_DEVICE_MAX_CONNECTIONS=1), a receive also
holds up all that is issued behind it. Then posts are placed by running the rows of all ranks as if every post and every send
blocked its rank until the other side got there:

- If all ranks are stuck, a rank that waits at a send gets its receive at once, wherever its peer stands: the message is computed,
  so it depends on nothing that the peer has yet to issue.
- If nobody is at a send, a rank in the circle puts its receive off to its next stop: the one with the longest time to its use.

Stops are where a post may stand: in front of a cell and behind every send. What follows the last send of a cell, weight gradients,
is nothing that another rank waits for: in front of the next cell is before it. A receive that stands long before its message blocks
its rank in this model for nothing, and puts off those of its peer: the first stop for it is the one behind which, if all cells take
the same time, its own rank sends while the message is sent.

What comes out has been run to its end in that model, which no timing, no waits of hosts and no sharing of queues can make
stricter.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence

from pipehc.schedules.dependence import Dependence
from pipehc.schedules.program import Edge, Message, Placed, Post, Send, Wait


def add_posts(
    rows: Sequence[Sequence[Placed]],
    dependence: Dependence,
    earliest: Sequence[Sequence[int]],
    ahead: int,
    hosts_wait: bool,
) -> list[list[Placed]]:
    """The rows of all ranks, each in order, with a post for every message. Posts stand in front of a cell or, if hosts
    wait, behind a send inside one.

    earliest: the slot of time of every cell, see Facts. ahead: receives of an edge posted beyond those that the current cell waits
    for, at most.
    """
    sent: dict[Edge, list[Message]] = {}
    for row in rows:
        for _, instruction in row:
            if isinstance(instruction, Send):
                sent.setdefault((instruction.message.source, instruction.message.target), []).append(instruction.message)
    allowed = [_cells_allowed(rank, row, sent, dependence, ahead) for rank, row in enumerate(rows)]
    if not hosts_wait:
        return [_in_front(row, allowed[rank]) for rank, row in enumerate(rows)]
    times = _send_times(rows, earliest)
    ranks = [_Rank(rank, row, allowed[rank], times, earliest[rank]) for rank, row in enumerate(rows)]
    runnable = list(range(len(ranks)))
    while not all(rank.done for rank in ranks):
        while runnable:
            rank = ranks[runnable.pop()]
            rank.advance()
            if rank.at is None:
                continue
            peer = ranks[rank.at.message.target if isinstance(rank.at, Send) else rank.at.message.source]
            if peer.at is not None and peer.at.message == rank.at.message:
                rank.pass_on()
                peer.pass_on()
                runnable += [rank.number, peer.number]
        if not all(rank.done for rank in ranks):
            runnable.append(_let_one_go_on(ranks))
    return [rank.result for rank in ranks]


def _let_one_go_on(ranks: Sequence[_Rank]) -> int:
    """All are stuck. Returns which may go on."""
    for rank in ranks:
        if isinstance(rank.at, Send):
            ranks[rank.at.message.target].post(rank.at.message)
            rank.pass_on()
            return rank.number
    # Whoever is left is at a post, and so is its sender: follow them around the circle.
    seen: list[_Rank] = []
    rank = next(rank for rank in ranks if not rank.done)
    while rank not in seen:
        seen.append(rank)
        assert isinstance(rank.at, Post)
        rank = ranks[rank.at.message.source]
    early = max(seen[seen.index(rank) :], key=_Rank.slack)
    early.put_off()
    return early.number


def _cells_allowed(
    rank: int, row: Sequence[Placed], sent: Mapping[Edge, Sequence[Message]], dependence: Dependence, ahead: int
) -> dict[Message, tuple[int, int]]:
    """The first and the last cell of a rank in front of which each of its receives may be posted, those of an edge in order."""
    uses = {placed.instruction.message: placed.cell for placed in row if isinstance(placed.instruction, Wait)}
    found = {}
    for edge, messages in sorted(sent.items()):
        if edge[1] != rank:
            continue
        # Before its own wait and, since an edge is a FIFO, before the wait for anything sent later.
        latest = [uses[message] for message in messages]
        for k in range(len(latest) - 2, -1, -1):
            latest[k] = min(latest[k], latest[k + 1])
        for k, message in enumerate(messages):
            found[message] = max(latest[k - ahead] if k >= ahead else 0, dependence.of(message, rank) + 1), latest[k]
    return found


def _in_front(row: Sequence[Placed], allowed: Mapping[Message, tuple[int, int]]) -> list[Placed]:
    """The row with every post as early as it may be."""
    before = [Placed(first, Post(message)) for message, (first, _) in allowed.items()]
    return sorted([*before, *row], key=lambda placed: placed.cell)


def _send_times(rows: Sequence[Sequence[Placed]], earliest: Sequence[Sequence[int]]) -> dict[Message, tuple[int, int]]:
    """The slot of time in which a message is sent, if all cells take one, and how many its cell sends before it."""
    times: dict[Message, tuple[int, int]] = {}
    for rank, row in enumerate(rows):
        before: Counter[int] = Counter()
        for cell, instruction in row:
            if isinstance(instruction, Send):
                times[instruction.message] = earliest[rank][cell], before[cell]
                before[cell] += 1
    return times


class _Stops:
    """Where posts may stand in a row, in order: `at` holds the instructions in front of which they are."""

    def __init__(self, row: Sequence[Placed]) -> None:
        self.at: list[int] = []
        self.front: dict[int, int] = {}  # cell -> the stop in front of it
        self.sends: dict[int, list[int]] = {}  # cell -> for each of its sends, the stop before it
        for k, (cell, instruction) in enumerate(row):
            if cell not in self.front:
                if not self.sends.get(cell - 1):
                    self.at.append(k)
                self.front[cell] = len(self.at) - 1
            if isinstance(instruction, Send):
                self.sends.setdefault(cell, []).append(len(self.at) - 1)
                self.at.append(k + 1)


class _Rank:
    """One rank on its way through its row. `at`: the post or send that it waits in."""

    def __init__(
        self,
        number: int,
        row: Sequence[Placed],
        allowed: Mapping[Message, tuple[int, int]],
        times: Mapping[Message, tuple[int, int]],
        earliest: Sequence[int],
    ) -> None:
        self.number, self._row, self._stops = number, row, _Stops(row)
        self.result: list[Placed] = []
        self.at: Post | Send | None = None
        self._next, self._stop = 0, -1
        self._open = 0  # where the next post belongs in the result: at the present stop
        self._latest: dict[Message, int] = {}  # the last stop for a receive
        self._place: dict[Message, int] = {}  # the stop where it is
        self._due: dict[int, list[Message]] = {}  # the same by stop
        for message, (first, last) in allowed.items():
            slot, before = times[message]
            meanwhile = max(0, bisect_right(earliest, slot) - 1)
            sends = self._stops.sends.get(meanwhile)
            wanted = sends[min(before, len(sends) - 1)] if sends else self._stops.front[meanwhile]
            self._latest[message] = self._stops.front[last]
            stop = self._place[message] = min(self._latest[message], max(self._stops.front[first], wanted))
            self._due.setdefault(stop, []).append(message)

    @property
    def done(self) -> bool:
        return self._next == len(self._row)

    def advance(self) -> None:
        """Goes on to the next post or send, or to the end."""
        while self.at is None and not self.done:
            if self._next in self._stops.at[self._stop + 1 : self._stop + 2]:
                self._stop, self._open = self._stop + 1, len(self.result)
            instruction = self._row[self._next].instruction
            if due := self._due.get(self._stop):
                self.at = Post(due[0])
            elif isinstance(instruction, Send):
                self.at = instruction
            else:
                self._take()

    def pass_on(self) -> None:
        """The other side has got to where this rank waits."""
        at, self.at = self.at, None
        if isinstance(at, Post):
            self.post(at.message)
        else:
            self._take()

    def post(self, message: Message) -> None:
        """Posts a receive here, whatever the rank waits in."""
        self._due[self._place.pop(message)].remove(message)
        self.result.insert(self._open, Placed(self._row[self._next].cell, Post(message)))
        self._open += 1

    def slack(self) -> int:
        """For how many stops the receive at which this rank waits could be put off."""
        assert self.at is not None
        return self._latest[self.at.message] - self._stop

    def put_off(self) -> None:
        """Puts the receive at which this rank waits, and those of its edge after it, off to the next stop."""
        assert isinstance(self.at, Post) and self.slack() > 0, "a checked schedule has no circle of receives that are all needed"
        stop, source = self._stop, self.at.message.source
        later = [message for message in self._due[stop] if message.source == source]
        self._due[stop] = [message for message in self._due[stop] if message.source != source]
        self._due[stop + 1] = later + self._due.get(stop + 1, [])
        self._place |= dict.fromkeys(later, stop + 1)
        self.at = None

    def _take(self) -> None:
        self.result.append(self._row[self._next])
        self._next += 1
