"""Lets Megatron build and run a stage as if it stood at another position of the pipeline.

Megatron's layouts know one rule: chunk v of pipeline rank p is stage v * P + p. Our placements put stages elsewhere. A chunk that
holds stage s is therefore built, fed and run as rank s mod P, chunk s // P, whichever rank it is on, and every layout option
of Megatron's (uneven first and last stages, layout strings) keeps its meaning.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state

from pipehc.schedules import Placement


class ActingGroup:
    """The pipeline group, seen from `position`. For asking rank and size; no communication may go through it."""

    def __init__(self, group: dist.ProcessGroup, position: int) -> None:
        self._group, self._position = group, position

    def rank(self) -> int:
        return self._position

    def size(self) -> int:
        return self._group.size()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._group, name)


def megatron_place(placement: Placement, stage: int) -> tuple[int, int | None]:
    """(pipeline rank, vp_stage) that Megatron's rule gives to a stage; vp_stage is None with one stage a rank and lane."""
    chunks = placement.stages // placement.ranks
    return stage % placement.ranks, stage // placement.ranks if chunks > 1 else None


def held_stages(placement: Placement, rank: int) -> list[tuple[int, int]]:
    """The (lane, stage) of each model chunk of `rank`, in the order of its model chunks: by stage.

    With two lanes the mirrored rank has the same stages in the same order, as what they reduce together must have.
    """
    return sorted(placement.held(rank), key=lambda held: held[1])


@contextmanager
def acting_at(position: int) -> Iterator[Any]:
    """Inside, this process is at `position` of its pipeline for all that asks Megatron; yields the pipeline group as seen then."""
    group = parallel_state.get_pipeline_model_parallel_group()
    if position == group.rank():
        yield group
        return
    acting = ActingGroup(group, position)
    before = parallel_state._MPU_PIPELINE_MODEL_PARALLEL_RANK
    parallel_state.set_pipeline_model_parallel_rank(position)
    try:
        with exchanged({group: acting}):
            yield acting
    finally:
        parallel_state.set_pipeline_model_parallel_rank(before)


@contextmanager
def acting_ranks_told() -> Iterator[None]:
    """Inside, torch.distributed.get_rank answers for an `ActingGroup`, too: HybridModel asks it and not the group."""
    original = dist.get_rank
    dist.get_rank = lambda group=None: group.rank() if isinstance(group, ActingGroup) else original(group)  # type: ignore[assignment]
    try:
        yield
    finally:
        dist.get_rank = original  # type: ignore[assignment]


@contextmanager
def exchanged(groups: Mapping[Any, Any]) -> Iterator[None]:
    """Inside, Megatron's parallel state answers with other groups: those on the right for those on the left."""
    state = vars(parallel_state)
    before = {name: value for name, value in state.items() if isinstance(value, dist.ProcessGroup) and value in groups}
    state.update((name, groups[value]) for name, value in before.items())
    try:
        yield
    finally:
        state.update(before)
