"""Which cells of all ranks the cells of a schedule depend on, by whatever way through messages and ranks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from pipehc.schedules.program import Instruction, Message, Placed, Send, Wait


class Dependence:
    """last[rank][cell][other]: the last cell of rank `other` that a cell of `rank` depends on, -1 if none; itself on its own rank.

    A cell depends on those before it on its rank and, through the messages that it waits for, on the cells that send them.
    made: the cell that sends a message. rows: of all ranks, lowered. earliest: the slot of time of every cell, see Facts.
    """

    def __init__(self, rows: Sequence[Sequence[Placed]], earliest: Sequence[Sequence[int]]) -> None:
        self.last: list[list[list[int]]] = [[] for _ in rows]
        self.made: dict[Message, int] = {}
        carried: dict[Message, list[int]] = {}
        known = [[-1] * len(rows) for _ in rows]
        cells: list[tuple[int, int, int, list[Instruction]]] = [
            (earliest[rank][cell], rank, cell, [instruction for _, instruction in placed])
            for rank, row in enumerate(rows)
            for cell, placed in groupby(row, key=lambda placed: placed.cell)
        ]
        for _, rank, cell, instructions in sorted(cells, key=lambda entry: entry[:3]):
            for instruction in instructions:
                if isinstance(instruction, Wait):
                    known[rank] = list(map(max, known[rank], carried.pop(instruction.message)))
            known[rank] = [*known[rank][:rank], cell, *known[rank][rank + 1 :]]
            self.last[rank].append(known[rank])
            for instruction in instructions:
                if isinstance(instruction, Send):
                    carried[instruction.message], self.made[instruction.message] = known[rank], cell

    def of(self, message: Message, rank: int) -> int:
        """The last cell of `rank` that a message depends on."""
        return self.last[message.source][self.made[message]][rank]
