"""Which blocks make up a stage, which rank holds which stages, and the schedule over them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from pipehc.schedules import FAMILIES, Costs, Schedule, auto, build
from pipehc.schedules.auto import SEARCHED
from pipehc.schedules.families.forward import forward_only
from pipehc.schedules.placement import Placement


def placement_of(config: Any, ranks: int) -> Placement:
    """Where the stages of the configured schedule lie; `config` has the sections schedule and search."""
    if config.schedule.name == "auto":
        return SEARCHED[config.search.placement](ranks)
    family = FAMILIES[config.schedule.name]
    return family.placement(ranks) if family.chunks is None else family.placement(ranks, config.schedule.chunks or family.chunks)


def given_costs(config: Any) -> Costs | None:
    """What a search is for, where the configuration gives any of it; the rest are the defaults of Costs."""
    times = {key: getattr(config.search, key) for key in ("f", "b", "w", "r", "link", "latency")}
    given = {key: value for key, value in times.items() if value is not None}
    return Costs(**given) if given else None


def build_schedule(
    config: Any, ranks: int, microbatches: int, forward: bool = False, costs: Costs | None = None
) -> Schedule:
    """The schedule of a step. A searched one may differ from call to call: only one rank may ask for it.

    costs: what a search is for; None: what the configuration gives, or the defaults of Costs. Raises ValueError if a searched
    one cannot respect its `max_live`.
    """
    name, search = config.schedule.name, config.search
    if name != "auto":
        return build(name, ranks, microbatches, chunks=config.schedule.chunks, forward=forward)
    placement = placement_of(config, ranks)
    if forward:
        return Schedule(name, placement, microbatches, forward_only(placement, microbatches), forward_only=True)
    costs = costs or given_costs(config) or Costs()
    return auto(ranks, microbatches, costs, search.max_live, (search.placement,), search.time_limit)


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
