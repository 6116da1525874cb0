"""Queues, and that a piece which starts too early is caught: every single wait of a chain is left out once."""

import itertools

import pytest
import torch
from toy_chain import Toy, streams

from pipehc.comm.queues import HostQueue
from pipehc.recompute import Pass

NAMES = ("compute", "high", "communication")


def test_late_work_is_done_when_somebody_waits():
    done = []
    compute, high = HostQueue(late=False), HostQueue(late=True)
    high.run(lambda: done.append(1))
    first = high.event()
    high.run(lambda: done.append(2))
    compute.run(lambda: done.append("compute"))
    assert done == ["compute"]
    compute.wait(first)
    assert done == ["compute", 1]
    compute.wait(high.event())
    compute.wait(first)
    assert done == ["compute", 1, 2]


def test_transfers_start_at_once_and_end_in_order():
    log = []

    def transfer(name):
        log.append(f"start {name}")
        return lambda: log.append(f"end {name}")

    queue, compute = HostQueue(late=False), HostQueue(late=False)
    for name in "abc":
        queue.run(lambda name=name: transfer(name))
    assert log == ["start a", "start b", "start c"]
    event = queue.event()
    queue.run(lambda: transfer("d"))
    compute.wait(event)
    assert log == ["start a", "start b", "start c", "start d", "end a", "end b", "end c"]


def test_late_queues_wait_for_each_other():
    log = []
    a, b, host = HostQueue(late=True), HostQueue(late=True), HostQueue(late=False)
    a.run(lambda: log.append("a1"))
    b.wait(a.event())
    b.run(lambda: log.append("b1"))
    a.wait(b.event())
    a.run(lambda: log.append("a2"))
    assert log == []
    host.wait(a.event())
    assert log == ["a1", "b1", "a2"]


class Forgetful(HostQueue):
    """A late queue that leaves out the wait with one number, counted over all queues that share `counter`."""

    def __init__(self, counter, omit):
        super().__init__(late=True)
        self.counter, self.omit = counter, omit

    def wait(self, event):
        if next(self.counter) != self.omit:
            super().wait(event)


def through(toy, recompute, order, omit=None):
    """(waits, result, gradients): forward and backward with every queue as late as can be; `order`: which ones are driven first."""
    counter = itertools.count()
    queues = {name: Forgetful(counter, omit) for name in order}
    chain = toy.chain(3)
    run = Pass(chain, queues, {"x0": streams(1)}, recompute=recompute)

    def finish():
        for name in order:
            queues[name].event().finish()

    run.forward_all()
    finish()
    result = run.result()
    run.seed(chain.result, result.cos())
    if recompute:
        run.rebuild()
    run.backward_all()
    finish()
    return next(counter), result, {"x0": run.gradient("x0"), **toy.take_gradients()}


@pytest.mark.parametrize("recompute", [False, True])
def test_a_missing_wait_never_goes_unnoticed(recompute):
    """Leaving out a wait is an error, unless others imply it: then nothing changes. Whichever queue is ahead of the others."""
    toy = Toy(blocks=2)
    waits, result, gradients = through(toy, recompute, NAMES)
    caught = set()
    for order, omit in itertools.product(itertools.permutations(NAMES), range(waits)):
        try:
            _, same, same_gradients = through(toy, recompute, order, omit)
        except AssertionError as error:
            assert "no event orders them" in str(error)
            toy.take_gradients()
            caught.add(omit)
            continue
        assert torch.equal(same, result)
        for name, gradient in gradients.items():
            assert torch.equal(same_gradients[name], gradient), (omit, name)
    missed = set(range(waits)) - caught
    assert waits > 15 and len(missed) <= 2, (waits, missed)


def test_what_is_used_too_early_is_named():
    queues = {name: HostQueue(late=name == "high") for name in NAMES}
    queues["compute"].wait = lambda event: None
    run = Pass(Toy(blocks=2).chain(), queues, {"x0": streams(1)})
    with pytest.raises(AssertionError, match="starts before its input normed2 is there: no event orders them"):
        run.forward_all()


def test_pushed_work_needs_nobody_to_wait():
    done = []
    queue = HostQueue(late=True)
    queue.run(lambda: done.append(1))
    assert done == []
    queue.push()
    assert done == [1]
