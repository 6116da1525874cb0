"""What the compiler promises about order, buffers and events, and that importing it costs next to nothing."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import replace

import pytest

from pipehc.schedules import FAMILIES, Costs, Program, ScheduleError, build, check, compile, simulate
from pipehc.schedules.actions import Action, Pair, flatten
from pipehc.schedules.issued import check_issued
from pipehc.schedules.program import Instruction, Post, ProgramError, Run, Send, Wait

SIZES = [
    ("gpipe", 3, 5),
    ("1f1b", 4, 9),
    ("interleaved", 3, 8),
    ("zb_h1", 4, 9),
    ("zbv", 3, 8),
    ("dualpipe", 4, 12),
    ("dualpipev", 3, 9),
]
NAMED = pytest.mark.parametrize("name, ranks, microbatches", SIZES)


def runs(row: tuple[Instruction, ...]) -> list[Action]:
    return [i.action for i in row if isinstance(i, Run)]


def at(row: tuple[Instruction, ...], action: Action) -> int:
    return next(k for k, i in enumerate(row) if isinstance(i, Run) and i.action == action)


def test_sizes_name_every_family() -> None:
    assert {name for name, *_ in SIZES} == set(FAMILIES)


@NAMED
def test_rows_keep_the_order_of_the_schedule(name: str, ranks: int, microbatches: int) -> None:
    schedule = build(name, ranks, microbatches)
    for rank, row in enumerate(compile(schedule, split_backward=False).instructions):
        assert runs(row) == list(flatten(schedule.rows[rank]))


@NAMED
def test_a_backward_is_split_exactly_where_a_neighbour_waits_for_its_input_gradient(
    name: str, ranks: int, microbatches: int
) -> None:
    schedule = build(name, ranks, microbatches)
    placement = schedule.placement
    for rank, row in enumerate(compile(schedule).instructions):
        for action in (a for a in flatten(schedule.rows[rank]) if a.kind == "B"):
            leaves = action.stage > 0 and placement.rank(action.lane, action.stage - 1) != rank
            if not leaves:
                assert action in runs(row)
                continue
            k = at(row, action._replace(kind="I"))
            sent = row[k + 1]
            assert isinstance(sent, Send) and sent.message.kind == "gradient" and sent.message.stage == action.stage - 1
            after = row[k + 2]
            assert isinstance(after, Run) and after.action == action._replace(kind="W")


@NAMED
def test_waits_are_as_late_as_possible_and_sends_as_early(name: str, ranks: int, microbatches: int) -> None:
    for row in compile(build(name, ranks, microbatches), recompute=True).instructions:
        for k, instruction in enumerate(row):
            if isinstance(instruction, Wait):
                user = row[k + 1]
                kind = "F" if instruction.message.kind == "activation" else "I"
                assert isinstance(user, Run) and ("F" if user.action.kind == "F" else "I") == kind
                assert user.action.stage == instruction.message.stage
            if isinstance(instruction, Send):
                maker = row[k - 1]
                assert isinstance(maker, Run) and maker.action.microbatch == instruction.message.microbatch


@NAMED
def test_recompute_comes_before_the_wait_for_the_gradient_that_needs_it(name: str, ranks: int, microbatches: int) -> None:
    program = compile(build(name, ranks, microbatches), recompute=True)
    waited = 0
    for row in program.instructions:
        backwards = [a for a in runs(row) if a.kind in "BI"]
        assert [a[1:] for a in runs(row) if a.kind == "R"] == [a[1:] for a in backwards]
        for action in backwards:
            k = at(row, action)
            if isinstance(row[k - 1], Wait):
                waited += 1
                assert isinstance(row[k - 2], Run) and row[k - 2].action == action._replace(kind="R")  # type: ignore[union-attr]
    assert waited > 5


def test_a_recompute_that_the_schedule_places_itself_stays_where_it_is() -> None:
    schedule = build("1f1b", 1, 2)
    rows = ((Action("F", 0, 0), Action("R", 0, 0), Action("F", 0, 1), Action("B", 0, 0), Action("B", 0, 1)),)
    row = compile(type(schedule)("own", schedule.placement, 2, rows), recompute=True).instructions[0]
    assert [str(a) for a in runs(row)] == ["0F0", "0R0", "0F1", "0B0", "0R1", "0B1"]


def test_a_pair_releases_its_forward_before_its_backward_waits_and_posts_nothing_inside() -> None:
    for name, ranks, microbatches in SIZES:
        schedule = build(name, ranks, microbatches)
        program = compile(schedule, recompute=True)
        for rank, row in enumerate(program.instructions):
            wanted = [cell for cell in schedule.rows[rank] if isinstance(cell, Pair)]
            for number, pair in enumerate(wanted):
                inside = [k for k, i in enumerate(row) if isinstance(i, Run) and i.pair == number]
                part = row[inside[0] : inside[-1] + 1]
                assert part[0].action == pair.forward  # type: ignore[union-attr]
                kinds = [type(i).__name__ + (i.action.kind if isinstance(i, Run) else "") for i in part]
                assert "Post" not in kinds
                if "Send" in kinds and "Wait" in kinds and pair.forward.stage + 1 < schedule.placement.stages:
                    sends = [k for k, i in enumerate(part) if isinstance(i, Send) and i.message.kind == "activation"]
                    assert not sends or sends[0] < kinds.index("Wait")


@pytest.mark.parametrize("ahead", [1, 2, 5])
@NAMED
def test_receives_are_posted_ahead_within_the_budget(name: str, ranks: int, microbatches: int, ahead: int) -> None:
    program = compile(build(name, ranks, microbatches), ahead=ahead)
    needed_at_once = 2 if name.startswith("dualpipe") else 1  # the inputs of both halves of a pair
    for rank, row in enumerate(program.instructions):
        for edge in program.edges():
            posts = [k for k, i in enumerate(row) if isinstance(i, Post) and (i.message.source, rank) == edge]
            waits = [k for k, i in enumerate(row) if isinstance(i, Wait) and (i.message.source, rank) == edge]
            for post, wait in zip(posts[ahead:], sorted(waits)):
                if post > wait:  # later than the budget asks: its message depends on what this rank does in between
                    moved = [*row[:wait], row[post]._replace(after=()), *row[wait:post], *row[post + 1 :]]
                    rows = [*program.instructions[:rank], tuple(moved), *program.instructions[rank + 1 :]]
                    with pytest.raises(ProgramError):
                        check_issued(replace(program, instructions=tuple(rows)))
            # Messages sent before, but used after another one of the edge, have to be there as well.
            used = [row[k].message for k in waits]  # type: ignore[union-attr]
            sent = [used.index(row[k].message) for k in posts]  # type: ignore[union-attr]
            overtaken = max((sum(sent[j] > sent[k] for j in range(k)) for k in range(len(sent))), default=0)
            for wait in waits:
                open_now = sum(post < wait for post in posts) - sum(other < wait for other in waits)
                assert open_now <= ahead + needed_at_once + overtaken


@pytest.mark.parametrize("microbatches", [16, 64])
def test_receive_buffers_are_bounded_by_what_is_in_flight_not_by_the_number_of_microbatches(microbatches: int) -> None:
    """Live activations, plus what is posted ahead, plus one or two that the current cell needs."""
    for name in FAMILIES:
        schedule = build(name, 4, microbatches)
        live = [round(x / schedule.placement.share) for x in check(schedule).peak_live]
        program = compile(schedule, ahead=2)
        for (source, target), slots in program.receive_slots().items():
            limit = live[target] + 2 + 2
            # Activations, and gradients that wait for their weight gradients, come over one edge where it carries both.
            assert slots <= limit + (limit if _carries_both(program, source, target) else 0)
            assert slots <= 30 or name == "gpipe"
        assert all(slots <= 4 for slots in program.send_slots().values()) or name == "gpipe"


@pytest.mark.parametrize("hosts_wait", [False, True])
@pytest.mark.parametrize("link", [0.0, 15.0, 30.7, 60.0])
def test_waiting_for_sends_before_their_buffers_are_used_again_costs_no_time(link: float, hosts_wait: bool) -> None:
    """Not even with two buffers an edge, which is what devices hold: what they sent is memory that nothing else can have."""
    costs = Costs(f=60, b=60, w=60, link=link)
    waiting = 0
    for name in FAMILIES:
        program = compile(build(name, 4, 16), hosts_wait=hosts_wait)
        assert not hosts_wait or set(program.send_slots().values()) == {2}, name
        free = []
        for row in program.instructions:
            sends = {i.event for i in row if isinstance(i, Send)}
            waiting += sum(not sends.isdisjoint(i.after) for i in row if isinstance(i, Run))
            bare = (i._replace(after=tuple(e for e in i.after if e not in sends)) if isinstance(i, Run) else i for i in row)
            free.append(tuple(bare))
        without = replace(program, instructions=tuple(free))
        assert simulate(program, costs).makespan == pytest.approx(simulate(without, costs).makespan)
    assert waiting > 100


def test_more_sends_are_held_where_their_receivers_take_them_late() -> None:
    """The gradients that the first rank has for the last one, which is at its other chunk then."""
    slots = compile(build("interleaved", 8, 16), hosts_wait=True).send_slots()
    assert slots.pop((0, 7)) == 4 and set(slots.values()) == {2}


def _carries_both(program: Program, source: int, target: int) -> bool:
    kinds = {i.message.kind for i in program.instructions[source] if isinstance(i, Send) and i.message.target == target}
    return len(kinds) == 2


@pytest.mark.parametrize("name", FAMILIES)
def test_an_evaluation_needs_a_handful_of_buffers(name: str) -> None:
    program = compile(build(name, 4, 64, forward=True))
    assert max(program.receive_slots().values()) <= 6 and max(program.send_slots().values()) <= 6


def test_the_high_queue_takes_the_end_of_a_forward_and_the_start_of_a_backward() -> None:
    program = compile(build("dualpipe", 4, 8), high=True)
    for row in program.instructions:
        for instruction in row:
            if isinstance(instruction, Run):
                kind, last = instruction.action.kind, instruction.action.stage == 3  # there is a loss between the two
                assert instruction.exit == ("high" if kind == "F" and not last else "compute")
                assert instruction.entry == ("high" if kind in "BI" and not last else "compute")
            if isinstance(instruction, Wait):
                assert instruction.queue == ("high" if instruction.message.kind == "gradient" else "compute")
    plain = compile(build("dualpipe", 4, 8))
    assert all(i.entry == i.exit == "compute" for row in plain.instructions for i in row if isinstance(i, Run))


def test_the_same_schedule_compiles_to_the_same_program() -> None:
    assert compile(build("dualpipe", 4, 12)) == compile(build("dualpipe", 4, 12))


def test_what_cannot_be_compiled_is_refused() -> None:
    with pytest.raises(ValueError, match="ahead = 0: must be at least 1"):
        compile(build("1f1b", 2, 2), ahead=0)
    schedule = build("1f1b", 2, 4)
    with pytest.raises(ScheduleError):
        compile(type(schedule)("x", schedule.placement, 5, schedule.rows))


def test_import_is_quick_and_pulls_in_nothing_heavy() -> None:
    script = """
import sys, time
start = time.process_time()  # of this process: other tests may keep the machine busy
import pipehc.schedules
print(time.process_time() - start, *(m for m in ("torch", "matplotlib", "rich", "numpy") if m in sys.modules))
"""
    seconds = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        took, *heavy = done.stdout.split()
        assert heavy == []
        seconds.append(float(took))
    assert min(seconds) < 0.3


@pytest.mark.slow
def test_compile_speed() -> None:
    start = time.process_time()
    compile(build("dualpipe", 64, 256))
    assert time.process_time() - start < 30  # most of it proves that issued work ends: clocks of 64 ranks for 50,000 instructions
