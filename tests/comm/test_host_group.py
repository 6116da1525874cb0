"""Every collective through host memory gives what gloo gives, to the bit, and reads and fills tensors when it may."""

import os

import pytest
import torch
import torch.distributed as dist
from lazy_device import LazyDevice, Stream
from processes import run_ranks

from pipehc.comm import host_group, host_memory
from pipehc.comm.host_group import HOST, HostGroup, HostWork, register

RANKS = 3


def join(folder):
    register()
    rank = int(os.environ["RANK"])
    dist.init_process_group(HOST, store=dist.FileStore(str(folder / "store"), RANKS), rank=rank, world_size=RANKS)
    return dist.new_group(backend=HOST), dist.new_group(backend="gloo")


def numbers(rank, *shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(rank)).to(dtype)


def collectives(rank, group, dtype):
    """What each of them leaves in its results."""
    own, first = numbers(rank, 6, dtype=dtype), dist.get_process_group_ranks(group)[0]
    found = {}
    for name, op in (("sum", dist.ReduceOp.SUM), ("max", dist.ReduceOp.MAX)):
        found[name] = own.clone()
        dist.all_reduce(found[name], op, group)
    found["reduce"] = own.clone()
    dist.reduce(found["reduce"], first, group=group)
    if rank:
        del found["reduce"]  # nobody else is promised anything
    found["broadcast"] = own.clone()
    dist.broadcast(found["broadcast"], first, group)
    found["gather everywhere"] = [torch.empty_like(own) for _ in range(RANKS)]
    dist.all_gather(found["gather everywhere"], own, group)
    found["into one"] = own.new_empty(6 * RANKS)
    dist.all_gather_into_tensor(found["into one"], own, group)
    whole = own.new_empty(6 * RANKS)
    whole[6 * rank : 6 * rank + 6] = own
    dist.all_gather_into_tensor(whole, whole[6 * rank : 6 * rank + 6], group)
    found["in place"] = whole
    shared = numbers(rank, 4 * RANKS, dtype=dtype)
    found["scattered sums"] = own.new_empty(4)
    dist.reduce_scatter_tensor(found["scattered sums"], shared, group=group)
    dist.reduce_scatter_tensor(shared[4 * rank : 4 * rank + 4], shared, group=group)
    found["scattered sums in place"] = shared
    found["gather"] = [torch.empty_like(own) for _ in range(RANKS)] if rank == 0 else None
    dist.gather(own, found["gather"], first, group)
    found["scatter"] = torch.empty_like(own)
    dist.scatter(found["scatter"], [own + k for k in range(RANKS)] if rank == 0 else None, first, group)
    rows = numbers(rank, sum(range(1, RANKS + 1)), 2, dtype=dtype)
    found["all to all"] = rows.new_empty(RANKS * (rank + 1), 2)
    dist.all_to_all_single(found["all to all"], rows, [rank + 1] * RANKS, list(range(1, RANKS + 1)), group)
    with dist._coalescing_manager(group, async_ops=True) as several:
        found["several"] = [own.new_empty(6 * RANKS) for _ in range(2)]
        for result, factor in zip(found["several"], (1, 2)):
            dist.all_gather_into_tensor(result, own * factor, group)
    several.wait()
    objects = [None] * RANKS
    dist.all_gather_object(objects, {"rank": rank}, group)
    found["objects"] = objects
    found["passed on"] = torch.empty_like(own)
    sending = dist.isend(own, group=group, group_dst=(rank + 1) % RANKS)
    dist.recv(found["passed on"], group=group, group_src=(rank - 1) % RANKS)
    sending.wait()
    dist.barrier(group)
    return found


def assert_equal(found, expected, name):
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype and torch.equal(found, expected), name
    elif isinstance(expected, list):
        for a, b in zip(found, expected, strict=True):
            assert_equal(a, b, name)
    else:
        assert found == expected, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_collectives_equal_those_of_gloo(tmp_path, dtype):
    def compare(rank):
        through_host, gloo = join(tmp_path)
        assert isinstance(through_host, HostGroup) and isinstance(dist.group.WORLD, HostGroup) and dist.get_backend() == HOST
        assert through_host.size() == RANKS and through_host.rank() == rank
        found, expected = collectives(rank, through_host, dtype), collectives(rank, gloo, dtype)
        assert found.keys() == expected.keys() and len(found) >= 14
        for name in expected:
            assert_equal(found[name], expected[name], name)

    run_ranks(compare, RANKS, init=False)


def test_what_is_read_may_change_at_once_and_results_come_with_the_wait(tmp_path):
    def change(rank):
        group, _ = join(tmp_path)
        x, parts = torch.ones(4, requires_grad=True), torch.zeros(4 * RANKS)
        work = dist.all_gather_into_tensor(parts, x, group, async_op=True)
        with torch.no_grad():
            x.fill_(5)
        dist.barrier()
        assert parts.sum() == 0
        work.wait()
        assert parts.tolist() == [1] * 4 * RANKS and work.is_completed() and not parts.requires_grad
        parts.fill_(2)
        work.wait()  # a second wait copies nothing
        assert parts.tolist() == [2] * 4 * RANKS

    run_ranks(change, RANKS, init=False)


def test_a_group_of_part_of_the_world_and_a_lost_peer(tmp_path):
    def ask(rank):
        join(tmp_path)
        pair = dist.new_group([1, 2])
        if rank == 0:
            return None
        assert dist.get_backend(pair) == HOST and dist.get_process_group_ranks(pair) == [1, 2]
        if rank == 1:
            os._exit(0)
        with pytest.raises(RuntimeError):
            dist.all_reduce(torch.ones(1), group=pair)
        return "noticed"

    assert run_ranks(ask, RANKS, init=False)[2] == "noticed"


class Exchanged:
    waited = 0

    def wait(self):
        self.waited += 1


def test_streams_wait_for_the_copy_and_the_host_for_the_exchange_alone(monkeypatch):
    device, exchange = LazyDevice(monkeypatch), Exchanged()
    result, seen, second = device.tensor(0, 0), [], Stream()
    work = HostWork(exchange, [(torch.tensor([1, 2]), result)])
    first = device.current
    work.wait()
    device.read(result, seen)
    assert exchange.waited == 1 and seen == [] and result.tolist() == [0, 0]
    device.current = second
    work.wait()
    device.read(result, seen)
    second.run()  # waits for the first one's copy, not for all that follows
    assert exchange.waited == 1 and seen == [[1, 2]]
    first.run()
    assert seen == [[1, 2], [1, 2]]


def test_tensors_of_a_device_are_on_the_host_before_gloo_gets_them(monkeypatch):
    device, given = LazyDevice(monkeypatch), []
    monkeypatch.setattr(host_group, "host_memory", host_memory.host_memory)  # the device's own

    class Gloo:
        rank, size = (lambda self: 0), (lambda self: 1)

        def allreduce(self, tensors, options):
            given.append(tensors[0].tolist())
            tensors[0].mul_(2)
            return Exchanged()

        def allgather(self, results, tensors, options):
            given.append(tensors[0].tolist())
            results[0][0].copy_(tensors[0] + 1)
            return Exchanged()

    group, x, gathered = HostGroup(Gloo()), device.tensor(0, 0), device.tensor(0, 0)
    device.write(x, 3, 4)
    group.allreduce([x], None).wait()
    group.allgather([[gathered]], [x], None).wait()
    device.current.run()
    assert given == [[3, 4], [6, 8]] and x.tolist() == [6, 8] and gathered.tolist() == [7, 9]
