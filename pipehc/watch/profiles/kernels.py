"""What a GPU's kernels tell: which of them communicate, what they hide, and what nothing hides."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from typing import Literal, NamedTuple

from pipehc.watch.profiles.intervals import Interval, common, length, minus, union
from pipehc.watch.profiles.model import Loss, Messages, Rank
from pipehc.watch.profiles.names import doubtful, short

# The ranges that pipehc.watch.markers.Markers opens around a recomputation: "Run 2R7", "Run 2R7@1".
RECOMPUTATION = re.compile(r"Run \d+R\d+(@\d+)?")


class Kernel(NamedTuple):
    """Times in ms. launched: when the host had issued it, if known. recompute: inside a recomputation. kind: a message also is a
    copy between devices, a copy also a memset."""

    start: float
    end: float
    name: str
    stream: int
    launched: float | None = None
    recompute: bool = False
    kind: Literal["compute", "message", "copy"] = "compute"


def rank_of(
    name: str,
    kernels: Sequence[Kernel],
    high: Collection[int],
    window: Interval | None = None,
    step: int | None = None,
    notes: Sequence[str] = (),
) -> Rank:
    """The figures of one device over `window`, or from its first kernel to its last. high: its high-priority streams.

    A kernel that communicates cannot show whether bytes move or the peer is not ready, so `exposed` has both. High-priority work
    counts as ready when it is launched and its stream is free; that it may also wait for an event makes high_delay an upper bound.
    """
    everything = sorted(kernels)
    start, end = window or (everything[0].start, max(kernel.end for kernel in everything))
    if window is None:
        kernels = everything
    else:
        kernels = [
            k._replace(start=max(k.start, start), end=min(k.end, end)) for k in everything if k.end > start and k.start < end
        ]
    work = [kernel for kernel in kernels if kernel.kind == "compute"]
    messages = [kernel for kernel in kernels if kernel.kind == "message"]
    copies = [kernel for kernel in kernels if kernel.kind == "copy"]
    busy, moving = union(_times(work)), union(_times(messages))
    exposed = minus(moving, busy)
    copying = minus(minus(union(_times(copies)), busy), moving)
    recompute = union(_times([kernel for kernel in work if kernel.recompute]))
    hidden = common(recompute, moving)
    delay = _delay(kernels, high)

    lost: dict[str, float] = defaultdict(float)
    for title, own in _by_name(messages + copies).items():
        beside = busy if own[0].kind == "message" else union(busy + moving)
        lost[f"{title} ran with nothing to compute beside it"] += length(minus(union(_times(own)), beside))
    starts = [kernel.start for kernel in everything]
    for begin, stop in minus(minus(minus([(start, end)], busy), moving), copying):
        index = bisect_left(starts, stop)
        why = _cause(everything[index], begin) if index < len(everything) else "nothing was launched any more"
        lost[f"the device was idle: {why}"] += stop - begin
    lost["recomputation ran with no message under way"] = length(recompute) - length(hidden)
    lost["high-priority work was ready, but stood behind other work"] = delay
    return Rank(
        name=name,
        total=end - start,
        compute=length(busy),
        communication=length(moving),
        exposed=length(exposed),
        copies=length(copying),
        recompute=length(recompute),
        hidden=length(hidden),
        high_delay=delay,
        losses=tuple(Loss(ms, why) for why, ms in lost.items()),
        step=step,
        messages=_summary(messages),
        notes=(*notes, *_doubts(work, end - start)),
    )


def _cause(following: Kernel, since: float) -> str:
    """Why the device was idle before a kernel."""
    if following.launched is None:
        return f"{short(following.name)} had not begun, and the trace does not say when it was launched"
    late = following.launched > since
    return f"the host launched {short(following.name)} late" if late else f"{short(following.name)} waited for an event"


def _delay(kernels: Sequence[Kernel], high: Collection[int]) -> float:
    """How long kernels of `high` streams were ready while other streams computed."""
    others = union(_times([k for k in kernels if k.stream not in high and k.kind == "compute"]))
    free: dict[int, float] = {}
    ready: list[Interval] = []
    for kernel in kernels:
        if kernel.stream in high and kernel.launched is not None:
            ready.append((max(kernel.launched, free.get(kernel.stream, kernel.launched)), kernel.start))
        free[kernel.stream] = kernel.end
    return length(common(union(ready), others))


def _by_name(kernels: Sequence[Kernel]) -> dict[str, list[Kernel]]:
    found: dict[str, list[Kernel]] = defaultdict(list)
    for kernel in kernels:
        found[short(kernel.name)].append(kernel)
    return found


def _summary(messages: Sequence[Kernel]) -> tuple[Messages, ...]:
    found = [Messages(name, len(own), length(union(_times(own)))) for name, own in _by_name(messages).items()]
    return tuple(sorted(found, key=lambda m: -m.ms))


def _doubts(work: Sequence[Kernel], total: float) -> list[str]:
    """Names the computations that may be communication, if they took a thousandth of the step."""
    times: Counter[str] = Counter()
    for kernel in work:
        if doubtful(kernel.name):
            times[short(kernel.name)] += kernel.end - kernel.start  # type: ignore[assignment]
    found = [f"{name} ({ms:.1f} ms)" for name, ms in times.most_common(3) if ms >= 0.001 * total and ms > 0]
    return [f"counted as computation, though it may be communication (--communication REGEX): {', '.join(found)}"] if found else []


def _times(kernels: Sequence[Kernel]) -> list[Interval]:
    return [(kernel.start, kernel.end) for kernel in kernels]
