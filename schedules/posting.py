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
- If nobody is at a send, a rank in the circle puts its receive off to its next cell: the one with the longest time to its use.

What comes out has been run to its end in that model, which no timing, no waits of hosts and no sharing of queues can make
stricter.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipehc.schedules.dependence import Dependence
from pipehc.schedules.program import Edge, Message, Placed, Post, Send, Wait


def add_posts(
    rows: Sequence[Sequence[Placed]], dependence: Dependence, ahead: int, hosts_wait: bool
) -> list[list[Placed]]:
    """The rows of all ranks, each in order, with a post for every message. Posts stand in front of a cell or, if hosts
    wait, behind a send inside one.

    ahead: receives of an edge posted beyond those that the current cell waits for, at most.
    """
    sent: dict[Edge, list[Message]] = {}
    for row in rows:
        for _, instruction in row:
            if isinstance(instruction, Send):
                sent.setdefault((instruction.message.source, instruction.message.target), []).append(instruction.message)
    ranks = [_Rank(rank, row, sent, dependence, ahead) for rank, row in enumerate(rows)]
    if not hosts_wait:
        return [rank.with_posts() for rank in ranks]
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


class _Rank:
    """One rank on its way through its row. `at`: the post or send that it waits in."""

    def __init__(
        self, number: int, row: Sequence[Placed], sent: dict[Edge, list[Message]], dependence: Dependence, ahead: int
    ) -> None:
        self.number, self._row = number, row
        self.result: list[Placed] = []
        self.at: Post | Send | None = None
        self._next = 0
        self._open = 0  # where the next post belongs in the result: in front of the present cell, or after its last send
        self._latest: dict[Message, int] = {}  # the cell that a receive must be posted in front of
        self._place: dict[Message, int] = {}  # the cell in front of which it is
        self._due: dict[int, list[Message]] = {}  # the same by cell
        uses = {placed.instruction.message: placed.cell for placed in row if isinstance(placed.instruction, Wait)}
        for edge, messages in sorted(sent.items()):
            if edge[1] != number:
                continue
            # Before its own wait and, since an edge is a FIFO, before the wait for anything sent later.
            latest = [uses[message] for message in messages]
            for k in range(len(latest) - 2, -1, -1):
                latest[k] = min(latest[k], latest[k + 1])
            self._latest |= zip(messages, latest)
            for k, message in enumerate(messages):
                cell = self._place[message] = max(latest[k - ahead] if k >= ahead else 0, dependence.of(message, number) + 1)
                self._due.setdefault(cell, []).append(message)

    def with_posts(self) -> list[Placed]:
        """The row with every post where it is due."""
        before = [Placed(cell, Post(message)) for cell, due in self._due.items() for message in due]
        return sorted([*before, *self._row], key=lambda placed: placed.cell)

    @property
    def done(self) -> bool:
        return self._next == len(self._row)

    def advance(self) -> None:
        """Goes on to the next post or send, or to the end."""
        while self.at is None and not self.done:
            cell, instruction = self._row[self._next]
            if self._next == 0 or self._row[self._next - 1].cell != cell:
                self._open = len(self.result)
                if due := self._due.get(cell):
                    self.at = Post(due[0])
                    return
            if isinstance(instruction, Send):
                self.at = instruction
                return
            self._take()

    def pass_on(self) -> None:
        """The other side has got to where this rank waits."""
        at, self.at = self.at, None
        if isinstance(at, Post):
            self.post(at.message)
        else:
            self._take()
            self._open = len(self.result)

    def post(self, message: Message) -> None:
        """Posts a receive here, whatever the rank waits in."""
        self._due[self._place.pop(message)].remove(message)
        self.result.insert(self._open, Placed(self._row[self._next].cell, Post(message)))
        self._open += 1

    def slack(self) -> int:
        """For how many cells the receive at which this rank waits could be put off."""
        assert self.at is not None
        return self._latest[self.at.message] - self._row[self._next].cell

    def put_off(self) -> None:
        """Puts the receive at which this rank waits, and those of its edge after it, in front of the next cell."""
        assert isinstance(self.at, Post) and self.slack() > 0, "a checked schedule has no circle of receives that are all needed"
        cell, source = self._row[self._next].cell, self.at.message.source
        later = [message for message in self._due[cell] if message.source == source]
        self._due[cell] = [message for message in self._due[cell] if message.source != source]
        self._due[cell + 1] = later + self._due.get(cell + 1, [])
        self._place |= dict.fromkeys(later, cell + 1)
        self.at = None

    def _take(self) -> None:
        self.result.append(self._row[self._next])
        self._next += 1
