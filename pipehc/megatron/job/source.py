"""Where a job's schedule comes from: a family's name, a search, a Schedule or its file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist
from megatron.core import parallel_state

from pipehc.megatron.job.option_values import is_positive, is_whole, refuse_unless
from pipehc.schedules import FAMILIES, Costs, Placement, Schedule, build
from pipehc.schedules.auto import SEARCHED, AutoReport, auto_report
from pipehc.schedules.families.forward import forward_only as forward_rows
from pipehc.schedules.placement import looped

SEARCH_OPTIONS = ("costs", "placement", "max_live", "time_limit", "seed")
RUN_OPTIONS = (
    "recompute", "recompute_block", "overlap", "timeout_s", "trace_steps", "trace_folder", "watchdog_folder", "nvtx",
)  # fmt: skip


NAMES = ("megatron", "auto", *FAMILIES)


class ScheduleSource(Protocol):
    """Gives the placement, which the model chunks follow, and a schedule for any number of micro-batches."""

    @property
    def name(self) -> str: ...

    def placement(self, ranks: int) -> Placement: ...

    def build(self, ranks: int, microbatches: int, forward_only: bool) -> Schedule: ...

    def origin(self, microbatches: int) -> str:
        """Where the training schedule of so many micro-batches, built before, comes from, in words; empty if its name says it."""


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

    def origin(self, microbatches: int) -> str:
        return ""


class Megatrons:
    """Megatron's own schedules: 1F1B, or interleaved with virtual stages."""

    name = "megatron"

    def placement(self, ranks: int) -> Placement:
        return looped(ranks, _virtual_stages() or 1)

    def build(self, ranks: int, microbatches: int, forward_only: bool) -> Schedule:
        raise AssertionError("Megatron runs its own schedule")

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

    def origin(self, microbatches: int) -> str:
        return "as given"


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
        refuse_unless(costs is None or isinstance(costs, Costs), "costs", costs, "a Costs of pipehc.schedules, or None")
        known = isinstance(placement, str) and placement in SEARCHED
        refuse_unless(known, "placement", placement, f"one of {', '.join(SEARCHED)}")
        refuse_unless(max_live is None or is_positive(max_live), "max_live", max_live, "a number above 0, or None")
        refuse_unless(is_positive(time_limit), "time_limit", time_limit, "a number of seconds above 0")
        refuse_unless(is_whole(seed, 0), "seed", seed, "a whole number from 0 on")
        self._costs, self._placement, self._default_costs = costs or Costs(), placement, costs is None
        self._options: dict[str, Any] = {"max_live": max_live, "time_limit": time_limit, "seed": seed}
        self._found: dict[int, Schedule] = {}
        self._reports: dict[int, AutoReport] = {}  # on rank 0

    def placement(self, ranks: int) -> Placement:
        return SEARCHED[self._placement](ranks)

    def build(self, ranks: int, microbatches: int, forward_only: bool) -> Schedule:
        if forward_only:
            return Given(self.build(ranks, microbatches, False)).build(ranks, microbatches, True)
        if microbatches not in self._found:
            found: list[Any] = [None]
            if dist.get_rank() == 0:
                try:
                    report = auto_report(ranks, microbatches, self._costs, placements=(self._placement,), **self._options)
                    found, self._reports[microbatches] = [report.schedule], report
                except Exception as error:  # whatever it is: the other ranks wait for an answer
                    found = [str(error) if isinstance(error, ValueError) else repr(error)]
            dist.broadcast_object_list(found, src=0)
            if isinstance(found[0], str):
                raise ValueError(f"schedule = 'auto': {found[0]}")
            self._found[microbatches] = found[0]
        return self._found[microbatches]

    def origin(self, microbatches: int) -> str:
        """On rank 0."""
        report, costs = self._reports[microbatches], self._costs
        given = ", ".join(
            f"{f.name} = {_short(getattr(costs, f.name))}"
            for f in fields(costs)
            if f.name in ("f", "b", "w") or getattr(costs, f.name) != f.default
        )
        source = "the default costs (costs=Costs(...) gives others)" if self._default_costs else "costs"
        bound = "proven the best" if report.optimal else f"at most {report.gap:.1%} from the best possible"
        named = "no named schedule fits"
        if report.named is not None:
            named = f"{report.named_makespan / report.makespan - 1:.1%} faster than {report.named}"
        if report.schedule.name == report.named:
            named = f"it is {report.named}"
        return f"searched over the {self._placement} placement from {source} {given}: {named}, {bound}"


def _short(value: Any) -> str:
    """Four digits of a number, or of each in nested tuples."""
    return f"({', '.join(map(_short, value))})" if isinstance(value, tuple) else f"{value:.4g}"


def _virtual_stages() -> int | None:
    """Model chunks a rank that the job asks for."""
    size: int | None = parallel_state.get_virtual_pipeline_model_parallel_world_size()
    return size
