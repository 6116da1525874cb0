"""`check` names what is wrong in one sentence, and shows the place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from pipehc.schedules import Schedule, ScheduleError, build, check
from pipehc.schedules.actions import Action, Cell, Pair, actions_of, parse
from pipehc.schedules.placement import Placement, linear


def changed(schedule: Schedule, rank: int, change: Callable[[list[Cell]], object]) -> Schedule:
    rows = [list(row) for row in schedule.rows]
    change(rows[rank])
    return replace(schedule, rows=tuple(map(tuple, rows)))


def swap(i: int, j: int) -> Callable[[list[Cell]], None]:
    def change(row: list[Cell]) -> None:
        row[i], row[j] = row[j], row[i]

    return change


def refused(schedule: Schedule) -> ScheduleError:
    with pytest.raises(ScheduleError) as caught:
        check(schedule)
    assert str(caught.value) == "\n".join(filter(None, [caught.value.reason, caught.value.grid]))
    return caught.value


ONE = build("1f1b", 4, 8)
HALF = build("zb_h1", 4, 8)


@pytest.mark.parametrize(
    "schedule, reason, places",
    [
        (changed(ONE, 1, lambda row: row.pop(0)), "1F0 is missing on rank 1", [(1, 0)]),
        (changed(ONE, 1, lambda row: row.pop()), "1B7 on rank 1: no backward; needs one B, or one I and one W", [(1, 12)]),
        (
            changed(HALF, 0, lambda row: row.remove(Action("W", 0, 3))),
            "0B3 on rank 0: only 0I3; needs one B, or one I and one W",
            None,
        ),
        (changed(ONE, 1, lambda row: row.append(row[3])), "1B0 is there twice", None),
        (changed(ONE, 1, lambda row: row.append(Action("W", 1, 3))), "1B3 on rank 1: only 1B3 and 1W3; needs one B, or", None),
        (changed(ONE, 3, swap(0, 1)), "3B0 comes before 3F0, which it needs", [(3, 0), (3, 1)]),
        (changed(HALF, 0, swap(4, 5)), "0W0 comes before 0I0, which it needs", None),
        (changed(ONE, 1, lambda row: row.append(Action("F", 2, 0))), "2F0 is on rank 1, but its stage lives on rank 2", [(1, 16)]),
        (changed(ONE, 1, lambda row: row.append(Action("F", 4, 0))), "4F0: no such lane or stage in the placement", [(1, 16)]),
        (changed(ONE, 1, lambda row: row.append(Action("F", 1, 8))), "1F8: lane 0 carries micro-batches 0 to 7", [(1, 16)]),
        (changed(ONE, 1, lambda row: row.append(Action("R", 1, 2))), "1R2 must lie between 1F2 and 1B2", None),
        (
            changed(ONE, 1, lambda row: row.append(Pair(Action("F", 1, 0), Action("I", 1, 0)))),
            "1F0+1I0: a pair is a forward F and a full backward B",
            [(1, 16)],
        ),
        (replace(ONE, rows=ONE.rows[:3]), "3 rows for the 4 ranks of the placement", []),
        (replace(build("1f1b", 2, 2, forward=True), rows=build("1f1b", 2, 2).rows), "0B0 in a forward-only schedule", None),
    ],
)
def test_the_reason_is_one_sentence_and_the_place_is_marked(schedule: Schedule, reason: str, places: list | None) -> None:
    error = refused(schedule)
    assert error.reason.startswith(reason) and "\n" not in error.reason
    if places is not None:
        assert list(error.places) == places
    for rank, index in error.places:
        line = next(line for line in error.grid.splitlines() if line.startswith(f"  rank {rank} |"))
        assert f"[{'+'.join(map(str, actions_of(schedule.rows[rank][index])))}]" in line


def test_a_deadlock_is_shown_as_its_circle_and_nothing_else() -> None:
    # Rank 5 wants its first gradient before it has sent enough for rank 6 to compute it; all other ranks are fine.
    error = refused(changed(build("1f1b", 8, 16), 5, lambda row: row.insert(1, row.pop(3))))
    assert error.reason == ("deadlock: rank 5 at 5B0 waits for 6B0 of rank 6, rank 6 at 6F1 waits for 5F1 of rank 5")
    assert [line.split("|")[0].strip() for line in error.grid.splitlines()] == ["rank 5", "rank 6"]
    assert "[5B0]" in error.grid and "[6B0]" in error.grid and "[6F1]" in error.grid and "[5F1]" in error.grid


def test_a_deadlock_within_one_rank_is_found() -> None:
    # Rank 0 holds both ends of a V: the last stage cannot run before the first.
    rows = [tuple(map(parse, row)) for row in (["3F0", "0F0", "3B0", "0B0"], ["1F0", "2F0", "2B0", "1B0"])]
    schedule = Schedule("v", Placement(((0, 1, 1, 0),), "v"), 1, tuple(rows))
    error = refused(schedule)
    assert error.reason == "deadlock: rank 0 at 3F0 waits for 2F0 of rank 1, rank 1 at 1F0 waits for 0F0 of rank 0"


def test_far_marks_of_one_row_are_shown_with_a_gap() -> None:
    error = refused(changed(build("1f1b", 1, 40), 0, lambda row: row.append(row.pop(2))))
    assert error.reason == "0B1 comes before 0F1, which it needs"
    assert " ".join(error.grid.split()) == "rank 0 | 0F0 0B0 [0B1] 0F2 0B2 0F3 ... 0B38 0F39 0B39 [0F1]"


def test_facts_are_peaks_and_earliest_slots() -> None:
    facts = check(build("1f1b", 2, 2))
    assert facts.peak_live == (2, 1)
    assert facts.earliest == ((0, 1, 3, 5), (1, 2, 3, 4))
    rows = tuple(tuple(map(parse, text.split())) for text in ["0F0 0F1 0R0 0I0 0I1 0W0 0W1"])
    assert check(Schedule("r", linear(1), 2, rows)).peak_live == (2,)
