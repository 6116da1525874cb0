"""Copies through host memory on a device that runs late: nobody sees what is not there yet, nor overwrites what is still needed."""

import pytest
import torch
from lazy_device import LazyDevice, Stream

from pipehc.comm.host_memory import HostSlots, Mark, fetched, host_memory

CUDA = torch.device("cuda")


@pytest.fixture
def device(monkeypatch):
    return LazyDevice(monkeypatch)


@pytest.fixture
def slots():
    return HostSlots((2,), torch.int64, CUDA)


def test_what_is_fetched_is_there_when_it_is_returned(device):
    a, b = device.tensor(1, 2), device.tensor(3)
    device.write(a, 5, 6)
    assert [host.tolist() for host in fetched([a, b])] == [[5, 6], [3]]


def test_a_message_is_on_the_host_before_it_is_sent_and_its_memory_is_used_again(device, slots):
    x = device.tensor(0, 0)
    for k in range(3):
        device.write(x, k, k)
        assert slots.sending("edge", x).tolist() == [k, k]
    assert len(device.pinned) == 1 and slots.sending("other", x).tolist() == [2, 2] and len(device.pinned) == 2


def test_a_message_lands_after_the_last_use_of_its_buffer_and_the_host_goes_on(device, slots):
    """The use is another stream's; the stream that posts has waited for it."""
    buffer, seen, compute, edge = device.tensor(7, 7), [], Stream(), device.current
    device.read(buffer, seen)  # of the message before
    host = slots.receiving("slot")
    host.fill_(8)  # gloo's
    device.current = compute
    slots.land("slot", buffer)
    device.read(buffer, seen)
    assert seen == [] and buffer.tolist() == [7, 7] and edge.done == 0
    compute.run()
    assert seen == [[7, 7], [8, 8]]


def test_host_memory_is_received_into_again_when_what_came_has_left_it(device, slots):
    buffer = device.tensor(7, 7)
    slots.receiving("slot").fill_(8)
    slots.land("slot", buffer)
    slots.receiving("slot").fill_(9)  # at once, though no stream has run
    assert buffer.tolist() == [8, 8] and len(device.pinned) == 1
    slots.land("slot", buffer)
    device.current.run()
    assert buffer.tolist() == [9, 9]


def test_on_a_cpu_there_is_nothing_to_wait_for_and_nothing_to_pin():
    cpu = torch.device("cpu")
    assert not host_memory((3,), torch.float32, cpu).is_pinned()
    Mark(cpu).hold_host()
    Mark(cpu).hold_stream()
    slots, buffer = HostSlots((2,), torch.float32, cpu), torch.zeros(2)
    slots.receiving("slot").fill_(3)
    slots.land("slot", buffer)
    x = torch.ones(2, requires_grad=True)
    assert buffer.tolist() == [3, 3] and slots.sending("slot", buffer).tolist() == [3, 3] and not fetched([x])[0].requires_grad
