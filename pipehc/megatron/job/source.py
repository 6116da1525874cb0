"""Where a job's schedule comes from: a family's name, a search, a Schedule or its file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist
from megatron.core import parallel_state

from pipehc.schedules import FAMILIES, Costs, Placement, Schedule, ScheduleError, auto, build
from pipehc.schedules.auto import SEARCHED
from pipehc.schedules.families.forward import forward_only as forward_rows
from pipehc.schedules.placement import looped

SEARCH_OPTIONS = ("costs", "placement", "max_live", "time_limit", "seed")


class ScheduleSource(Protocol):
    """Gives the placement, which the model chunks follow, and a schedule for any number of micro-batches."""

    @property
    def name(self) -> str: ...

    def placement(self, ranks: int) -> Placement: ...

    def build(self, ranks: int, microbatches: int, forward_only: bool) -> Schedule: ...


def source_of(schedule: str | Schedule, search: Mapping[str, Any]) -> ScheduleSource:
    """Raises ValueError for names, files and options that are not known."""
    unknown = sorted(set(search) - set(SEARCH_OPTIONS))
    if unknown:
        raise ValueError(f"{unknown[0]} = {search[unknown[0]]!r}: unknown; schedule = 'auto' takes {', '.join(SEARCH_OPTIONS)}")
    if schedule == "auto":
        return Searched(**search)
    if search:
        option = next(iter(search))
        raise ValueError(f"{option} = {search[option]!r}: only with schedule = 'auto'")
    if isinstance(schedule, Schedule):
        return Given(schedule)
    if schedule == "megatron":
        return Megatrons()
    if schedule in FAMILIES:
        return Family(schedule)
    if str(schedule).endswith(".csv"):
        if not Path(schedule).is_file():
            raise ValueError(f"schedule = {schedule!r}: there is no such file")
        return Given(Schedule.from_csv(schedule))
    raise ValueError(f"schedule = {schedule!r}: must be megatron, auto, {', '.join(FAMILIES)}, a Schedule or a CSV file of one")


class Family:
    """A named family."""

    def __init__(self, name: str) -> None:
        self.name = name

    def placement(self, ranks: int) -> Placement:
        family = FAMILIES[self.name]
        chunks = () if family.chunks is None else (_virtual_stages() or family.chunks,)
        return family.placement(ranks, *chunks)

    def build(self, ranks: int, microbatches: int, forward_only: bool) -> Schedule:
        chunks = None if FAMILIES[self.name].chunks is None else _virtual_stages()
        return build(self.name, ranks, microbatches, chunks=chunks, forward=forward_only)


class Megatrons:
    """Megatron's own schedules: 1F1B, or interleaved with virtual stages."""

    name = "megatron"

    def placement(self, ranks: int) -> Placement:
        return looped(ranks, _virtual_stages() or 1)

    def build(self, ranks: int, microbatches: int, forward_only: bool) -> Schedule:
        raise AssertionError("Megatron runs its own schedule")


class Given:
    """A schedule from somewhere else: fixed ranks and, in training, micro-batches."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self.name = schedule.name

    def placement(self, ranks: int) -> Placement:
        if ranks != self._schedule.ranks:
            raise ValueError(f"schedule {self.name}: is for {self._schedule.ranks} pipeline ranks, the job has {ranks}")
        return self._schedule.placement

    def build(self, ranks: int, microbatches: int, forward_only: bool) -> Schedule:
        placement = self.placement(ranks)
        if forward_only:
            return Schedule(self.name, placement, microbatches, forward_rows(placement, microbatches), forward_only=True)
        if microbatches != self._schedule.microbatches:
            raise ValueError(
                f"schedule {self.name}: is for {self._schedule.microbatches} micro-batches, the job runs {microbatches} a step"
            )
        return self._schedule


class Searched:
    """`auto` over one placement; rank 0 searches, since the clock may end it, and the others take what it found."""

    name = "auto"

    def __init__(
        self,
        costs: Costs | None = None,
        placement: str = "linear",
        max_live: float | None = None,
        time_limit: float = 10.0,
        seed: int = 0,
    ) -> None:
        if placement not in SEARCHED:
            raise ValueError(f"placement = {placement!r}: must be one of {', '.join(SEARCHED)}")
        self._costs, self._placement = costs or Costs(), placement
        self._options: dict[str, Any] = {"max_live": max_live, "time_limit": time_limit, "seed": seed}
        self._found: dict[int, Schedule] = {}

    def placement(self, ranks: int) -> Placement:
        return SEARCHED[self._placement](ranks)

    def build(self, ranks: int, microbatches: int, forward_only: bool) -> Schedule:
        if forward_only:
            return Given(self.build(ranks, microbatches, False)).build(ranks, microbatches, True)
        if microbatches not in self._found:
            found: list[Any] = [None]
            if dist.get_rank() == 0:
                try:
                    found = [auto(ranks, microbatches, self._costs, placements=(self._placement,), **self._options)]
                except (ValueError, ScheduleError) as error:
                    found = [str(error)]
            dist.broadcast_object_list(found, src=0)
            if isinstance(found[0], str):
                raise ValueError(f"schedule = 'auto': {found[0]}")
            self._found[microbatches] = found[0]
        return self._found[microbatches]


def _virtual_stages() -> int | None:
    """Model chunks a rank that the job asks for."""
    size: int | None = parallel_state.get_virtual_pipeline_model_parallel_world_size()
    return size
