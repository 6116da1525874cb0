"""What an action does to memory: how much more there is after it, and how much at its fullest moment."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from pipehc.planning.dry_run.tables import Key
from pipehc.planning.dry_run.tracker import Block


class Footprint(NamedTuple):
    """Bytes of one micro-batch. net: more after the action than before; negative where it frees. over: at its fullest moment
    above the larger of before and after."""

    net: float = 0.0
    over: float = 0.0


def footprints(history: Iterable[Block], microbatch: int) -> dict[Key, Footprint]:
    """By stage and action (F, R, B, W), from a run of several stages on one rank.

    What a stage hands to another is counted where it is received, as between ranks: with the other's action of the same kind.
    """
    events: dict[Key, list[tuple[int, int]]] = defaultdict(list)  # (clock, bytes)
    for block in history:
        born, died = block.where, block.died_in
        if born.stage < 0 or born.microbatch != microbatch or block.died is None or died is None:
            continue
        key = born.stage, born.kind
        if died.stage < 0 or died.microbatch != microbatch:  # between actions: it was of no use after its own
            events[key] += [(block.born, block.nbytes), (_END, -block.nbytes)]
            continue
        if died.stage != born.stage:
            events[died.stage, born.kind].append((_START, block.nbytes))
            if (died.stage, died.kind) == (died.stage, born.kind):
                events[died.stage, died.kind].append((block.died, -block.nbytes))
                continue
        else:
            events[key].append((block.born, block.nbytes))
        events[died.stage, died.kind].append((block.died, -block.nbytes))
    return {key: _footprint(sorted(own)) for key, own in events.items()}


_START, _END = -1, 2**62


def _footprint(events: list[tuple[int, int]]) -> Footprint:
    live = fullest = 0
    for _, nbytes in events:
        live += nbytes
        fullest = max(fullest, live)
    return Footprint(live, fullest - max(live, 0))
