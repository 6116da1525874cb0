"""Stage messages: few buffers, used again and again, and never under the hands of somebody who still needs them."""

import threading
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from processes import run_ranks
from toy_stages import ROWS, WIDTH, ToyStage, reference

from pipehc.comm.device_waits import DeviceWaits
from pipehc.comm.groups import NCCL_LIMIT_S, edge_groups
from pipehc.comm.messages import Mailbox
from pipehc.schedules import build, compile
from pipehc.schedules.execute import execute
from pipehc.schedules.families import FAMILIES

RANKS = 4
MICROBATCHES = 8, 16, 32


class CountingMailbox(Mailbox):
    """Knows how many buffers it has, and how many sends it kept at the same time."""

    most_sends = 0
    direct = 0  # messages that did not go through host memory

    @property
    def buffers(self):
        return len(self._buffers)

    def wait(self, message):
        slot, pending = self._received[message]
        self.direct += pending.tensor is self._buffers[slot]
        tensor = super().wait(message)
        assert tensor.untyped_storage()._cdata == self._buffers[slot].untyped_storage()._cdata
        return tensor

    def send(self, *args):
        super().send(*args)
        self.most_sends = max(self.most_sends, len(self._sent))


def on_this_rank(slots, position):
    return sum(count for edge, count in slots.items() if edge[position] == dist.get_rank())


def buffers_of_runs(rank, name, transport="device"):
    """(receive buffers, tensors kept for sending) after a step of each size, through one mailbox a size."""
    found = []
    for microbatches in MICROBATCHES:
        program = compile(build(name, RANKS, microbatches))
        placement = program.schedule.placement
        groups = edge_groups([list(range(RANKS))], program.edges())
        mailbox = CountingMailbox(groups, (ROWS, WIDTH), torch.float64, timeout_s=30, transport=transport)
        for _ in range(2):  # the second step takes the buffers of the first
            stages = {key: ToyStage(key[1], placement.stages) for key in placement.held(rank)}
            execute(program.instructions[rank], placement, stages, mailbox)
            expected = reference(placement.stages, microbatches)
            for (_, stage), own in stages.items():
                if placement.lanes == 1:
                    assert torch.allclose(own.grad, expected[stage].grad, rtol=1e-12)
        assert mailbox.buffers == on_this_rank(program.receive_slots(), 1)
        assert mailbox.most_sends <= on_this_rank(program.send_slots(), 0)
        assert (mailbox.direct == 0) == (transport == "host")
        found.append((mailbox.buffers, mailbox.most_sends))
    return found


@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - {"gpipe"}))  # gpipe has all micro-batches in flight
def test_live_buffers_do_not_grow_with_the_number_of_microbatches(name):
    for found in run_ranks(buffers_of_runs, RANKS, name):
        received, sent = zip(*found)
        assert received[1] == received[2] > 0 and max(sent) <= 12


@pytest.mark.parametrize("name", ["1f1b", "dualpipe", "zbv"])
def test_all_messages_may_go_through_host_memory(name):
    run_ranks(buffers_of_runs, RANKS, name, "host")


def test_what_was_received_may_be_sent_on_while_its_buffer_is_used_again():
    """Rank 0 sends 8 numbers round: 1 hands each of them on as it is, and posts the next receive into the same buffer."""

    def go_round(rank):
        edges = [(0, 1), (1, 2)]
        mailbox = CountingMailbox(edge_groups([[0, 1, 2]], edges), (1 << 18,), torch.float32, timeout_s=30)
        found = []
        for k in range(8):
            if rank == 0:
                mailbox.send(("m", k), (0, 1), torch.full((1 << 18,), float(k)), k)
            if rank == 1:
                mailbox.post(("m", k), (0, 1), 0)
                mailbox.send(("m", k), (1, 2), mailbox.wait(("m", k)), k)
        dist.barrier()
        for k in range(8 if rank == 2 else 0):
            mailbox.post(("m", k), (1, 2), k)
        for k in range(8 if rank == 2 else 0):
            found.append(mailbox.wait(("m", k)).unique().tolist())
        mailbox.drain()
        return found, mailbox.buffers

    found = run_ranks(go_round, 3)
    assert found[2][0] == [[float(k)] for k in range(8)] and [buffers for _, buffers in found] == [0, 1, 8]


