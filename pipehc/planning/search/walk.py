"""The fullest moment of a rank, from what its actions do to memory, in the order in which its program runs them."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from typing import NamedTuple

from pipehc.planning.dry_run.tables import Key
from pipehc.planning.search.footprint import Footprint
from pipehc.schedules.program import Program, Run, inputs_first


class Outline(NamedTuple):
    """Of one rank's program. steps: the actions, those together that are beside each other. buffers: receive buffers. neighbours:
    ranks that it exchanges stage messages with."""

    steps: tuple[tuple[Key, ...], ...]
    buffers: int
    neighbours: int


def outlines(program: Program, overlap: bool) -> list[Outline]:
    """By rank. overlap: pairs are interleaved, node by node: both halves are there together."""
    slots, edges, found = program.receive_slots(), program.edges(), []
    for rank, instructions in enumerate(program.instructions):
        runs = [i for i in inputs_first(instructions) if isinstance(i, Run)]
        groups = groupby(enumerate(runs), key=lambda item: _together(item[0], item[1], overlap))
        steps = tuple(tuple(key for _, run in group for key in _keys(run)) for _, group in groups)
        buffers = sum(count for (_, target), count in slots.items() if target == rank)
        found.append(Outline(steps, buffers, len({other for edge in edges if rank in edge for other in edge} - {rank})))
    return found


def activations_peak(outline: Outline, memory: Mapping[Key, Footprint]) -> float:
    """Bytes beside what is always there."""
    sums = {}
    for step in set(outline.steps):
        parts = [memory.get(key, _NOTHING) for key in step]
        sums[step] = sum(part.net for part in parts), sum(part.over for part in parts)
    live = fullest = 0.0
    for step in outline.steps:
        net, over = sums[step]
        fullest = max(fullest, live + max(0.0, net) + over)
        live += net
    return fullest


_NOTHING = Footprint()


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
