"""Reads Chrome traces of torch.profiler: one file a rank, plain or gzipped."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from pipehc.watch.profiles.intervals import Interval
from pipehc.watch.profiles.kernels import RECOMPUTATION, Kernel, rank_of
from pipehc.watch.profiles.model import Rank


def load(path: Path) -> Any:
    """The JSON of a file that may be gzipped."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else open(path, encoding="utf-8") as file:
        return json.load(file)


def read(path: Path, high: set[int]) -> list[Rank]:
    """The one rank of the file. high: streams of high priority, besides those whose kernels say so."""
    data = load(path)
    events = [event for event in data["traceEvents"] if event.get("ph") == "X"]
    launches = {
        event["args"]["correlation"]: event
        for event in events
        if event.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in event.get("args", {})
    }
    ranges: dict[Any, list[Interval]] = {}
    for event in events:
        if event.get("cat") == "user_annotation" and RECOMPUTATION.fullmatch(event["name"]):
            ranges.setdefault(event["tid"], []).append((event["ts"], event["ts"] + event["dur"]))
    kernels = []
    for event in events:
        if event.get("cat") != "kernel":
            continue
        arguments = event["args"]
        launch = launches.get(arguments.get("correlation"))
        recompute = launch is not None and any(start <= launch["ts"] < end for start, end in ranges.get(launch["tid"], ()))
        if arguments.get("priority", 0) < 0:  # CUDA: the lower, the more urgent
            high = high | {arguments["stream"]}
        launched = None if launch is None else _ms(launch["ts"] + launch["dur"])
        start, end = _ms(event["ts"]), _ms(event["ts"] + event["dur"])
        kernels.append(Kernel(start, end, event["name"], arguments["stream"], launched, recompute))
    rank = data.get("distributedInfo", {}).get("rank")
    return [rank_of(path.name if rank is None else f"rank {rank}", kernels, high)]


def _ms(microseconds: float) -> float:
    return microseconds / 1000
