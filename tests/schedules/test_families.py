"""Every family against facts stated elsewhere: the eight-step table, closed forms of the bubble, peaks of live activations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

from pipehc.schedules import FAMILIES, Costs, Schedule, build, check, compile, simulate
from pipehc.schedules.actions import Action, Cell, Pair, actions_of, flatten
from pipehc.schedules.families import Family
from pipehc.schedules.placement import linear


def eight_steps(ranks: int, microbatches: int, rank: int) -> list[str]:
    """The table of spec section 5, written down once more. I is a backward with its weight gradient split off."""
    h = min(rank, ranks - 1 - rank)
    far = ranks // 2 - h - 1
    backwards = ["B1", "B0"] * (h + 1)
    table: list[tuple[list[str], int]] = [
        (["F0"], 2 * far),
        (["F0", "F1"], h + 1),
        (["I1", "W", "F1"], far),
        (["F0+B1", "F1+B0"], microbatches // 2 - ranks + h + 1),
        (["B1", "F1+B0"], far),
        ([b if i < h + 1 else b.replace("B", "I") for i, b in enumerate(backwards)], 1),
        (["W", "I0"], far),
        (["W"], h + 1),
    ]
    tokens = [token for step, often in table for token in step * often]
    if far == 0:  # the middle ranks: the first F0 and B1 are not overlapped
        at = tokens.index("F0+B1")
        tokens[at : at + 1] = ["F0", "B1"]
    return tokens


def rendered(row: tuple[Cell, ...], phase: Callable[[Action], int]) -> list[str]:
    """Tokens of a row as in the table; `in_turn` says which micro-batches they are, and whose weight gradient is next."""
    return ["+".join("W" if a.kind == "W" else f"{a.kind}{phase(a)}" for a in actions_of(cell)) for cell in row]


def in_turn(row: tuple[Cell, ...], own: Callable[[Action], tuple[int, int]], counts: dict[tuple[int, int], range]) -> None:
    """Micro-batches of a chunk go forwards and backwards in turn, weight gradients in the order in which they were split off."""
    actions = list(flatten(row))
    for chunk, microbatches in counts.items():
        for kinds in ("F", "BI", "BW"):
            done = [a.microbatch for a in actions if own(a) == chunk and a.kind in kinds]
            assert done == list(microbatches)
    assert [a[1:] for a in actions if a.kind == "I"] == [a[1:] for a in actions if a.kind == "W"]


@pytest.mark.parametrize("ranks", range(2, 17, 2))
def test_dualpipe_is_the_eight_step_table(ranks: int) -> None:
    for microbatches in range(2 * ranks, 65, 2):
        schedule = build("dualpipe", ranks, microbatches)
        half = microbatches // 2
        for rank, row in enumerate(schedule.rows):
            near = 0 if rank < ranks // 2 else 1  # the lane for which this rank is in the first half of the path
            assert rendered(row, lambda a, near=near: int(a.lane != near)) == eight_steps(ranks, microbatches, rank)  # type: ignore[misc]
            stages = {0: rank, 1: ranks - 1 - rank}
            assert all(stages[a.lane] == a.stage for a in flatten(row))
            in_turn(row, lambda a: (a.lane, a.stage), {(0, rank): range(half), (1, stages[1]): range(half, microbatches)})
        if microbatches in (2 * ranks, 64):
            assert check(schedule).peak_live == (ranks + 1,) * ranks


@pytest.mark.parametrize("ranks", range(1, 9))
def test_dualpipev_is_the_first_half_of_a_dualpipe_of_twice_the_size(ranks: int) -> None:
    for microbatches in (2 * ranks, 2 * ranks + 1, 3 * ranks + 4, 32):
        schedule = build("dualpipev", ranks, microbatches)
        for rank, row in enumerate(schedule.rows):
            assert rendered(row, lambda a: int(a.stage >= ranks)) == eight_steps(2 * ranks, 2 * microbatches, rank)
            every = range(microbatches)
            in_turn(row, lambda a: (0, a.stage), {(0, rank): every, (0, 2 * ranks - 1 - rank): every})
        assert check(schedule).peak_live == (ranks + 0.5,) * ranks  # P + 1 of the P = 2 x ranks stages


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("microbatches", [1, 2, 7, 16, 19])
def test_peak_activations(ranks: int, microbatches: int) -> None:
    def peaks(name: str) -> list[float]:
        return list(check(build(name, ranks, microbatches)).peak_live)

    assert peaks("gpipe") == [microbatches] * ranks
    assert peaks("1f1b") == [min(microbatches, ranks - rank) for rank in range(ranks)]
    assert max(peaks("zb_h1")) <= ranks and peaks("zb_h1")[0] == min(microbatches, ranks)
    assert max(peaks("zbv")) <= ranks
    if microbatches >= 2 * ranks - 1:
        assert peaks("zbv") == [ranks] * ranks
    for chunks in (1, 2, 3):
        top = max(check(build("interleaved", ranks, microbatches, chunks=chunks)).peak_live)
        if microbatches % ranks == 0 and microbatches > ranks:
            assert top == pytest.approx(((chunks - 1) * ranks + 2 * (ranks - 1) + 1) / chunks)


@pytest.mark.parametrize("f, b, w", [(1, 1, 1), (2, 3, 1), (1, 2, 0.5), (3, 2, 1), (1, 1.5, 0.5), (2, 1, 1)])
@pytest.mark.parametrize("ranks, microbatches", [(1, 3), (2, 6), (3, 9), (4, 16), (7, 14)])
def test_bubbles_are_the_closed_forms(ranks: int, microbatches: int, f: float, b: float, w: float) -> None:
    def bubble(name: str, **chunks: int) -> float:
        # Whole backwards, as in the formulas: compile would else let the input gradient leave before the weight gradient.
        return simulate(compile(build(name, ranks, microbatches, **chunks), split_backward=False), Costs(f=f, b=b, w=w)).bubble

    full = (ranks - 1) * (f + b + w)
    assert bubble("gpipe") == pytest.approx(full)
    assert bubble("1f1b") == pytest.approx(full)
    assert bubble("zb_h1") == pytest.approx(full - 2 * w * (ranks - 1))
    for chunks in (1, 2, 3):
        assert bubble("interleaved", chunks=chunks) == pytest.approx(full / chunks)
    if f == b == w:
        assert bubble("zbv") == pytest.approx((ranks - 1) * f / 2)  # only the way of the first micro-batch down


@pytest.mark.parametrize("name", FAMILIES)
def test_forward_only_runs_every_forward_once_and_loses_only_the_way_in(name: str) -> None:
    for ranks in (1, 2, 3, 4, 6):
        for microbatches in (2, 4, 12, 30):
            if FAMILIES[name].placement is FAMILIES["dualpipe"].placement and ranks == 1:
                continue
            schedule = build(name, ranks, microbatches, forward=True)
            stages, lanes = schedule.placement.stages, schedule.placement.lanes
            check(schedule)
            actions = Counter(a for row in schedule.rows for a in flatten(row))
            assert set(actions.values()) == {1} and {a.kind for a in actions} == {"F"}
            assert len(actions) == stages * microbatches
            if lanes == 1 and microbatches % ranks == 0:
                # A chunk takes 1. The last rank starts ranks - 1 later; on a V the last micro-batch has to come back from there.
                chunks = stages // ranks
                way = (2 if schedule.placement.table[0][-1] == 0 else 1) * (ranks - 1)
                assert simulate(schedule, Costs(f=chunks, b=0, w=0)).makespan == pytest.approx(microbatches * chunks + way)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_valid_size_checks(name: str) -> None:
    built = 0
    for ranks in range(1, 7):
        for microbatches in range(1, 15):
            for chunks in (1, 2, 4) if name == "interleaved" else (None,):
                try:
                    schedule = build(name, ranks, microbatches, chunks=chunks)
                except ValueError:
                    # Only these two ask for more than one rank and one micro-batch.
                    assert name.startswith("dualpipe")
                    assert microbatches < 2 * ranks or (name == "dualpipe" and (ranks % 2 or microbatches % 2))
                    continue
                built += 1
                assert isinstance(schedule, Schedule) and schedule.microbatches == microbatches
                check(schedule)
                if ranks in (2, 5) and microbatches in (1, 3, 5, 10, 13):
                    compile(schedule)
    assert built >= 12


@pytest.mark.parametrize(
    "arguments, options, complaint",
    [
        (("2f2b", 4, 8), {}, r"schedule = '2f2b': must be one of gpipe, 1f1b, interleaved, zb_h1, zbv, dualpipe, dualpipev"),
        (("1f1b", 0, 8), {}, r"ranks = 0: must be at least 1"),
        (("1f1b", 4, 0), {}, r"microbatches = 0: must be at least 1"),
        (("1f1b", 4, 8), {"chunks": 2}, r"chunks = 2: 1f1b has a fixed number of stages per rank; only interleaved takes chunks"),
        (("interleaved", 4, 8), {"chunks": 0}, r"chunks = 0: must be at least 1"),
        (("dualpipe", 3, 12), {}, r"ranks = 3: dualpipe needs an even number, at least 2"),
        (("dualpipe", 4, 6), {}, r"microbatches = 6: dualpipe needs an even number, at least 8"),
        (("dualpipe", 4, 9), {}, r"microbatches = 9: dualpipe needs an even number"),
        (("dualpipe", 4, 9), {"forward": True}, r"microbatches = 9: must be a multiple of 2"),
        (("dualpipev", 4, 7), {}, r"microbatches = 7: dualpipev needs at least 8"),
    ],
)
def test_what_a_family_cannot_do_is_refused_by_name_and_value(arguments: tuple, options: dict, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        build(*arguments, **options)


def test_pairs_of_a_rank_overlap_different_microbatches() -> None:
    for name in ("dualpipe", "dualpipev"):
        pairs = [cell for row in build(name, 4, 16).rows for cell in row if isinstance(cell, Pair)]
        assert len(pairs) > 16 and all(pair.forward[1:3] != pair.backward[1:3] for pair in pairs)


def test_a_new_family_is_a_placement_and_a_function_that_makes_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPipe whose backwards take the last micro-batch first: all that has to be written, and one line in the registry."""

    def rows(ranks: int, microbatches: int) -> tuple[tuple[Cell, ...], ...]:
        def row(rank: int) -> tuple[Cell, ...]:
            forwards = [Action("F", rank, m) for m in range(microbatches)]
            return (*forwards, *(action._replace(kind="B") for action in reversed(forwards)))

        return tuple(row(rank) for rank in range(ranks))

    monkeypatch.setitem(FAMILIES, "last_first", Family(linear, rows))
    schedule = build("last_first", 3, 5)
    assert check(schedule).peak_live == (5, 5, 5)
    assert simulate(compile(schedule, split_backward=False), Costs()).bubble == pytest.approx(2 * 3)
    assert build("last_first", 3, 5, forward=True).forward_only