def test_slots_in_use_are_refused():
    def misuse(rank):
        mailbox = Mailbox(edge_groups([[0, 1]], [(0, 1)]), (1,), torch.float32, timeout_s=30)
        if rank == 0:
            mailbox.send("a", (0, 1), torch.zeros(1))
            with pytest.raises(AssertionError, match="no event says"):
                mailbox.send("b", (0, 1), torch.zeros(1))
        else:
            mailbox.post("a", (0, 1))
            with pytest.raises(AssertionError, match="something is posted into its slot"):
                mailbox.post("b", (0, 1))
            received = mailbox.wait("a").requires_grad_()
            mailbox.post("b", (0, 1))
            assert received.data_ptr() == mailbox._received["b"][1].tensor.data_ptr()
            assert not mailbox._received["b"][1].tensor.requires_grad
        dist.barrier()
        if rank == 0:
            mailbox.drain()
            mailbox.send("b", (0, 1), torch.zeros(1))
        else:
            mailbox.wait("b")
        mailbox.drain()

    run_ranks(misuse, 2)


def through_host_first(rank):
    """(messages that went directly, is the result right) after each of three steps and an evaluation."""
    found = []
    programs = [compile(build("1f1b", 2, 6)), compile(build("1f1b", 2, 6, forward=True))]
    groups = edge_groups([[0, 1]], programs[0].edges())
    mailbox = CountingMailbox(groups, (ROWS, WIDTH), torch.float64, timeout_s=30, first_through_host=True)
    expected = reference(2, 6)[rank].grad
    made = 0
    for program in (programs[0], programs[0], programs[1], programs[0]):
        made = max(made, on_this_rank(program.receive_slots(), 1))
        forward = program.schedule.forward_only
        stage, mailbox.direct = ToyStage(rank, 2), 0
        mailbox.begin(forward)
        execute(program.instructions[rank], program.schedule.placement, {(0, rank): stage}, mailbox)
        right = torch.allclose(stage.grad, torch.zeros_like(expected) if forward else expected, rtol=1e-12)
        found.append((mailbox.direct, right))
        assert mailbox.buffers == made  # from the first step of a kind on
        assert bool(mailbox._on_host._sent or mailbox._on_host._received) == (len(found) in (1, 3))  # not kept longer
    return found


def test_the_first_step_of_a_kind_may_go_through_host_memory():
    first, second = run_ranks(through_host_first, 2)
    assert first == second == [(0, True), (6, True), (0, True), (6, True)]  # gradients, activations


class Place:
    """Of a stream of no device: it is come to when the test says so."""

    def __init__(self):
        self.reached = threading.Event()

    def synchronize(self):
        self.reached.wait()


def test_waits_of_the_device_are_counted_stream_by_stream():
    places = [(k % 3, Place()) for k in range(300)]
    marks = iter(places)
    waits = DeviceWaits(torch.device("cpu"), lambda: next(marks))
    for k in range(300):
        waits.add(str(k))
    assert waits.look() == (0, [str(k) for k in range(300)])

    def wait_until(finished, others):
        deadline = time.monotonic() + 20
        while waits.look() != (finished, others) and time.monotonic() < deadline:
            time.sleep(0.001)
        assert waits.look() == (finished, others)

    for k, (stream, place) in enumerate(places):
        if stream == 1 or k < 30:  # one stream comes through; the others stop
            place.reached.set()
    stopped = [str(k) for k, (stream, _) in enumerate(places) if stream != 1 and k >= 30]
    wait_until(300 - len(stopped), stopped)
    for _, place in places:
        place.reached.set()
    wait_until(300, [])


def test_groups_of_cuda_have_few_blocks_a_high_priority_and_a_way_through_host_memory(monkeypatch):
    """NCCL itself cannot be had here: what it is asked for."""
    made = []
    monkeypatch.setattr(dist, "get_rank", lambda: 2)
    monkeypatch.setattr(dist, "new_group", lambda ranks, **options: made.append((ranks, options)))
    edge_groups([[0, 1]], [(0, 1), (1, 0)], 7.0, "cuda")
    edge_groups([[0, 1]], [(0, 1)], 7.0)
    edge_groups([[0, 1]], [(0, 1)], 7.0, "cuda", message_blocks=3)
    monkeypatch.setenv("PIPEHC_MESSAGE_BLOCKS", "2")
    edge_groups([[0, 1]], [(0, 1)], 7.0, "cuda")
    (ranks, first), (_, second), (_, on_cpu), *others = made
    assert ranks == [0, 1] and first["backend"] == "cpu:gloo,cuda:nccl"
    assert on_cpu["backend"] == "gloo" and on_cpu["pg_options"] is None
    options = first["pg_options"]
    assert options is not second["pg_options"]  # torch writes the group's name into them
    assert options.is_high_priority_stream and options.config.max_ctas == 4
    assert [other["pg_options"].config.max_ctas for _, other in others] == [3, 2]
    # NCCL counts from the call, and the host is ahead of the device.
    assert options._timeout == first["timeout"] == timedelta(seconds=NCCL_LIMIT_S) and on_cpu["timeout"] == timedelta(seconds=7)
