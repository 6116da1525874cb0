"""Reads what `nsys export --type sqlite` writes: all processes of one machine in one file."""

from __future__ import annotations

import sqlite3
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

from pipehc.watch.profiles.files import number, whole
from pipehc.watch.profiles.kernels import RECOMPUTATION, Kernel, rank_of
from pipehc.watch.profiles.model import Hints, Rank
from pipehc.watch.profiles.names import communicates

_WORK: dict[str, Literal["compute", "copy"]] = {
    "CUPTI_ACTIVITY_KIND_KERNEL": "compute",
    "CUPTI_ACTIVITY_KIND_GRAPH_TRACE": "compute",  # a whole CUDA graph, of which no kernel is known
    "CUPTI_ACTIVITY_KIND_MEMCPY": "copy",
    "CUPTI_ACTIVITY_KIND_MEMSET": "copy",
}
_COLUMNS = ("start", "end", "streamId", "correlationId", "globalPid", "deviceId")
_NAMES = ("demangledName", "shortName", "copyKind", "srcDeviceId", "dstDeviceId")
_COPIES = {1: "HtoD", 2: "DtoH", 8: "DtoD", 9: "HtoH", 10: "PtoP"}


def read(path: Path, hints: Hints) -> list[Rank]:
    """One Rank per process and device. Streams of high priority are those of the hints, and those that the file says have one.

    Rows that cannot be read are left out, and counted in the notes. Raises ValueError if the file holds no work of a GPU,
    sqlite3.Error if it is no database.
    """
    odd: Counter[str] = Counter()
    kernels: dict[tuple[int, int], list[Kernel]] = defaultdict(list)
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as database:
        tables = {name for (name,) in database.execute("select name from sqlite_master where type in ('table', 'view')")}
        if not tables & set(_WORK):
            raise ValueError(f"{path}: holds no CUDA kernels; record with nsys profile --trace=cuda,nvtx")
        strings = {key: str(value) for key, value in _rows(database, tables, "StringIds", "id", "value")}
        launches = _launches(database, tables)
        ranges = _recomputations(database, tables, strings)
        urgent = _urgent(database, tables)
        for table, kind in _WORK.items():
            for row in _rows(database, tables, table, *_COLUMNS, *_NAMES):
                start, end = number(row[0]), number(row[1])
                stream, correlation, process, device = map(whole, row[2:6])
                if start is None or end is None or end < start:
                    odd["without a time"] += 1
                    continue
                if stream is None or device is None:
                    odd["without a stream or a device"] += 1
                    continue
                name = _name(table, row[6:], strings)
                message = communicates(name, hints.communication) if kind == "compute" else _between_devices(name, row[8:], hints)
                launch = None if correlation is None else launches.get((process or 0, correlation))
                recompute = launch is not None and _inside(ranges.get(launch[2], []), launch[0])
                launched = None if launch is None else launch[1] / 1e6
                found = Kernel(start / 1e6, end / 1e6, name, stream, launched, recompute, "message" if message else kind)
                kernels[process or 0, device].append(found)
                if table.endswith("GRAPH_TRACE"):
                    odd["of whole CUDA graphs counted as computation: record with --cuda-graph-trace=node"] += 1
    said = f"{path.name}: rows {', '.join(f'{why} ({count})' for why, count in odd.items())}"
    if not kernels:
        raise ValueError(f"{said if odd else path}: holds no CUDA kernels; record with nsys profile --trace=cuda,nvtx")
    return [
        rank_of(
            f"process {_pid(process)} device {device}",
            found,
            hints.high | {s for p, s in urgent if p == _pid(process)},
            notes=[said] if odd else [],
        )
        for (process, device), found in sorted(kernels.items())
    ]


def _rows(database: sqlite3.Connection, tables: set[str], table: str, *columns: str) -> Iterator[tuple[Any, ...]]:
    """Rows of a table; a column that this version of the export has not is None, a table that it has not is empty."""
    if table not in tables:
        return iter(())
    there = {row[1] for row in database.execute(f"pragma table_info({table})")}
    wanted = ", ".join(f'"{column}"' if column in there else "null" for column in columns)
    return database.execute(f"select {wanted} from {table}")


def _name(table: str, columns: tuple[Any, ...], strings: dict[int, str]) -> str:
    if table.endswith("KERNEL"):
        return strings.get(columns[0]) or strings.get(columns[1]) or "a kernel without name"
    if table.endswith("MEMCPY"):
        return f"Memcpy {_COPIES.get(columns[2], f'of kind {columns[2]}')}"
    return "Memset" if table.endswith("MEMSET") else "a CUDA graph"


def _between_devices(name: str, columns: tuple[Any, ...], hints: Hints) -> bool:
    source, target = map(whole, columns[1:])
    peers = name.endswith("DtoD") and None not in (source, target) and source != target
    own = hints.communication
    return name.endswith("PtoP") or peers or bool(own and own.search(name))


def _launches(database: sqlite3.Connection, tables: set[str]) -> dict[tuple[int, int], tuple[float, float, int]]:
    """(process, correlation) -> (start, end, thread) of the call that launched a kernel."""
    found = {}
    for row in _rows(database, tables, "CUPTI_ACTIVITY_KIND_RUNTIME", "globalTid", "correlationId", "start", "end"):
        thread, correlation, start, end = whole(row[0]), whole(row[1]), number(row[2]), number(row[3])
        if thread is not None and correlation is not None and start is not None:
            # A global thread id is a global process id with the thread in its lower 24 bits.
            found[thread & ~0xFFFFFF, correlation] = start, start if end is None else end, thread
    return found


def _recomputations(
    database: sqlite3.Connection, tables: set[str], strings: dict[int, str]
) -> dict[int, list[tuple[float, float]]]:
    """By thread: its ranges around recomputations, in order (they do not nest)."""
    found: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for row in _rows(database, tables, "NVTX_EVENTS", "globalTid", "start", "end", "text", "textId"):
        thread, start, end = whole(row[0]), number(row[1]), number(row[2])
        if None not in (thread, start, end) and RECOMPUTATION.fullmatch(str(row[3] or strings.get(row[4], ""))):
            found[thread].append((start, end))  # type: ignore[index, arg-type]
    return {thread: sorted(ranges) for thread, ranges in found.items()}


def _inside(ranges: list[tuple[float, float]], time: float) -> bool:
    index = bisect_right(ranges, (time, float("inf"))) - 1
    return index >= 0 and ranges[index][0] <= time < ranges[index][1]


def _urgent(database: sqlite3.Connection, tables: set[str]) -> set[tuple[Any, Any]]:
    """(process number, stream) of streams with a priority. CUDA: the lower, the more urgent; 0 is none."""
    rows = _rows(database, tables, "TARGET_INFO_CUDA_STREAM", "processId", "streamId", "priority")
    return {(process, stream) for process, stream, priority in rows if (whole(priority) or 0) < 0}


def _pid(process: int) -> int:
    return (process >> 24) & 0xFFFFFF
