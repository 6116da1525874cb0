"""Cuts what one GPU did into the steps that its host went through."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence

from pipehc.watch.profiles.intervals import Interval, length, minus, union
from pipehc.watch.profiles.kernels import Kernel


def windows(kernels: Sequence[Kernel], ranges: Mapping[int, Interval]) -> dict[int, Interval]:
    """Step -> when the device was at it: from the first kernel of the step to that of the next, the last to its last kernel's end.

    ranges: step -> when it was the host's, on the clock of `Kernel.launched`. A kernel is of the step in which it was launched, or
    ran, where no launch is known. Copies may be made ahead, on a stream of their own: they begin no step that has anything else.
    """
    order = sorted(ranges, key=lambda step: ranges[step])
    starts = [ranges[step][0] for step in order]
    members: dict[int, list[Kernel]] = {}
    for kernel in kernels:
        time = kernel.start if kernel.launched is None else kernel.launched
        index = bisect_right(starts, time) - 1
        if index >= 0 and (index + 1 < len(order) or time <= ranges[order[index]][1]):
            members.setdefault(order[index], []).append(kernel)
    found: list[tuple[int, float]] = []
    for step in (step for step in order if step in members):
        begin = min(k.start for k in ([k for k in members[step] if k.kind == "compute"] or members[step]))
        found.append((step, max(begin, found[-1][1]) if found else begin))
    ends = [begin for _, begin in found[1:]] + ([max(k.end for k in members[found[-1][0]])] if found else [])
    return {step: (begin, max(begin, end)) for (step, begin), end in zip(found, ends)}


def outside(kernels: Sequence[Kernel], steps: Mapping[int, Interval]) -> float:
    """How long the device was busy outside of all steps."""
    return length(minus(union((k.start, k.end) for k in kernels), union(steps.values())))
