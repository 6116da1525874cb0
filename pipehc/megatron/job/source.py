"""Where a job's schedule comes from: a family's name, a search, a Schedule or its file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from megatron.core import parallel_state

from pipehc.megatron.job.searched import Searched
from pipehc.schedules import FAMILIES, Placement, Schedule, build
from pipehc.schedules.families.forward import forward_only as forward_rows
from pipehc.schedules.placement import looped

SEARCH_OPTIONS = ("costs", "gpu", "placement", "max_live", "time_limit", "seed")
RUN_OPTIONS = (
    "recompute", "recompute_block", "overlap", "transport", "timeout_s", "trace_steps", "trace_folder", "watchdog_folder", "nvtx",
    "diagnostics_interval", "diagnostics_folder", "gain_bound",
)  # fmt: skip


NAMES = ("megatron", "auto", *FAMILIES)


class ScheduleSource(Protocol):
    """Gives the placement, which the model chunks follow, and a schedule for any number of micro-batches."""

    @property
    def name(self) -> str: ...

    def placement(self, ranks: int) -> Placement: ...

    def build(self, ranks: int, microbatches: int, forward_only: bool) -> Schedule: ...

    def check(self, ranks: int, microbatches: int) -> None:
        """Raises ValueError or ScheduleError where `build` would for training. Not collective."""

    def origin(self, microbatches: int) -> str:
        """Where the training schedule of so many micro-batches comes from, in words; empty if its name says it."""


def refuse_unknown_options(schedule: Any, given: Mapping[str, Any], run_options: Sequence[str] = RUN_OPTIONS) -> None:
    """ValueError for a schedule that is not known, or else the first option that is not, or has no effect with this schedule.

    run_options: what schedules of ours take beside those of the search.
    """
    if not isinstance(schedule, Schedule) and schedule not in NAMES and not str(schedule).endswith(".csv"):
        raise ValueError(f"schedule = {schedule!r}: must be {', '.join(NAMES)}, a Schedule or a CSV file of one")
    takes = [*run_options] if schedule != "megatron" else []
    if schedule == "auto":
        takes += SEARCH_OPTIONS
    for option in (option for option in given if option not in takes):
        problem = "unknown"
        if option in SEARCH_OPTIONS:
            problem = "only with schedule = 'auto'"
        elif option in run_options:
            problem = "only with a schedule of ours, Megatron's own runs as it is"
        name = f"a Schedule ({schedule.name})" if isinstance(schedule, Schedule) else repr(str(schedule))
        raise ValueError(f"{option} = {given[option]!r}: {problem}; schedule = {name} takes {', '.join(takes) or 'no options'}")


def source_of(schedule: str | Schedule, search: Mapping[str, Any]) -> ScheduleSource:
    """Raises ValueError for names, files and options of a search that are not known."""
    refuse_unknown_options(schedule, search, ())
    if schedule == "auto":
        return Searched(**search)
    if isinstance(schedule, Schedule):
        return Given(schedule)
    if schedule == "megatron":
        return Megatrons()
    if schedule in FAMILIES:
        return Family(schedule)
    if not Path(schedule).is_file():
        raise ValueError(f"schedule = {str(schedule)!r}: there is no such file")
    return Given(Schedule.from_csv(schedule))


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

    def check(self, ranks: int, microbatches: int) -> None:
        self.build(ranks, microbatches, False)

    def origin(self, microbatches: int) -> str:
        return ""


class Megatrons:
    """Megatron's own schedules: 1F1B, or interleaved with virtual stages."""

    name = "megatron"

    def placement(self, ranks: int) -> Placement:
        return looped(ranks, _virtual_stages() or 1)

    def build(self, ranks: int, microbatches: int, forward_only: bool) -> Schedule:
        raise AssertionError("Megatron runs its own schedule")

    def check(self, ranks: int, microbatches: int) -> None:
        pass

    def origin(self, microbatches: int) -> str:
        return ""


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

    def check(self, ranks: int, microbatches: int) -> None:
        self.build(ranks, microbatches, False)

    def origin(self, microbatches: int) -> str:
        return "as given"


def _virtual_stages() -> int | None:
    """Model chunks a rank that the job asks for."""
    size: int | None = parallel_state.get_virtual_pipeline_model_parallel_world_size()
    return size
