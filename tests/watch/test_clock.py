"""Recording on a device, with events that only keep time: what a queue waits for is not the work of another."""

import pytest
import torch

from pipehc.schedules.actions import Action
from pipehc.schedules.program import Message, Run, Wait
from pipehc.watch.trace import Recorder


class Device:
    """Queues with a time each, in ms; the current one."""

    def __init__(self):
        self.queues = {name: TimedQueue(self) for name in ("compute", "high")}
        self.current = self.queues["compute"]


class TimedQueue:
    def __init__(self, device):
        self.device, self.time, self.others = device, 0.0, {}

    def run(self, work):
        outer, self.device.current = self.device.current, self
        work()
        self.device.current = outer

    def beside(self, name):
        return self.others.setdefault(name, TimedQueue(self.device))


@pytest.fixture
def device(monkeypatch):
    device = Device()

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.time = device.current.time

        def synchronize(self): ...

        def elapsed_time(self, other):
            return other.time - self.time

    monkeypatch.setattr("torch.cuda.Event", Event)
    monkeypatch.setattr("torch.cuda.synchronize", lambda device: None)
    monkeypatch.setattr("torch.cuda.device", lambda device: torch.no_grad())  # any context manager
    return device


MESSAGE = Message("gradient", 0, 1, 3, 2, 1)
WAIT, BACKWARD = Wait(MESSAGE, "high"), Run(Action("B", 1, 3), None, "high")


def spans(device, free, arrived):
    """Of a wait on the high-priority queue and the backward after it; `free`: when compute has done what came before."""
    compute, high = device.queues["compute"], device.queues["high"]
    recorder = Recorder(1, torch.device("cuda"), device.queues)
    compute.time = free
    recorder.begin(WAIT)
    high.time = arrived
    recorder.end(WAIT)
    recorder.begin(BACKWARD)
    compute.time = max(free, arrived) + 5  # its first kernel waits for the other queue, on the device alone
    recorder.end(BACKWARD)
    found = {s.queue: (s.start - recorder._clock._host_ms, s.end - recorder._clock._host_ms) for s in recorder.spans()}
    return {queue: (round(start), round(end)) for queue, (start, end) in found.items()}


def test_a_wait_on_another_queue_is_a_wait_of_the_rank(device):
    """The compute queue itself goes on to the backward and stands there: that is no computation."""
    found = spans(device, free=10, arrived=30)
    assert found["wait"] == (10, 30) and found["compute"] == (30, 35)


def test_a_message_that_came_early_costs_nothing(device):
    found = spans(device, free=30, arrived=10)
    assert found["wait"] == (30, 30) and found["compute"] == (30, 35)


def test_transfers_of_one_edge_are_waited_for_on_one_queue_beside_compute(device):
    """Streams come from a pool: one for every transfer would soon be one that messages wait on."""

    class Transfer:
        def wait(self):
            device.current.time += 7

    recorder = Recorder(1, torch.device("cuda"), device.queues)
    for _ in range(2):
        for _ in range(3):
            recorder._track(MESSAGE, "recv", Transfer())
        for *_, done in recorder._messages:
            done.result()
    others = device.queues["compute"].others
    assert list(others) == [("clock", ("recv", 2, 1))] and others["clock", ("recv", 2, 1)].time == 42
