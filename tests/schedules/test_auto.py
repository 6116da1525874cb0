"""The search: the figures it must reach, the best of all small schedules, and what it promises for any problem."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path
from random import Random
from time import process_time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_simulate import all_schedules, oracle, runs

import pipehc.schedules.search.race
from pipehc.schedules import FAMILIES, Costs, Pair, auto, auto_report, build, check, compile, simulate
from pipehc.schedules.auto import SEARCHED, _search
from pipehc.schedules.placement import linear
from pipehc.schedules.search.dispatch import NEVER, dispatch
from pipehc.schedules.search.patterns import live, steady_state
from pipehc.schedules.search.problem import Problem, pose
from pipehc.schedules.search.race import Budget, Race
from pipehc.schedules.search.rules import change, imitate, plain, priorities, retrace, steady


@pytest.mark.parametrize(
    ("ranks", "microbatches", "unit", "link", "cap", "most"),
    [
        (8, 20, 40, 0, 9, 2520),
        (4, 16, 60, 15, 5, 2985),
        (4, 16, 60, 15, 6, 2956),
        (4, 16, 60, 30.7, 5, 3063),
        (4, 16, 60, 30.7, 6, 2973),
    ],
)
def test_figures_of_the_issue(
    monkeypatch: pytest.MonkeyPatch, ranks: int, microbatches: int, unit: float, link: float, cap: int, most: float
) -> None:
    for module in (pipehc.schedules.search.race, sys.modules["pipehc.schedules.auto"]):
        monkeypatch.setattr(module, "monotonic", process_time)  # others may be at work on the machine
    report = auto_report(ranks, microbatches, Costs(unit, unit, unit, link=link), max_live=cap, time_limit=2)
    assert simulate(compile(report.schedule), Costs(unit, unit, unit, link=link)).makespan <= most
    assert max(check(report.schedule).peak_live) <= cap
    if cap != 5:
        assert report.lower_bound >= most - 3
    if link == 0:
        assert report.optimal and report.lower_bound == 2520 and report.schedule.placement.kind == "bidirectional"


@pytest.mark.parametrize("kind", ["linear", "bidirectional"])
@pytest.mark.parametrize("seed", range(3))
def test_best_of_all_small_schedules(kind: str, seed: int) -> None:
    random = Random(seed)
    costs = Costs(*(random.uniform(0.2, 3) for _ in range(3)), link=random.uniform(0, 2))
    placement = SEARCHED[kind](2)
    best: dict[int, float] = {}
    for schedule in all_schedules(placement, 2):
        if runs(schedule):
            cap = int(max(check(schedule).peak_live))
            best[cap] = min(best.get(cap, NEVER), oracle(schedule, costs))
    for cap in sorted(best):
        problem = pose(placement, 2, costs, cap)
        if problem is None:  # two lanes with a single slot
            continue
        race = Race([problem], Budget(20_000, NEVER), seed)
        race.run([])
        optimum = min(makespan for peak, makespan in best.items() if peak <= cap)
        assert race.best[0].makespan == pytest.approx(optimum)


numbers = st.floats(0.2, 4.0)


@st.composite
def problems(draw: st.DrawFn) -> tuple[int, int, Costs, float | None, tuple[str, ...]]:
    ranks, microbatches = draw(st.integers(1, 5)), draw(st.integers(1, 12))
    f, b, w = draw(numbers), draw(numbers), draw(numbers)
    costs = Costs(
        f,
        b,
        w,
        pair=draw(st.sampled_from([None, 0.7 * (f + b + w), 1.1 * (f + b + w)])),
        link=draw(st.sampled_from([0.0, 0.5, 2.0])),
        latency=draw(st.sampled_from([0.0, 0.3])),
        weights=draw(st.sampled_from([None, tuple(1 + 0.3 * (i % 3) for i in range(ranks))])),
        microbatch_weights=draw(st.sampled_from([None, tuple(1 + 0.2 * (i % 4) for i in range(microbatches))])),
    )
    cap = draw(st.sampled_from([None, 1, 2, ranks, ranks + 1.5]))
    kinds = draw(st.lists(st.sampled_from(sorted(SEARCHED)), min_size=1, max_size=3, unique=True))
    return ranks, microbatches, costs, cap, tuple(kinds)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(problems(), st.integers(0, 10))
def test_promises(problem: tuple[int, int, Costs, float | None, tuple[str, ...]], seed: int) -> None:
    """It runs, within the cap, as fast as said, between the bound and the best named schedule."""
    ranks, microbatches, costs, cap, kinds = problem
    try:
        report = auto_report(ranks, microbatches, costs, cap, kinds, time_limit=0.05, seed=seed)
    except ValueError as error:
        assert "max_live" in str(error)
        assert all(pose(SEARCHED[kind](ranks), microbatches, costs, cap) is None for kind in kinds)
        return
    facts = check(report.schedule)
    assert cap is None or max(facts.peak_live) <= cap
    assert report.schedule.placement in [SEARCHED[kind](ranks) for kind in kinds]
    assert simulate(report.schedule, costs).makespan == report.makespan
    assert report.lower_bound <= report.makespan * (1 + 1e-9)
    for name in FAMILIES:
        try:
            named = build(name, ranks, microbatches)
        except ValueError:
            continue
        fits = cap is None or max(check(named).peak_live) <= cap
        if fits and named.placement in [SEARCHED[kind](ranks) for kind in kinds]:
            assert report.makespan <= simulate(named, costs).makespan * (1 + 1e-9)


def some_problems() -> list[Problem]:
    posed = [
        pose(SEARCHED["bidirectional"](4), 8, Costs(2, 3, 1, link=1.3, latency=0.2), 5),
        pose(SEARCHED["bidirectional"](4), 8, Costs(2, 3, 1, pair=5, link=0.5, weights=(1, 2, 1, 1.5)), None),
        pose(SEARCHED["bidirectional"](3), 8, Costs(2, 3, 1, link=0.7), 4),
        pose(SEARCHED["bidirectional"](4), 8, Costs(weights=((1, 1, 1, 2), (1, 1, 1, 1))), 5),
        pose(SEARCHED["v"](4), 8, Costs(2, 3, 1, pair=7, link=0.7), 4.5),
        pose(SEARCHED["v"](3), 5, Costs(2, 2, 2, microbatch_weights=(1, 2, 3, 1, 1)), None),
        pose(SEARCHED["linear"](5), 7, Costs(2, 3, 1, link=4, latency=1), 3),
    ]
    return [problem for problem in posed if problem is not None]


@pytest.mark.parametrize("number", range(7))
def test_list_scheduler_agrees_with_simulation(number: int) -> None:
    """For any rules: what it thinks a schedule takes is what its program takes, with receives posted in time."""
    problem, random = some_problems()[number], Random(number)
    paired = finished = 0
    for _ in range(30):
        rules = steady(problem, random) if random.random() < 0.5 else priorities(problem, random)
        if rules is None:
            continue
        if random.random() < 0.5:
            rules = change(problem, rules, random)
        makespan, rows, placed = dispatch(problem, rules)
        if makespan == NEVER:
            continue
        finished += 1
        assert placed == problem.actions
        schedule = problem.schedule(rows, "x")
        facts = check(schedule)
        assert problem.max_live is None or max(facts.peak_live) <= problem.max_live
        simulated = simulate(compile(schedule, ahead=1000), problem.costs).makespan
        if rules.pairs:  # a pair may start with its forward before its backward is ready: the program does
            assert simulated <= makespan * (1 + 1e-9)
        else:
            assert simulated == pytest.approx(makespan, rel=1e-12)
        assert problem.bound <= makespan * (1 + 1e-9)
        paired += any(isinstance(cell, Pair) for row in schedule.rows for cell in row)
        # A run that cannot end in time is given up, one that can is not.
        assert dispatch(problem, rules, makespan * (1 + 1e-9))[0] == makespan
        assert dispatch(problem, rules, makespan * (1 - 1e-6))[0] == NEVER
        assert dispatch(problem, retrace(problem, rules, rows))[0] < NEVER
    assert finished >= 5
    assert (paired > 0) == (problem.costs.pair_scale < 1)


@pytest.mark.parametrize("number", range(7))
def test_plain_rules_always_end(number: int) -> None:
    """Whatever the cap, down to the least that is allowed."""
    whole = some_problems()[number]
    problem: Problem | None = whole
    cap = float(whole.microbatches)
    while problem is not None:
        makespan, rows, _ = dispatch(problem, plain(problem))
        assert makespan < NEVER
        assert max(check(problem.schedule(rows, "x")).peak_live) <= cap
        cap -= 0.5
        problem = pose(whole.placement, whole.microbatches, whole.costs, cap)
    assert cap < 2


def test_bidirectional_is_searched_by_halves() -> None:
    whole, lopsided = some_problems()[0], some_problems()[3]
    assert whole.mirrored and whole.ranks == 2 and whole.actions == 3 * 4 * 4
    assert not lopsided.mirrored and lopsided.ranks == 4
    rules = priorities(whole, Random(0))
    schedule = whole.schedule(dispatch(whole, rules)[1], "x")
    for rank in range(2):
        mirror = [str(a).split("@")[0].split("F")[0] for a in schedule.rows[3 - rank]]
        assert [str(a).split("@")[0].split("F")[0] for a in schedule.rows[rank]][:1] == mirror[:1]
        assert len(schedule.rows[rank]) == len(schedule.rows[3 - rank])


@pytest.mark.parametrize("name", ["1f1b", "zb_h1", "zbv", "dualpipe", "dualpipev"])
def test_named_schedules_are_imitated(name: str) -> None:
    schedule, costs = build(name, 4, 12), Costs(2, 3, 1.5, link=0.25)
    result = simulate(compile(schedule, ahead=1000), costs)
    problem = pose(schedule.placement, 12, costs, max(result.peak_live))
    assert problem is not None
    makespans = [dispatch(problem, rules)[0] for rules in imitate(problem, schedule, result.spans)]
    assert makespans[0] <= result.makespan * (1 + 1e-9)
    assert all(makespan >= problem.bound - 1e-9 for makespan in makespans)


def test_steady_state_overlaps_nothing() -> None:
    problem = pose(SEARCHED["v"](4), 16, Costs(2, 3, 1, link=0.7), 6)
    assert problem is not None
    random, found = Random(0), 0
    for _ in range(40):
        interval = problem.work[0] / problem.count * 1.1
        offsets = steady_state(problem, interval, random, random.random(), 0.1)
        if offsets is None:
            continue
        found += 1
        for own in problem.chunks:
            pieces = sorted((offsets[k][c] % interval, problem.time[k][c][0]) for c in own for k in range(3))
            pieces.append((pieces[0][0] + interval, 0.0))
            assert all(a + length <= b + 1e-6 for (a, length), (b, _) in pairwise(pieces))
        for c, target in enumerate(problem.forward_to):
            if target >= 0:
                hop = 0.7 if problem.forward_link[c] >= 0 else 0.0
                assert offsets[0][c] + problem.time[0][c][0] + hop <= offsets[0][target] + 1e-9
        assert 1 <= live(problem, interval, offsets) <= 16 * 2
    assert found > 5


def test_same_seed_same_schedule() -> None:
    problem = pose(SEARCHED["bidirectional"](4), 12, Costs(2, 3, 1.5, link=1), 4)
    assert problem is not None
    rows = []
    for seed in (0, 0, 1):
        race = Race([problem], Budget(30_000, NEVER), seed)
        race.run([])
        assert not race.budget.cut_short
        rows.append((race.best[0].makespan, problem.schedule(race.best[0].rows, "x").rows, race.number))
    assert rows[0] == rows[1]
    assert rows[0] != rows[2]


def test_more_time_is_never_worse_and_the_clock_stops_it() -> None:
    problem = pose(SEARCHED["bidirectional"](6), 24, Costs(2, 3, 1.5, link=1), 6)
    assert problem is not None
    makespans = []
    for actions in (5_000, 100_000):
        race = Race([problem], Budget(actions, NEVER), 0)
        race.run([])
        makespans.append(race.best[0].makespan)
    assert makespans[1] <= makespans[0]
    race = Race([problem], Budget(1e12, 0.0), 0)
    race.run([])
    assert race.budget.cut_short


def test_cache_keeps_results_by_content(tmp_path: Path) -> None:
    costs = Costs(2, 3, 1.5, link=1, pair=6)
    first = auto_report(4, 8, costs, 5, time_limit=0.2, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    _search.cache_clear()
    again = auto_report(4, 8, costs, 5, time_limit=0.2, cache=tmp_path)
    assert again == first
    assert _search.cache_info().misses == 0
    assert auto(4, 8, costs, 5, time_limit=0.2, cache=tmp_path) == first.schedule
    auto_report(4, 8, costs, 6, time_limit=0.2, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ranks": 0}, "ranks = 0"),
        ({"placements": ("ring",)}, "'ring' must be one of linear, v, bidirectional"),
        ({"placements": ()}, "at least one"),
        ({"max_live": 0.5}, "max_live = 0.5"),
        ({"max_live": -1}, "max_live = -1"),
        ({"time_limit": 0}, "time_limit = 0"),
        ({"placements": ("bidirectional",), "microbatches": 7}, "even number of micro-batches"),
    ],
)
def test_refuses(arguments: dict, message: str) -> None:
    defaults = {"ranks": 4, "microbatches": 8, "costs": Costs()}
    with pytest.raises(ValueError, match=message):
        auto(**{**defaults, **arguments})


def test_one_rank() -> None:
    report = auto_report(1, 3, Costs(2, 3, 1), max_live=1, placements=("linear",))
    assert report.optimal and report.makespan == 18 and report.schedule.placement == linear(1)


def test_looped_stands_for_the_named_interleaved_schedules():
    """Four chunks a rank win where stages are many, links free and micro-batches few; the bound covers them too."""
    costs = Costs(10, 20, 5)
    report = auto_report(8, 16, costs, placements=("looped",))
    best = min(simulate(build("interleaved", 8, 16, chunks=chunks), costs).makespan for chunks in (2, 4))
    assert report.makespan == best and report.schedule.placement.kind == "looped"
    assert report.lower_bound <= best + 1e-9
    linear = auto_report(8, 16, costs, placements=("linear",), time_limit=1)
    both = auto_report(8, 16, costs, placements=("linear", "looped"), time_limit=1)
    assert both.makespan <= min(linear.makespan, best) + 1e-9
