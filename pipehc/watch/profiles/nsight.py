"""Reads what `nsys export --type sqlite` writes: all processes of one machine in one file."""

from __future__ import annotations

import sqlite3
from bisect import bisect_right
from collections import defaultdict
from contextlib import closing
from pathlib import Path

from pipehc.watch.profiles.kernels import RECOMPUTATION, Kernel, rank_of
from pipehc.watch.profiles.model import Rank


def read(path: Path, high: set[int]) -> list[Rank]:
    """One Rank per process and device. high: streams of high priority, besides those that the file says have one.

    Raises ValueError if the file holds no CUDA kernels.
    """
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
        tables = {name for (name,) in database.execute("select name from sqlite_master where type in ('table', 'view')")}
        if "CUPTI_ACTIVITY_KIND_KERNEL" not in tables:
            raise ValueError(f"{path}: holds no CUDA kernels; record with nsys profile --trace=cuda,nvtx")
        strings = dict(database.execute("select id, value from StringIds"))
        launches = _launches(database) if "CUPTI_ACTIVITY_KIND_RUNTIME" in tables else {}
        ranges = _recomputations(database, strings) if "NVTX_EVENTS" in tables else {}
        urgent = _urgent(database) if "TARGET_INFO_CUDA_STREAM" in tables else set()
        kernels: dict[tuple[int, int], list[Kernel]] = defaultdict(list)
        columns = "start, end, demangledName, streamId, correlationId, globalPid, deviceId"
        for start, end, name, stream, correlation, process, device in database.execute(
            f"select {columns} from CUPTI_ACTIVITY_KIND_KERNEL"
        ):
            launch = launches.get((process, correlation))
            recompute = launch is not None and _inside(ranges.get(launch[2], []), launch[0])
            launched = None if launch is None else launch[1] / 1e6
            kernels[process, device].append(Kernel(start / 1e6, end / 1e6, strings[name], stream, launched, recompute))
    return [
        rank_of(f"process {_pid(process)} device {device}", found, high | {s for p, s in urgent if p == _pid(process)})
        for (process, device), found in sorted(kernels.items())
    ]


def _launches(database: sqlite3.Connection) -> dict[tuple[int, int], tuple[int, int, int]]:
    """(process, correlation) -> (start, end, thread) of the call that launched a kernel."""
    rows = database.execute("select globalTid, correlationId, start, end from CUPTI_ACTIVITY_KIND_RUNTIME")
    # A global thread id is a global process id with the thread in its lower 24 bits.
    return {(thread & ~0xFFFFFF, correlation): (start, end, thread) for thread, correlation, start, end in rows}


def _recomputations(database: sqlite3.Connection, strings: dict[int, str]) -> dict[int, list[tuple[int, int]]]:
    """By thread: its ranges around recomputations, in order (they do not nest)."""
    found: dict[int, list[tuple[int, int]]] = defaultdict(list)
    rows = database.execute("select globalTid, start, end, text, textId from NVTX_EVENTS where end is not null order by start")
    for thread, start, end, text, text_id in rows:
        if RECOMPUTATION.fullmatch(text or strings.get(text_id, "")):
            found[thread].append((start, end))
    return found


def _inside(ranges: list[tuple[int, int]], time: int) -> bool:
    index = bisect_right(ranges, (time, 1 << 63)) - 1
    return index >= 0 and ranges[index][0] <= time < ranges[index][1]


def _urgent(database: sqlite3.Connection) -> set[tuple[int, int]]:
    """(process number, stream) of streams with a priority. CUDA: the lower, the more urgent; 0 is none."""
    return set(database.execute("select processId, streamId from TARGET_INFO_CUDA_STREAM where priority < 0"))


def _pid(process: int) -> int:
    return (process >> 24) & 0xFFFFFF
