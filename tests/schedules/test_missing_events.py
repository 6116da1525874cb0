"""The executor needs every event and wait of a compiled program: without any one of them two uses of a tensor are not ordered.

Queues that only keep time stand in for the device: a clock counts, for every queue, the work that has surely ended. Stages and
mailbox write down what they touch. A use that no event, wait or queue orders after an earlier one is a race, whatever the
timing was.
"""

from dataclasses import replace

import pytest
import torch

from pipehc.schedules import build, compile
from pipehc.schedules.execute import execute
from pipehc.schedules.order import Order
from pipehc.schedules.program import Post, Run, Send, Wait

ERRORS = (AssertionError, KeyError)  # a race; a message that was not posted, or not waited for


class Memory:
    """Who touched what, and the clocks of the queues."""

    def __init__(self):
        self.queues = 0
        self.current = None  # the queue at work
        self.uses = {}  # location -> (queue, number, whether it wrote)

    def touch(self, reads, writes):
        queue = self.current
        for location in (*reads, *writes):
            for other, number, wrote in self.uses.get(location, ()):
                if wrote or location in writes:
                    assert queue.clock.get(other, 0) >= number, f"race for {location}"
            if location in reads:
                assert any(wrote for *_, wrote in self.uses.get(location, ())), f"nothing wrote {location}"
        for location in reads:
            self.uses.setdefault(location, []).append((queue.name, queue.clock[queue.name], False))
        for location in writes:
            self.uses[location] = [(queue.name, queue.clock[queue.name], True)]


class ClockQueue:
    """Work runs at once; what is known to have ended travels in clocks: queue -> number of its work."""

    def __init__(self, memory):
        self.memory, self.name, self.clock, self.others = memory, memory.queues, {}, {}
        memory.queues += 1

    def run(self, work):
        outer, self.memory.current = self.memory.current, self
        self.clock[self.name] = self.clock.get(self.name, 0) + 1
        end = work()
        assert end is None
        self.memory.current = outer

    def event(self):
        return dict(self.clock)

    def wait(self, event):
        for name, number in event.items():
            self.clock[name] = max(self.clock.get(name, 0), number)

    def push(self): ...

    def hold(self, tensor): ...

    def beside(self, name):
        return self.others.setdefault(name, ClockQueue(self.memory))


class ClockMailbox:
    """Transfers of one edge overlap: that one has started says nothing about the end of another."""

    def __init__(self, memory):
        self.memory, self.count = memory, 0
        self.receives, self.sends = {}, {}

    def post(self, message, edge, slot):
        self.receives[message] = self._transfer((), (("receive", *edge, slot),))

    def wait(self, message):
        self.memory.current.wait(self.receives.pop(message))
        return torch.empty(0)

    def send(self, message, edge, tensor, slot):
        assert (edge, slot) not in self.sends
        self.sends[edge, slot] = self._transfer((("send", *edge, slot),), ())

    def delivered(self, edge, slot):
        self.memory.current.wait(self.sends.pop((edge, slot)))
        return torch.empty(0)

    def drain(self):
        assert not self.receives
        return [self.delivered(*sent) for sent in list(self.sends)]

    def _transfer(self, reads, writes):
        """On a queue of its own, which starts when the edge's queue gets there. Returns the clock at its end."""
        issuer, wire = self.memory.current, ClockQueue(self.memory)
        wire.wait(issuer.clock)
        wire.run(lambda: self.memory.touch(reads, writes))
        return wire.event()


class ClockStage:
    """Touches what `Order` says that the actions touch, on the queues that the program names."""

    def __init__(self, memory, queues, order, runs):
        self.memory, self.queues, self.order, self.runs = memory, queues, order, runs

    def forward(self, microbatch, x):
        return self._act("F", microbatch)

    def backward_input(self, microbatch, grad):
        return self._act("BI", microbatch)

    def backward_weight(self, microbatch):
        self._act("W", microbatch)

    def recompute(self, microbatch):
        self._act("R", microbatch)

    def _act(self, kinds, microbatch):
        names, event = {0: "compute", 1: "high"}, None
        for run in (self.runs[kind, microbatch] for kind in kinds if (kind, microbatch) in self.runs):
            for queue, reads, writes in self.order.pieces(run):
                on = self.queues[names[queue]]
                if event is not None:
                    on.wait(event)
                on.run(lambda reads=reads, writes=writes: self.memory.touch(reads, writes))
                event = on.event()
        return torch.empty(0)


def walk(program, steps=1):
    """Every rank's part of the program through the executor, `steps` times with the same queues and buffers."""
    schedule = program.schedule
    for rank, row in enumerate(program.instructions):
        memory = Memory()
        queues = {"compute": ClockQueue(memory), "high": ClockQueue(memory)}
        order, stages = Order(schedule, row), {}
        for lane, stage in schedule.placement.held(rank):
            own = [i for i in row if isinstance(i, Run) and (i.action.lane, i.action.stage) == (lane, stage)]
            runs = {(i.action.kind, i.action.microbatch): i for i in own}
            stages[lane, stage] = ClockStage(memory, queues, order, runs)
        mailbox = ClockMailbox(memory)
        for _ in range(steps):
            execute(row, schedule.placement, stages, mailbox, overlap=False, queues=queues)


def without(program, rank, index, event=None):
    """The program without an instruction, or without one event that it waits for."""
    rows = list(program.instructions)
    row = list(rows[rank])
    if event is None:
        del row[index]
    else:
        row[index] = row[index]._replace(after=tuple(e for e in row[index].after if e != event))
    rows[rank] = tuple(row)
    return replace(program, instructions=tuple(rows))


PROGRAMS = {
    "1f1b": compile(build("1f1b", 3, 9), high=True, recompute=True),
    "zb_h1": compile(build("zb_h1", 3, 9)),
    "interleaved": compile(build("interleaved", 2, 8), high=True, recompute=True),
    "zbv": compile(build("zbv", 2, 8), high=True, recompute=True),
    "dualpipe": compile(build("dualpipe", 4, 12), high=True, recompute=True),
    "dualpipev": compile(build("dualpipev", 2, 8), high=True, recompute=True, ahead=2),
    "evaluation": compile(build("1f1b", 3, 15, forward=True), high=True),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_whole_programs_have_no_race(name):
    walk(PROGRAMS[name])


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_step_starts_after_the_one_before(name):
    """Though no host waited for the device in between: what it posts first goes into buffers that were in use before."""
    walk(PROGRAMS[name], steps=2)


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_event_is_needed(name):
    program, tried, missed = PROGRAMS[name], 0, []
    for rank, row in enumerate(program.instructions):
        for index, instruction in enumerate(row):
            for event in () if isinstance(instruction, Wait) else instruction.after:
                tried += 1
                try:
                    walk(without(program, rank, index, event))
                except ERRORS:
                    continue
                missed.append((rank, index, instruction, event))
    assert tried > 50 and not missed


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_wait_post_and_send_is_needed(name):
    program = PROGRAMS[name]
    for rank, row in enumerate(program.instructions):
        for index, instruction in enumerate(row):
            if isinstance(instruction, Wait | Post | Send):
                with pytest.raises(ERRORS):
                    walk(without(program, rank, index))
