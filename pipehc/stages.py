"""Which blocks make up a stage, and which rank holds which stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

from pipehc.schedules.placement import Placement, bidirectional, linear, vee

# schedule name -> its placement over so many ranks
PLACEMENTS: dict[str, Callable[[int], Placement]] = {"1f1b": linear, "dualpipe": bidirectional, "dualpipev": vee}


def assign_blocks(blocks: int, stages: int, explicit: Sequence[int] | None = None) -> list[range]:
    """The blocks of each stage, in order and without a gap.

    explicit: the number of blocks of each stage. Without it the numbers differ by one at most; where they differ, the first stage
    (embedding) and the last (output head) have the smaller one as far as possible, and later stages the larger one, because under
    1F1B early stages hold more micro-batches. Raises ValueError if a stage would stay empty or the numbers do not fit.
    """
    if stages < 1 or blocks < stages:
        raise ValueError(f"blocks = {blocks} over {stages} stages: every stage needs at least one block")
    if explicit is None:
        small, larger = divmod(blocks, stages)
        # The last but one backwards to the second, then the first: with at most stages - 1 to give, the last never gets one.
        order = [*range(stages - 2, 0, -1), 0]
        sizes = [small] * stages
        for stage in order[:larger]:
            sizes[stage] += 1
    else:
        sizes = list(explicit)
        if len(sizes) != stages:
            raise ValueError(f"blocks_per_stage = {sizes}: has {len(sizes)} numbers; must have {stages}, one a stage")
        if min(sizes) < 1:
            raise ValueError(f"blocks_per_stage = {sizes}: every stage needs at least one block")
        if sum(sizes) != blocks:
            raise ValueError(f"blocks_per_stage = {sizes}: sums to {sum(sizes)}; must sum to blocks = {blocks}")
    return [range(end - size, end) for end, size in zip(accumulate(sizes), sizes)]
