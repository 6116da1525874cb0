"""Gradients are summed as soon as a stage has all of them, on all replicas in one order."""

import pytest

from pipehc.model.reduction import EarlyReduction
from pipehc.schedules import build, compile
from pipehc.schedules.program import Run


def run(program, rank):
    """[(lane, stage), instructions left when its reduction starts]; checks that no weight gradient of it comes later."""
    started = []
    observer = EarlyReduction(program, rank, started.append)
    row, found = program.instructions[rank], []
    for index, instruction in enumerate(row):
        observer.begin(instruction)
        if isinstance(instruction, Run) and instruction.action.kind in "BW":
            assert (instruction.action.lane, instruction.action.stage) not in started
        observer.end(instruction)
        found += [(held, len(row) - 1 - index) for held in started[len(found) :]]
    return found


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_mirrored_ranks_reduce_in_one_order_and_before_the_end(ranks, split):
    program = compile(build("dualpipe", ranks, 20), split_backward=split)
    early = 0
    for rank in range(ranks):
        found, mirrored = run(program, rank), run(program, ranks - 1 - rank)
        assert {held for held, _ in found} == set(program.schedule.placement.held(rank))
        assert [stage for (_, stage), _ in found] == [stage for (_, stage), _ in mirrored]
        assert found[-1][1] == 0
        early += found[0][1] > 0
    assert early == ranks


@pytest.mark.parametrize("name", ["1f1b", "dualpipev"])
def test_every_stage_once(name):
    program = compile(build(name, 4, 12), recompute=True)
    for rank in range(4):
        assert {held for held, _ in run(program, rank)} == set(program.schedule.placement.held(rank))


@pytest.mark.parametrize("name", ["dualpipe", "dualpipev", "zb_h1", "zbv"])
def test_the_last_w_of_a_stage_is_announced_where_nothing_else_runs(name):
    program, announced = compile(build(name, 4, 12)), 0
    for rank in range(4):
        log = []
        observer = EarlyReduction(program, rank, lambda held, log=log: log.append(("start", held)), log.append)
        placement = program.schedule.placement
        left = dict.fromkeys(placement.held(rank), 12 // placement.lanes)
        for instruction in program.instructions[rank]:
            before = len(log)
            observer.begin(instruction)
            if len(log) > before:
                assert instruction.action.kind == "W" and instruction.pair is None
                assert left[log[-1]] == 1 and (instruction.action.lane, instruction.action.stage) == log[-1]
                announced += 1
            observer.end(instruction)
            if isinstance(instruction, Run) and instruction.action.kind in "BW":
                left[instruction.action.lane, instruction.action.stage] -= 1
        for index, entry in enumerate(log):
            assert entry[0] == "start" or log[index + 1] == ("start", entry)
    assert announced >= 4
