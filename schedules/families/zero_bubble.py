"""Zero-bubble schedules: the weight gradient waits for a gap, because nobody else waits for it.

ZB-H1: Qi et al., Zero Bubble Pipeline Parallelism, 2023. ZB-V: Qi et al., Pipeline Parallelism with Controllable Memory, 2024.
"""

from __future__ import annotations

from collections.abc import Iterator

from pipehc.schedules.actions import Action, Cell
from pipehc.schedules.placement import linear, vee

placement = linear
vee_placement = vee


def rows(ranks: int, microbatches: int) -> tuple[tuple[Cell, ...], ...]:
    """ZB-H1: 1F1B whose rank r lags r micro-batches behind with W. Every rank holds at most `ranks` activations.

    Bubble (P-1)(F + B - 2W), B the full backward: W fills the gaps that the backwards leave at the end. Where W > F it is
    (P-1)(B - W), which no order with `ranks` activations can beat: the entry rank waits that long for its first gradient.
    """

    def row(rank: int) -> Iterator[Cell]:
        warmup = min(ranks - rank - 1, microbatches)
        for m in range(warmup):
            yield Action("F", rank, m)
        for m in range(microbatches):
            if m + warmup < microbatches:
                yield Action("F", rank, m + warmup)
            yield Action("I", rank, m)
            if m >= rank:
                yield Action("W", rank, m - rank)
        for m in range(max(0, microbatches - rank), microbatches):
            yield Action("W", rank, m)

    return tuple(tuple(row(rank)) for rank in range(ranks))


def vee_rows(ranks: int, microbatches: int) -> tuple[tuple[Cell, ...], ...]:
    """ZB-V: stages r (chunk 0) and 2P-1-r (chunk 1) on rank r; at most `ranks` activations, no gap after the start if F = I = W.

    The pattern needs 2P - 1 micro-batches. For fewer it is made for that many and those that do not exist are left out, which
    leaves an order that can run.
    """
    full = max(microbatches, 2 * ranks - 1)
    return tuple(
        tuple(action for action in _vee_row(ranks, rank, full) if action.microbatch < microbatches) for rank in range(ranks)
    )


def _vee_row(ranks: int, rank: int, microbatches: int) -> list[Action]:
    row: list[Action] = []
    stage = (rank, 2 * ranks - 1 - rank)
    count = {(kind, chunk): 0 for kind in "FIW" for chunk in (0, 1)}

    def run(kinds: str, chunk: int) -> None:
        for kind in kinds:
            row.append(Action(kind, stage[chunk], count[kind, chunk], 0))  # type: ignore[arg-type]
            count[kind, chunk] += 1

    # Warm-up: fill the way down, then the way up, then start the backwards as they come.
    for _ in range(2 * (ranks - rank) - 1):
        run("F", 0)
    for _ in range(rank):
        run("F", 1)
        run("F", 0)
    for _ in range(ranks - rank):
        run("FIW", 1)
    # Steady: one forward and one whole backward of each chunk.
    while count["F", 1] < microbatches:
        if count["F", 0] < microbatches:
            run("F", 0)
        run("IW", 0)
        run("FIW", 1)
    # Cool-down: input gradients first, as neighbours wait for them; weight gradients fill the gaps.
    for _ in range(rank):
        run("I", 0)
        run("I", 1)
    for _ in range(ranks - rank):
        run("I", 0)
        run("W", 0)
    for chunk in (1, 0):
        while count["W", chunk] < microbatches:
            run("W", chunk)
    return row
