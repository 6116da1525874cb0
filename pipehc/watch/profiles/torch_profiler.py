"""Reads Chrome traces of torch.profiler: one file a rank, with one or more GPUs and steps."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pipehc.watch.profiles.files import number, whole
from pipehc.watch.profiles.intervals import Interval, union
from pipehc.watch.profiles.kernels import RECOMPUTATION, Kernel, rank_of
from pipehc.watch.profiles.model import Hints, Rank
from pipehc.watch.profiles.names import communicates
from pipehc.watch.profiles.steps import outside, windows

# Categories in lower case, as profilers of all ages write them.
_WORK = {"kernel": "compute", "gpu_memcpy": "copy", "memcpy": "copy", "gpu_memset": "copy", "memset": "copy"}
_CALLS = ("cuda_runtime", "cuda_driver", "runtime", "driver")
_PEER = re.compile(r"PtoP|P2P|Peer", re.IGNORECASE)
_STEP = re.compile(r"ProfilerStep#(\d+)")

Device = tuple[str, int]  # what traces call its process, and its number there


def read(path: Path, data: dict | list, hints: Hints) -> list[Rank]:
    """A row per device and step. data: the file's JSON, an object with traceEvents or the list of events itself.

    A trace with ProfilerStep ranges is cut at them. Events that cannot be read are left out, and counted in the notes. Raises
    ValueError, naming the file, if nothing is left.
    """
    events = data.get("traceEvents") if isinstance(data, dict) else data
    if not isinstance(events, list):
        raise ValueError(f"{path}: its traceEvents are no list, but {type(events).__name__}")
    trace = _Trace(events, hints)
    if not trace.kernels:
        left_out = f" ({trace.left_out()})" if trace.odd else ""
        raise ValueError(f"{path}: holds no GPU kernels that can be read{left_out}; record with CUDA activities")
    info = data.get("distributedInfo") if isinstance(data, dict) else None
    number_ = whole(info.get("rank")) if isinstance(info, dict) else None
    name = path.name if number_ is None else f"rank {number_}"
    ranks = []
    for device, kernels in sorted(trace.kernels.items(), key=lambda item: item[0][::-1]):
        title = f"{name}{trace.title(device)}"
        notes = [f"{name}: left out: {trace.left_out()}"] if trace.odd else []
        urgent = hints.high | trace.high[device]
        steps = windows(kernels, trace.steps(device))
        if not steps:
            ranks.append(rank_of(title, kernels, urgent, notes=notes))
            continue
        beyond = outside(kernels, steps)
        if beyond > 0:
            notes.append(f"{title}: left out: {beyond:.1f} ms of work outside of every ProfilerStep")
        ranks += [rank_of(f"step {step} {title}", kernels, urgent, window, step, notes) for step, window in steps.items()]
    return ranks


class _Trace:
    """kernels: by device. high: its streams of high priority. odd: why events were left out, and how many."""

    def __init__(self, events: list[Any], hints: Hints) -> None:
        self.kernels: dict[Device, list[Kernel]] = defaultdict(list)
        self.high: dict[Device, set[int]] = defaultdict(set)
        self.odd: Counter[str] = Counter()
        self._hints = hints
        self._host_steps: dict[int, Interval] = {}
        self._device_steps: dict[int, Interval] = {}
        whole_events = [event for event in events if isinstance(event, dict)]
        if len(whole_events) < len(events):
            self.odd["not an object"] = len(events) - len(whole_events)
        complete = [event for event in whole_events if event.get("ph") == "X"]
        # Times since the first event: of those since 1970, a float has no fractions of a microsecond left.
        self._zero = min((t for t in (number(event.get("ts")) for event in complete) if t is not None), default=0.0)
        self._launches = self._read_launches(complete)
        self._recomputations = self._read_ranges(complete)
        for event in complete:
            if (kind := _WORK.get(_category(event))) is not None:
                self._add(event, kind)  # type: ignore[arg-type]

    def left_out(self) -> str:
        return ", ".join(f"{count} {'event' if count == 1 else 'events'} {why}" for why, count in sorted(self.odd.items()))

    def title(self, device: Device) -> str:
        """Names a device as far as there is another to tell it from."""
        process, number_ = device
        if len(self.kernels) == 1:
            return ""
        same = sum(other[1] == number_ for other in self.kernels)
        return f" device {number_}" if same == 1 else f" process {process} device {number_}"

    def steps(self, device: Device) -> dict[int, Interval]:
        """Of the host if any launch is known, else as the device's own annotations say."""
        launched = any(kernel.launched is not None for kernel in self.kernels[device])
        first, second = self._host_steps, self._device_steps
        return (first or second) if launched else (second or first)

    def _ms(self, microseconds: float) -> float:
        return (microseconds - self._zero) / 1000

    def _read_launches(self, events: list[dict]) -> dict[str, tuple[float, float, str]]:
        """Correlation -> start, end and thread of the call. A call without duration ended at once, for all that is known."""
        found = {}
        for event in events:
            correlation, start = _arguments(event).get("correlation"), number(event.get("ts"))
            if _category(event) in _CALLS and correlation is not None and start is not None:
                end = start + max(0.0, number(event.get("dur")) or 0.0)
                found[str(correlation)] = self._ms(start), self._ms(end), str(event.get("tid"))
        return found

    def _read_ranges(self, events: list[dict]) -> Mapping[str, list[Interval]]:
        """By thread: its recomputations, in order. Notes the steps on the way."""
        found: dict[str, list[Interval]] = defaultdict(list)
        for event in events:
            category, name = _category(event), str(event.get("name"))
            start, duration = number(event.get("ts")), number(event.get("dur"))
            if start is None or category in _WORK:
                continue
            end = self._ms(start + duration) if duration is not None and duration >= 0 else float("inf")
            if step := _STEP.fullmatch(name):
                steps = self._device_steps if category.startswith("gpu") else self._host_steps
                before = steps.get(int(step[1]), (float("inf"), 0.0))
                steps[int(step[1])] = min(self._ms(start), before[0]), max(end, before[1])
            elif category == "user_annotation" and RECOMPUTATION.fullmatch(name) and end < float("inf"):
                found[str(event.get("tid"))].append((self._ms(start), end))
        return {thread: union(ranges) for thread, ranges in found.items()}

    def _add(self, event: dict, kind: Literal["compute", "copy"]) -> None:
        arguments, name = _arguments(event), str(event.get("name"))
        start, duration, stream = number(event.get("ts")), number(event.get("dur")), whole(arguments.get("stream"))
        if start is None:
            return self._leave_out("without a time")
        if "dur" not in event:
            return self._leave_out("without a duration")
        if duration is None or duration < 0:
            return self._leave_out("with a duration that is none")
        if stream is None:
            return self._leave_out("without a stream")
        device = next(
            (d for d in map(whole, (arguments.get("device"), arguments.get("inDevice"), event.get("pid"))) if d is not None), 0
        )
        key = str(event.get("pid")), device
        launch = self._launches.get(str(arguments.get("correlation")))
        inside = self._recomputations.get(launch[2], []) if launch else []
        index = bisect_right(inside, (launch[0], float("inf"))) - 1 if launch else -1
        recompute = launch is not None and index >= 0 and launch[0] < inside[index][1]
        if (whole(arguments.get("priority")) or 0) < 0:  # CUDA: the lower, the more urgent
            self.high[key].add(stream)
        message = communicates(name, self._hints.communication) if kind == "compute" else self._between_devices(name, arguments)
        begin, end = self._ms(start), self._ms(start + duration)
        launched = launch[1] if launch else None
        self.kernels[key].append(Kernel(begin, end, name, stream, launched, recompute, "message" if message else kind))
        return None

    def _between_devices(self, name: str, arguments: dict) -> bool:
        ends = whole(arguments.get("fromDevice")), whole(arguments.get("toDevice"))
        own = self._hints.communication
        return bool(_PEER.search(name) or (None not in ends and ends[0] != ends[1]) or (own and own.search(name)))

    def _leave_out(self, why: str) -> None:
        self.odd[why] += 1


def _category(event: dict) -> str:
    return str(event.get("cat")).lower()


def _arguments(event: dict) -> dict:
    arguments = event.get("args")
    return arguments if isinstance(arguments, dict) else {}
