"""The executor over real processes: toy stages in fp64, every schedule against one process to 1e-12."""

import time

import pytest
import torch
import torch.distributed as dist
from processes import run_ranks
from toy_stages import ROWS, WIDTH, OverlapToyStage, ToyStage, reference

from pipehc.comm.groups import edge_groups
from pipehc.comm.messages import Mailbox, PeerError
from pipehc.schedules import build, compile
from pipehc.schedules.actions import Pair
from pipehc.schedules.execute import execute
from pipehc.schedules.program import Send


def run_schedules(rank, ranks, cases):
    results = []
    for name, microbatches, options, forward in cases:
        program = compile(build(name, ranks, microbatches, forward=forward), **options)
        placement = program.schedule.placement
        stages = {key: ToyStage(key[1], placement.stages) for key in placement.held(rank)}
        groups = edge_groups([list(range(ranks))], program.edges())
        execute(program.instructions[rank], placement, stages, Mailbox(groups, (ROWS, WIDTH), torch.float64, timeout_s=30))
        assert not any(s.deferred or (s.saved and not forward) for s in stages.values())
        results.append({key: (s.grad, s.losses) for key, s in stages.items()})
    return results


CASES = [
    (name, microbatches, options, forward)
    for name in ("1f1b", "dualpipe", "dualpipev")
    for microbatches, options, forward in (
        (8, {}, False),
        (18, {"ahead": 1, "split_backward": False}, False),
        (20, {"ahead": 7, "recompute": True}, False),
        (6, {}, True),
    )
]


@pytest.mark.parametrize("ranks", [2, 4, pytest.param(8, marks=pytest.mark.slow)])
def test_equals_one_process(ranks):
    """P = 2 matters: next and previous are the same rank."""
    cases = [case for case in CASES if case[3] or case[0] == "1f1b" or case[1] >= 2 * ranks]
    results = run_ranks(run_schedules, ranks, ranks, cases)
    for index, (name, microbatches, _, forward) in enumerate(cases):
        stages = 2 * ranks if name == "dualpipev" else ranks
        expected = reference(stages, microbatches, forward)
        grads, losses = [torch.zeros(WIDTH, WIDTH, dtype=torch.float64) for _ in range(stages)], {}
        for rank in range(ranks):
            for (_, stage), (grad, loss) in results[rank][index].items():
                grads[stage] += grad  # dualpipe: two replicas of every stage
                losses |= loss
        assert losses == pytest.approx(expected[-1].losses, rel=1e-13)
        for stage in range(stages):
            error = (grads[stage] - expected[stage].grad).norm()
            assert error <= 1e-12 * expected[stage].grad.norm(), (name, microbatches, stage)  # both 0 if forward only


def test_one_rank_needs_no_messages():
    results = run_ranks(run_schedules, 1, 1, [("1f1b", 3, {}, False), ("dualpipev", 4, {}, False)])
    for case, (name, microbatches) in enumerate([("1f1b", 3), ("dualpipev", 4)]):
        for (_, stage), (grad, _) in results[0][case].items():
            expected = reference(2 if name == "dualpipev" else 1, microbatches)[stage].grad
            assert (grad - expected).norm() < 1e-12 * expected.norm()


def wrong_shape(rank):
    program = compile(build("1f1b", 2, 2))
    groups = edge_groups([[0, 1]], program.edges())
    stage = ToyStage(rank, 2)
    mailbox = Mailbox(groups, (ROWS, WIDTH + 1), torch.float64, timeout_s=2)
    try:
        execute(program.instructions[rank], program.schedule.placement, {(0, rank): stage}, mailbox)
    except (ValueError, PeerError) as error:
        if rank == 0:
            time.sleep(4)  # stay alive: a peer that left would be noticed at once
        return type(error).__name__, str(error)


def test_wrong_shape_and_silent_peer_are_named():
    """The rank with the wrong shape says so; its neighbour gives up after the time limit and says what it waited for."""
    (kind0, text0), (kind1, text1) = run_ranks(wrong_shape, 2)
    assert kind0 == "ValueError" and "(3, 5)" in text0 and "(3, 6)" in text0
    assert kind1 == "PeerError" and "activation for stage 1, micro-batch 0, rank 0 -> 1" in text1 and "144 bytes" in text1


def vanishing_peer(rank):
    group = dist.new_group([0, 1])
    dist.barrier()  # rank 0 must not be gone while rank 1 still connects
    if rank == 0:
        time.sleep(3)  # alive, but silent
        return
    mailbox = Mailbox({(0, 1): group}, (1,), torch.float32, timeout_s=1)
    mailbox.post(("a", 0), (0, 1))
    with pytest.raises(PeerError, match=r"4 bytes"):
        mailbox.wait(("a", 0))


def test_wait_has_a_time_limit():
    run_ranks(vanishing_peer, 2)


class SendLog:
    """An observer: messages and waits, in the log of the stages."""

    def __init__(self, log):
        self.log = log

    def begin(self, instruction):
        if isinstance(instruction, Send):
            self.log.append(("send", instruction.message.kind, instruction.message.microbatch))

    def end(self, instruction):
        pass


def run_pairs(rank, ranks, name, split):
    program = compile(build(name, ranks, 10), recompute=True, split_backward=split)
    placement, log = program.schedule.placement, []
    stages = {key: OverlapToyStage(key[1], placement.stages, log) for key in placement.held(rank)}
    mailbox = Mailbox(edge_groups([list(range(ranks))], program.edges()), (ROWS, WIDTH), torch.float64, timeout_s=30)
    execute(program.instructions[rank], placement, stages, mailbox, [SendLog(log)])
    assert not any(s.deferred or s.saved for s in stages.values())
    return {key: s.grad for key, s in stages.items()}, log, sum(isinstance(cell, Pair) for cell in program.schedule.rows[rank])


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("name", ["dualpipe", "dualpipev"])
def test_pairs_are_given_to_stages_that_can_overlap(name, split):
    """The forward's message leaves in the middle of the pair; both inputs, and R, are there when it begins."""
    ranks = 4
    results = run_ranks(run_pairs, ranks, ranks, name, split)
    stages = 2 * ranks if name == "dualpipev" else ranks
    expected = reference(stages, 10)
    grads = [torch.zeros(WIDTH, WIDTH, dtype=torch.float64) for _ in range(stages)]
    for grad_of, log, pairs in results:
        for (_, stage), grad in grad_of.items():
            grads[stage] += grad
        counts = [sum(entry[0] == what for entry in log) for what in ("output", "gradient", "finish", "pair after R")]
        assert pairs > 0 and counts == [pairs] * 4
        for i, (what, index, microbatch) in enumerate(log):
            following = [entry for entry in log[i + 1 :] if entry[0] in ("send", "gradient")][:1]
            if what == "output" and index + 1 < stages and not (name == "dualpipev" and index == ranks - 1):
                assert following == [("send", "activation", microbatch)]
    for stage in range(stages):
        assert (grads[stage] - expected[stage].grad).norm() < 1e-12 * expected[stage].grad.norm()
