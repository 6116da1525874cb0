"""Random schedules, costs and mutations: what is valid passes everything, what is broken is refused for the right reason."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipehc.schedules import FAMILIES, Costs, Schedule, ScheduleError, Span, build, check, compile, simulate, verify
from pipehc.schedules.actions import Action, Cell, Pair, actions_of, flatten, parse

RELAXED = settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def schedules(draw: st.DrawFn, most: int = 5) -> Schedule:
    name = draw(st.sampled_from(list(FAMILIES)))
    ranks = draw(st.integers(1, most))
    microbatches = draw(st.integers(1, 3 * most))
    chunks = draw(st.integers(1, 3)) if name == "interleaved" else None
    forward = draw(st.integers(0, 4)) == 0
    if name == "dualpipe":
        ranks += ranks % 2
        microbatches = 2 * max(ranks, microbatches // 2)
    if name == "dualpipev":
        microbatches = max(2 * ranks, microbatches)
    return build(name, ranks, microbatches, chunks=chunks, forward=forward)


times = st.floats(0.1, 10)
costs = st.builds(
    Costs,
    f=times,
    b=times,
    w=times,
    r=st.floats(0, 2),
    pair=st.none() | times,
    pair_leave=st.none() | st.tuples(st.floats(0, 1), st.floats(0, 1)).map(lambda x: (min(x), max(x))),
    link=st.floats(0, 5),
    latency=st.floats(0, 3),
    weights=st.none() | st.lists(st.floats(0.5, 2), min_size=1, max_size=6).map(tuple),
)
options = st.fixed_dictionaries(
    {"ahead": st.integers(1, 4), "split_backward": st.booleans(), "recompute": st.booleans(), "high": st.booleans()}
)


def needs(action: Action, stages: int) -> list[tuple[str, int]]:
    """What must be done before, as (kind, stage) with I for any backward: written down once more, on purpose."""
    kind, stage = action[:2]
    if kind == "F":
        return [("F", stage - 1)] if stage else []
    if kind == "W":
        return [("I", stage)]
    if kind == "R":
        return [("F", stage)]
    return [("F", stage)] + ([("I", stage + 1)] if stage + 1 < stages else [])


@RELAXED
@given(schedules(), costs, options)
def test_valid_schedules_check_compile_verify_and_simulate(schedule: Schedule, costs: Costs, options: dict) -> None:
    facts = check(schedule)
    program = compile(schedule, **options)
    verify(program)
    result = simulate(program, costs)

    placement = schedule.placement
    compute = [span for span in result.spans if span.queue in ("compute", "high") and span.kind]
    done: dict[tuple, float] = {}
    for span in compute:
        for kind in {"B": "IW"}.get(span.kind, span.kind):
            key = (kind, span.stage, span.microbatch, span.lane)
            done[key] = max(done.get(key, 0.0), span.end)
    kinds = "F" if schedule.forward_only else "FIW"
    assert {key for key in done if key[0] != "R"} == {
        (kind, stage, m, lane)
        for lane in range(placement.lanes)
        for stage in range(placement.stages)
        for m in schedule.lane_microbatches(lane)
        for kind in kinds
    }
    if not options["high"]:
        for rank in range(schedule.ranks):
            _check_one_at_a_time([span for span in compute if span.rank == rank])
        for span in compute:
            action = Action(span.kind, span.stage, span.microbatch, span.lane)  # type: ignore[arg-type]
            for kind, stage in needs(action, placement.stages):
                away = placement.rank(span.lane, stage) != span.rank
                ready = done[kind, stage, span.microbatch, span.lane] + (costs.link + costs.latency if away else 0)
                assert span.start >= ready - 1e-6, (span, kind, stage)
    assert result.makespan >= result.lower_bound - 1e-6
    assert result.makespan == pytest.approx(max(span.end for span in compute))
    assert result.peak_live == pytest.approx(facts.peak_live)


def _check_one_at_a_time(spans: list[Span]) -> None:
    spans = sorted((span for span in spans if span.end > span.start), key=lambda span: span.start)
    for one, two in pairwise(spans):
        assert one.end <= two.start + 1e-6


@RELAXED
@given(schedules())
def test_text_forms_come_back(schedule: Schedule) -> None:
    for row in schedule.rows:
        assert tuple(parse(str(cell)) for cell in row) == row


# ---- mutations, judged by an oracle of its own ----


def judge(schedule: Schedule) -> set[str]:
    """All that is wrong with a mutated schedule: missing, twice, order, deadlock. Empty if it is valid."""
    placement, wrong = schedule.placement, set()
    there = Counter(a for row in schedule.rows for a in flatten(row))
    if any(count > 1 for count in there.values()):
        wrong.add("twice")
    for lane in range(placement.lanes):
        for stage in range(placement.stages):
            for m in schedule.lane_microbatches(lane):
                found = "".join(kind for kind in "FBIW" if there[Action(kind, stage, m, lane)])  # type: ignore[arg-type]
                if found not in (("F",) if schedule.forward_only else ("FB", "FIW")):
                    wrong.add("missing")
    graph: TopologicalSorter = TopologicalSorter()
    place: dict[tuple, tuple[int, int]] = {}
    for rank, row in enumerate(schedule.rows):
        for index, cell in enumerate(row):
            for action in actions_of(cell):
                kind = "I" if action.kind == "B" else action.kind
                place.setdefault((kind, *action[1:]), (rank, index))
    for rank, row in enumerate(schedule.rows):
        for index, cell in enumerate(row):
            graph.add(*([(rank, index)] + ([(rank, index - 1)] if index else [])))
            for action in actions_of(cell):
                for kind, stage in needs(action, placement.stages):
                    source = place.get((kind, stage, *action[2:]))
                    if source is None:
                        continue
                    graph.add((rank, index), source)
                    if source == (rank, index) or (source[0] == rank and source[1] > index and stage == action.stage):
                        wrong.add("order")
    try:
        graph.prepare()
    except CycleError:
        wrong.add("deadlock")
    return wrong


REASONS = {
    "missing": ("is missing on rank", "needs one B, or one I and one W"),
    "twice": ("is there twice",),
    "order": ("which it needs", "must lie between"),
    "deadlock": ("deadlock: ",),
}


@st.composite
def mutated(draw: st.DrawFn) -> tuple[Schedule, Schedule]:
    schedule = draw(schedules(most=4))
    rows: list[list[Cell]] = [list(row) for row in schedule.rows]
    for _ in range(draw(st.integers(1, 3))):
        row = rows[draw(st.integers(0, len(rows) - 1))]
        if len(row) < 2:
            continue
        i, j = draw(st.integers(0, len(row) - 1)), draw(st.integers(0, len(row) - 1))
        if draw(st.booleans()):
            j = min(max(0, i + draw(st.integers(-2, 2))), len(row) - 1)  # near mutations are often harmless
        match draw(st.sampled_from(["drop", "duplicate", "swap", "move", "split", "unpair"])):
            case "drop":
                row.pop(i)
            case "duplicate":
                row.insert(j, row[i])
            case "swap":
                row[i], row[j] = row[j], row[i]
            case "move":
                row.insert(j, row.pop(i))
            case "split" if isinstance(cell := row[i], Action) and cell.kind == "B":
                row[i] = cell._replace(kind="I")
                row.insert(max(i + 1, j), cell._replace(kind="W"))
            case "unpair" if isinstance(cell := row[i], Pair):
                row[i : i + 1] = [cell.forward, cell.backward] if draw(st.booleans()) else [cell.backward, cell.forward]
    return schedule, replace(schedule, rows=tuple(map(tuple, rows)))


SEEN: Counter[str] = Counter()


@settings(RELAXED, max_examples=400)
@given(mutated())
def test_mutations_are_refused_for_the_right_reason_or_truly_valid(pair: tuple[Schedule, Schedule]) -> None:
    original, schedule = pair
    wrong = judge(schedule)
    try:
        check(schedule)
        found = None
    except ScheduleError as error:
        found = error
    if found is None:
        assert not wrong, schedule
        # Valid also means: it compiles, and runs with the same work as before.
        result = simulate(compile(schedule), Costs(f=2, b=2, w=1, link=0.5))
        assert sum(result.busy) == pytest.approx(sum(simulate(original, Costs(f=2, b=2, w=1)).busy))
    else:
        assert wrong, (str(found), schedule)
        assert any(text in found.reason for reason in wrong for text in REASONS[reason]), (found.reason, wrong)
        assert found.places and all(0 <= index < len(schedule.rows[rank]) for rank, index in found.places)
    SEEN.update(wrong or {"valid"} if schedule.rows != original.rows else {"unchanged"})


def test_the_mutations_above_were_of_every_kind() -> None:
    if not SEEN:
        pytest.skip("runs after the test above, in the same process")
    assert all(SEEN[kind] >= 10 for kind in ("valid", "missing", "twice", "order", "deadlock")), SEEN
