"""Sets of points in time, as sorted lists of (start, end) that do not touch."""

from __future__ import annotations

from collections.abc import Iterable

Interval = tuple[float, float]


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Merges what overlaps or touches; empty ones are dropped."""
    result: list[Interval] = []
    for start, end in sorted(intervals):
        if end <= start:
            continue
        if result and start <= result[-1][1]:
            result[-1] = result[-1][0], max(result[-1][1], end)
        else:
            result.append((start, end))
    return result


def length(intervals: Iterable[Interval]) -> float:
    """Total length of what `union` made."""
    return sum(end - start for start, end in intervals)


def minus(a: list[Interval], b: list[Interval]) -> list[Interval]:
    """The part of `a` that is not in `b`; both made by `union`."""
    result: list[Interval] = []
    first = 0
    for start, end in a:
        while first < len(b) and b[first][1] <= start:
            first += 1
        k = first
        while k < len(b) and b[k][0] < end:
            if b[k][0] > start:
                result.append((start, b[k][0]))
            start = max(start, b[k][1])
            k += 1
        if start < end:
            result.append((start, end))
    return result


def common(a: list[Interval], b: list[Interval]) -> list[Interval]:
    """The part of `a` that is in `b`; both made by `union`."""
    return minus(a, minus(a, b))
