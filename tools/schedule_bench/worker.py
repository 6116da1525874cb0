"""One rank of `bench_schedules`: sets up every scheduler, then times their steps in turn."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))

from schedule_bench.contenders import Contender, Job, Ours
from schedule_bench.sleeping import Work

from pipehc.schedules import Costs, Schedule, simulate


def main(job_file: str, rank: int) -> None:
    options = json.loads(Path(job_file).read_text())
    torch.set_num_threads(1)
    ranks = options["ranks"]
    store = dist.FileStore(options["store"], ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=options["timeout"]))
    work = Work(options["f"] / 1e3, options["b"] / 1e3, options["w"] / 1e3, options["bytes"])
    job = Job(rank, ranks, options["microbatches"], work, {"dualpipe": options["dualpipe_source"]})
    contenders = {name: _set_up(name, job, options["schedules"]) for name in options["names"]}
    if options["realtime"]:
        # After the imports: they would keep every other process off the machine for seconds. All threads: gloo has its own.
        for thread in os.listdir("/proc/self/task"):
            os.sched_setscheduler(int(thread), os.SCHED_FIFO, os.sched_param(1))
    transfer = transfer_ms(job)
    steps: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(1 + options["rounds"]):
        for name, contender in contenders.items():
            took = timed_step(contender, job)
            if number:
                steps[name].append(took)
    if rank == 0:
        costs = Costs(f=options["f"], b=options["b"], w=options["w"], link=transfer)
        keys = ("ranks", "microbatches", "f", "b", "w", "bytes", "link_ms", "rounds")
        result: dict[str, Any] = {"transfer_ms": transfer} | {key: options[key] for key in keys}
        result["schedulers"] = [
            {"name": name, "median": statistics.median(steps[name]), "steps": steps[name], "theory": theory(contender, costs)}
            for name, contender in contenders.items()
        ]
        Path(options["result"]).write_text(json.dumps(result))
    dist.barrier()


def timed_step(contender: Contender, job: Job) -> float:
    """Milliseconds from the first rank's start to the last rank's end (one clock: all ranks are on this machine)."""
    contender.prepare()
    dist.barrier()
    start = time.monotonic()
    contender.step()
    end = time.monotonic()
    for chain in contender.chains:
        chain.check_step(job.microbatches // contender.replicas)
    everyone: list[tuple[float, float]] = [(0.0, 0.0)] * job.ranks
    dist.all_gather_object(everyone, (start, end))
    return 1e3 * (max(end for _, end in everyone) - min(start for start, _ in everyone))


def transfer_ms(job: Job) -> float:
    """How long a message from rank 0 to rank 1 takes, with its acknowledgement: median of 7."""
    message, answer, times = job.work.message(0, 0), torch.zeros(1), []
    for _ in range(8):
        dist.barrier()
        start = time.monotonic()
        if job.rank == 0:
            dist.send(message, 1)
            dist.recv(answer, 1)
        elif job.rank == 1:
            dist.recv(message, 0)
            dist.send(answer, 0)
        times.append(1e3 * (time.monotonic() - start))
    return statistics.median(times[1:])


def theory(contender: Contender, costs: Costs) -> float | None:
    program = contender.theory()
    return None if program is None else simulate(program, costs).makespan


def _set_up(name: str, job: Job, files: dict[str, str]) -> Contender:
    if name in files:
        return Ours(job, Schedule.from_csv(files[name]))
    from schedule_bench.rivals import set_up

    return set_up(name, job)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
    sys.stdout.flush()
    # Not sys.exit: rivals leave threads and groups behind that may block it.
    os._exit(0)
