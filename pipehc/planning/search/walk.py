"""The fullest moment of a rank, from what its actions do to memory, in the order in which its program runs them."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby

from pipehc.planning.dry_run.tables import Key
from pipehc.planning.search.footprint import Footprint
from pipehc.schedules.program import Program, Run, inputs_first


def activations_peak(program: Program, rank: int, memory: Mapping[Key, Footprint], overlap: bool) -> float:
    """Bytes beside what is always there. overlap: pairs are interleaved, node by node: both halves are there together."""
    runs = [i for i in inputs_first(program.instructions[rank]) if isinstance(i, Run)]
    live = fullest = 0.0
    for (pair, recompute), group in groupby(enumerate(runs), key=lambda item: _together(item[0], item[1], overlap)):
        del pair, recompute
        parts = [memory.get(key, Footprint()) for _, run in group for key in _keys(run)]
        net = sum(part.net for part in parts)
        fullest = max(fullest, live + max(0.0, net) + sum(part.over for part in parts))
        live += net
    return fullest


def _together(index: int, run: Run, overlap: bool) -> tuple[int, int]:
    """Runs of one group are beside each other."""
    if run.pair is None or not overlap or run.action.kind == "R":
        return -1, index
    return run.pair, -1


def _keys(run: Run) -> list[Key]:
    stage, kind = run.action.stage, run.action.kind
    if kind == "B":
        return [(stage, "B"), (stage, "W")]
    return [(stage, "B" if kind == "I" else kind)]


def message_buffers(program: Program, rank: int) -> int:
    """Receive buffers of a rank."""
    return sum(count for (_, target), count in program.receive_slots().items() if target == rank)


def neighbours(program: Program, rank: int) -> int:
    """Ranks that a rank exchanges stage messages with."""
    return len({other for edge in program.edges() if rank in edge for other in edge} - {rank})
