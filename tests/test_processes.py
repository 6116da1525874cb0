"""The helper that the other multi-process tests stand on."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
from processes import run_ranks


def test_results_come_in_rank_order_and_the_group_works():
    def fn(rank, offset):
        total = torch.tensor(float(rank + offset))
        dist.all_reduce(total)
        return rank, os.environ["RANK"], os.environ["WORLD_SIZE"], total.item()

    assert run_ranks(fn, 3, 10) == [(r, str(r), "3", 33.0) for r in range(3)]


def test_large_results_do_not_block():
    def fn(rank):
        return torch.full((4_000_000,), float(rank))

    results = run_ranks(fn, 2, init=False)
    assert [r.mean().item() for r in results] == [0.0, 1.0]


def test_without_init_a_rank_makes_its_own_group_from_the_environment():
    def fn(rank):
        assert not dist.is_initialized()
        dist.init_process_group("gloo")
        return dist.get_world_size()

    assert run_ranks(fn, 2, init=False) == [2, 2]


def test_autograd_works_in_children_after_the_parent_used_it():
    def gradient():
        x = torch.ones(300, 300, requires_grad=True)
        (x @ x).sum().backward()
        assert x.grad is not None
        return x.grad.sum().item()

    here = gradient()
    assert run_ranks(lambda rank: gradient(), 2) == [here, here]


def test_the_first_failing_rank_is_named_with_its_traceback_and_the_rest_are_killed():
    def fn(rank):
        if rank == 1:
            raise KeyError("the cause")
        dist.barrier()

    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"(?s)rank 1 failed.*KeyError: 'the cause'"):
        run_ranks(fn, 3)
    assert time.monotonic() - start < 20


def test_timeout_kills_and_shows_where_the_ranks_hang(tmp_path):
    def fn(rank):
        (tmp_path / str(rank)).write_text(str(os.getpid()))
        hang_here()

    def hang_here():
        time.sleep(600)

    with pytest.raises(TimeoutError, match=r"(?s)ranks \[0, 1\].*hang_here"):
        run_ranks(fn, 2, timeout=2, init=False)
    pids = [int(path.read_text()) for path in tmp_path.iterdir()]
    assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_death_by_signal_is_an_error_unless_expected():
    def fn(rank):
        if rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return "alive"

    assert run_ranks(fn, 2, init=False, may_die=[0]) == [None, "alive"]
    with pytest.raises(RuntimeError, match="rank 0 ended by signal 9"):
        run_ranks(fn, 2, init=False)


def test_death_by_a_fault_shows_where():
    def fn(rank):
        signal.raise_signal(signal.SIGSEGV)

    with pytest.raises(RuntimeError, match=r"(?s)rank 0 ended by signal 11.*Segmentation fault.*in fn"):
        run_ranks(fn, 1, init=False)
