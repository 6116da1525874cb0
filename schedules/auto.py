"""Finds a schedule for given costs, links and memory, and says how far from the best possible it can be at most.

Every named schedule that fits is a starting point, so the result is never worse. A list scheduler with searched priorities does the
work (see `search/`), `bounds` gives the proof.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, wraps
from hashlib import sha256
from os import PathLike
from pathlib import Path
from time import monotonic

from pipehc.schedules.actions import parse
from pipehc.schedules.check import check
from pipehc.schedules.costs import Costs
from pipehc.schedules.families import FAMILIES, build
from pipehc.schedules.placement import Placement, bidirectional, linear, looped, vee
from pipehc.schedules.schedule import Schedule
from pipehc.schedules.search.dispatch import NEVER
from pipehc.schedules.search.problem import Problem, pose
from pipehc.schedules.search.race import Budget, Race
from pipehc.schedules.simulate import SimulationResult, simulate

SEARCHED: dict[str, Callable[[int], Placement]] = {"linear": linear, "v": vee, "bidirectional": bidirectional}
LOOPED_CHUNKS = (2, 4)  # of the interleaved schedules that `looped` stands for
PLACEMENTS = (*SEARCHED, "looped")
ALGORITHM = 1  # part of the cache key: raise it when results change
ATTEMPTS = 8
ACTIONS_PER_SECOND = 200_000  # that a slow machine places: the budget is counted in actions, the clock seldom ends it


@dataclass(frozen=True)
class AutoReport:
    """What `auto` found. Times in the unit of the costs.

    makespan: as simulated. lower_bound: no schedule of the allowed placements within the cap is faster. named, named_makespan:
    the best named schedule that fits, None and inf if there is none. cut_short: the clock stopped the search, so another run may
    differ.
    """

    schedule: Schedule
    makespan: float
    lower_bound: float
    named: str | None
    named_makespan: float
    cut_short: bool

    @property
    def gap(self) -> float:
        """Largest possible gain over `makespan`, as a fraction of the lower bound."""
        return max(0.0, self.makespan / self.lower_bound - 1)

    @property
    def optimal(self) -> bool:
        """Proven to be the best."""
        return self.gap < 1e-9


def auto_report(
    ranks: int,
    microbatches: int,
    costs: Costs,
    max_live: float | None = None,
    placements: Sequence[str] = tuple(SEARCHED),
    time_limit: float = 10.0,
    seed: int = 0,
    cache: str | PathLike[str] | None = None,
) -> AutoReport:
    """Searches for the fastest schedule within the cap.

    max_live: activations of 1/P of the model that a rank may hold, from the start of F to the end of W; None: no limit.
    placements: those allowed, of linear, v, bidirectional and looped. Looped stands for the named interleaved schedules with 2
        and 4 chunks: they are compared, not searched. time_limit: seconds, after which the best so far is returned; the named
        schedules are looked at in any case.
    seed: the same seed gives the same schedule, unless the clock stops the search (see AutoReport.cut_short).
    costs: those of every stage (`Costs.table`) are for placements of as many stages.
    cache: folder that keeps results by content; in memory they are kept in any case.
    Raises ValueError, naming key and value, for what is not allowed, and if no schedule can respect the cap.
    """
    if ranks < 1 or microbatches < 1:
        raise ValueError(f"ranks = {ranks}, microbatches = {microbatches}: must be at least 1")
    if not time_limit > 0:  # nan is not, either
        raise ValueError(f"time_limit = {time_limit}: must be more than 0 seconds")
    if max_live is not None and max_live <= 0:
        raise ValueError(f"max_live = {max_live}: must be more than 0")
    for name in placements:
        if name not in PLACEMENTS:
            raise ValueError(f"placements: {name!r} must be one of {', '.join(PLACEMENTS)}")
    if not placements:
        raise ValueError(f"placements: needs at least one of {', '.join(PLACEMENTS)}")
    if costs.stages is not None:
        fitting = [name for name in PLACEMENTS if any(p.stages == costs.stages for p in _meant(name, ranks))]
        if refused := [name for name in placements if name not in fitting]:
            stages = " or ".join(str(p.stages) for p in _meant(refused[0], ranks))
            allowed = f"placements may be {', '.join(fitting)}" if fitting else "no placement here has them"
            raise ValueError(f"costs.table is for {costs.stages} stages: {refused[0]} on {ranks} ranks has {stages}; {allowed}")
    wanted = tuple(name for name in PLACEMENTS if name in placements)
    problem = (ranks, microbatches, costs, max_live, wanted, float(time_limit), seed)
    if cache is None:
        return _search(*problem)
    path = Path(cache) / f"auto-{sha256(repr((ALGORITHM, problem)).encode()).hexdigest()[:20]}.json"
    if path.exists():
        return _load(path)
    report = _search(*problem)
    _save(report, path)
    return report


def _schedule_of[**P](report: Callable[P, AutoReport]) -> Callable[P, Schedule]:
    @wraps(report, assigned=())
    def auto(*args: P.args, **options: P.kwargs) -> Schedule:
        """The schedule of `auto_report`, which has the same arguments and is free after this."""
        return report(*args, **options).schedule

    return auto


auto = _schedule_of(auto_report)


@lru_cache(maxsize=64)
def _search(
    ranks: int,
    microbatches: int,
    costs: Costs,
    max_live: float | None,
    placements: tuple[str, ...],
    time_limit: float,
    seed: int,
) -> AutoReport:
    deadline = monotonic() + 0.95 * time_limit  # what is left is for the last checks
    open_problems = _posed([SEARCHED[name](ranks) for name in placements if name in SEARCHED], microbatches, costs, max_live)
    named_only = _meant("looped", ranks) if "looped" in placements else []
    if costs.stages is not None:
        named_only = [placement for placement in named_only if placement.stages == costs.stages]
    problems = open_problems + _posed(named_only, microbatches, costs, max_live)
    examples = _named(problems, costs)
    if not open_problems and not examples:
        raise ValueError(
            f"max_live = {max_live}, microbatches = {microbatches}: no schedule on {ranks} ranks of placement "
            f"{' or '.join(placements)}; two lanes need an even number of micro-batches and 2 live activations, v needs 1"
        )
    bound = min(problem.bound for problem in problems)
    found = [(result.makespan, schedule) for schedule, result in examples]
    named, named_makespan = (found[0][1].name, found[0][0]) if found else (None, float("inf"))
    budget = Budget(time_limit * ACTIONS_PER_SECOND, deadline)
    # The list scheduler has every receive posted in time, a program only some ahead, and the program is what counts. So it may take
    # another race, with other dice, to find what is as good as a program.
    for attempt in range(ATTEMPTS):
        if not open_problems or (found and (found[0][0] <= bound * (1 + 1e-9) or budget.over(NEVER))):
            break
        race = Race(open_problems, budget, seed + attempt * 1_000_003)
        searched = [problem.placement for problem in open_problems]
        race.run([(schedule, result.spans) for schedule, result in examples if schedule.placement in searched])
        for candidate in race.best:
            if found and found[0][0] <= candidate.makespan * (1 + 1e-9):
                break
            schedule = candidate.problem.schedule(candidate.rows, "auto")
            found.append((simulate(schedule, costs).makespan, schedule))
            found.sort(key=lambda x: x[0])
            budget.spend(0)
            if budget.cut_short:
                break
    makespan, schedule = found[0]
    assert max_live is None or max(check(schedule).peak_live) <= max_live + 1e-9
    return AutoReport(replace(schedule, name="auto"), makespan, bound, named, named_makespan, budget.cut_short)


def _meant(name: str, ranks: int) -> list[Placement]:
    """The placements that a name stands for."""
    return [looped(ranks, chunks) for chunks in LOOPED_CHUNKS] if name == "looped" else [SEARCHED[name](ranks)]


def _posed(placements: Sequence[Placement], microbatches: int, costs: Costs, max_live: float | None) -> list[Problem]:
    """The problems that have a schedule within the cap, the one with the lowest bound first."""
    problems = [pose(placement, microbatches, costs, max_live) for placement in placements]
    return sorted((p for p in problems if p is not None), key=lambda p: p.bound)


def _named(problems: Sequence[Problem], costs: Costs) -> list[tuple[Schedule, SimulationResult]]:
    """The named schedules of these problems that respect the cap, and what they cost, the fastest first."""
    found: list[tuple[Schedule, SimulationResult]] = []
    if not problems:
        return found
    ranks, microbatches, max_live = problems[0].placement.ranks, problems[0].microbatches, problems[0].max_live
    for name, chunks in [*((name, None) for name in FAMILIES), *(("interleaved", chunks) for chunks in LOOPED_CHUNKS)]:
        try:
            schedule = build(name, ranks, microbatches, chunks=chunks)
        except ValueError:
            continue  # the family has no schedule for these numbers
        if any(schedule.placement == problem.placement for problem in problems):
            result = simulate(schedule, costs)
            if max_live is None or max(result.peak_live) <= max_live + 1e-9:
                found.append((schedule, result))
    return sorted(found, key=lambda x: x[1].makespan)


def _save(report: AutoReport, path: Path) -> None:
    schedule = report.schedule
    content = {
        "makespan": report.makespan,
        "lower_bound": report.lower_bound,
        "named": report.named,
        "named_makespan": None if report.named is None else report.named_makespan,
        "cut_short": report.cut_short,
        "placement": {"kind": schedule.placement.kind, "table": schedule.placement.table},
        "microbatches": schedule.microbatches,
        "rows": [" ".join(map(str, row)) for row in schedule.rows],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
    temporary.replace(path)  # a reader never sees half a file


def _load(path: Path) -> AutoReport:
    content = json.loads(path.read_text(encoding="utf-8"))
    placement = Placement(tuple(map(tuple, content["placement"]["table"])), content["placement"]["kind"])
    rows = tuple(tuple(parse(cell) for cell in row.split()) for row in content["rows"])
    schedule = Schedule("auto", placement, content["microbatches"], rows)
    check(schedule)
    named_makespan = float("inf") if content["named"] is None else content["named_makespan"]
    return AutoReport(schedule, content["makespan"], content["lower_bound"], content["named"], named_makespan, content["cut_short"])
