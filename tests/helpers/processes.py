"""Tests over real processes: fork one child per rank, run a function in each, collect the results.

Forking shares the parent's imports of torch and Megatron, so a test over four processes costs a fraction of a second to
start. It asks that the parent has no thread pool and no CUDA context: conftest.py sets one compute thread, and tests that
use a GPU belong in the children.
"""

import faulthandler
import gc
import os
import pickle
import random
import signal
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import timedelta
from multiprocessing import connection, get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def run_ranks(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 120.0,
    init: bool = True,
    group_timeout: float | None = None,
    may_die: Collection[int] = (),
) -> list[Any]:
    """Run ``fn(rank, *args)`` in `world_size` forked processes; return their (picklable) results in the order of ranks.

    Each child has RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT as torchrun would set them. Unless `init` is
    false, the default gloo group exists while `fn` runs; its collectives give up after `group_timeout` seconds (default:
    half of `timeout`). `fn` may be a closure: nothing is pickled on the way in.

    Raises RuntimeError with the child's traceback when one fails (the others are killed), TimeoutError with the stacks of
    the ranks still running after `timeout` seconds. Ranks in `may_die` may end by a signal; their result is then None.
    """
    context = get_context("fork")
    with tempfile.TemporaryDirectory(prefix="run_ranks-") as name:
        folder, port = Path(name), free_port()

        def child(rank: int) -> None:
            _run_child(fn, rank, world_size, args, folder, port, group_timeout or timeout / 2 if init else None)

        processes = [context.Process(target=child, args=(rank,), daemon=True) for rank in range(world_size)]
        try:
            for process in processes:
                process.start()
            _wait(processes, folder, timeout, may_die)
        finally:
            for process in processes:
                if process.pid is not None:
                    process.kill()
                    process.join()
        return [_result(folder, rank) for rank in range(world_size)]


def _run_child(
    fn: Callable[..., Any], rank: int, world_size: int, args: tuple, folder: Path, port: int, group_timeout: float | None
) -> None:
    stacks = open(folder / f"{rank}.stacks", "w")  # noqa: SIM115 (must stay open for the signal handler)
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    faulthandler.enable(file=stacks, all_threads=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the parent, which kills us
    torch.set_num_threads(1)
    gc.freeze()  # a collection would look at all that the parent imported, and copy every page of it
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the machine's host name need not resolve
    try:
        if group_timeout is not None:
            store = dist.FileStore(str(folder / "rendezvous"), world_size)
            limit = timedelta(seconds=group_timeout)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=limit)
        _write(folder / f"{rank}.result", pickle.dumps(fn(rank, *args)))
        if dist.is_initialized():
            dist.destroy_process_group()
    except BaseException:
        # Not re-raised: exiting at once closes the sockets before the peers can blame this rank in a longer traceback.
        _write(folder / f"{rank}.error", traceback.format_exc().encode())
        os._exit(1)


def _wait(processes: Sequence[BaseProcess], folder: Path, timeout: float, may_die: Collection[int]) -> None:
    deadline = time.monotonic() + timeout
    running: dict[int, BaseProcess] = dict(enumerate(processes))
    while running:
        connection.wait([p.sentinel for p in running.values()], max(0.0, deadline - time.monotonic()))
        for rank, process in list(running.items()):
            if process.exitcode is None:
                continue
            del running[rank]
            if process.exitcode != 0 and not (process.exitcode < 0 and rank in may_die):
                raise RuntimeError(_first_failure(processes, folder, may_die))
        if running and time.monotonic() >= deadline:
            raise TimeoutError(f"ranks {sorted(running)} still run after {timeout:g} s\n{_stacks(running, folder)}")


def _first_failure(processes: Sequence[BaseProcess], folder: Path, may_die: Collection[int]) -> str:
    """The cause rather than its echoes: ranks that died by a signal, else the first traceback to be written."""
    codes = [(rank, process.exitcode or 0) for rank, process in enumerate(processes)]
    killed = [
        f"rank {rank} ended by signal {-code}\n{_written_stacks(folder, rank)}"
        for rank, code in codes
        if code < 0 and rank not in may_die
    ]
    errors = sorted(folder.glob("*.error"), key=lambda path: path.stat().st_mtime_ns)
    first = [f"rank {path.stem} failed:\n{path.read_text()}" for path in errors[:1]]
    exited = [f"rank {rank} exited with {code}" for rank, code in codes if code > 0]
    return "\n".join(killed + first or exited)


def _stacks(running: Mapping[int, BaseProcess], folder: Path) -> str:
    for process in running.values():
        assert process.pid is not None
        os.kill(process.pid, signal.SIGUSR1)
    time.sleep(0.5)
    return "\n".join(f"rank {rank}:\n{_written_stacks(folder, rank)}" for rank in running)


def _written_stacks(folder: Path, rank: int) -> str:
    """Nothing for one that ended before it could write."""
    path = folder / f"{rank}.stacks"
    return path.read_text() if path.exists() else ""


def _result(folder: Path, rank: int) -> Any:
    path = folder / f"{rank}.result"
    return pickle.loads(path.read_bytes()) if path.exists() else None


def _write(path: Path, data: bytes) -> None:
    partial = path.with_suffix(".partial")
    partial.write_bytes(data)
    partial.rename(path)


def free_port() -> int:
    """A port below the range that the kernel hands out by itself, so that no other connection can take it meanwhile."""
    for port in random.SystemRandom().sample(range(20000, 32000), 100):
        with socket.socket() as s:
            try:
                s.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError("no free port among 100 tried in 20000..31999")
