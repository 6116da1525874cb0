"""What a GPU's kernels tell: which of them communicate, what they hide, and what nothing hides."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Collection, Sequence
from typing import NamedTuple

from pipehc.watch.profiles.intervals import common, length, minus, union
from pipehc.watch.profiles.model import Loss, Rank

COMMUNICATION = re.compile(r"nccl|nvshmem|deep_?ep|(internode|intranode).*(dispatch|combine)", re.IGNORECASE)
# The ranges that pipehc.watch.trace.Markers opens around a recomputation: "Run 2R7", "Run 2R7@1".
RECOMPUTATION = re.compile(r"Run \d+R\d+(@\d+)?")


class Kernel(NamedTuple):
    """Times in ms. launched: when the host had issued it, if known. recompute: inside a recomputation."""

    start: float
    end: float
    name: str
    stream: int
    launched: float | None = None
    recompute: bool = False


def rank_of(name: str, kernels: Sequence[Kernel], high: Collection[int]) -> Rank:
    """The figures of one device, from its first kernel to its last. high: its high-priority streams.

    A kernel that communicates cannot show whether bytes move or the peer is not ready, so `exposed` has both. High-priority work
    counts as ready when it is launched and its stream is free; that it may also wait for an event makes high_delay an upper bound.
    Raises ValueError if there are no kernels.
    """
    if not kernels:
        raise ValueError(f"{name}: holds no GPU kernels; record with CUDA activities")
    kernels = sorted(kernels)
    start, end = kernels[0].start, max(kernel.end for kernel in kernels)
    messages = [kernel for kernel in kernels if COMMUNICATION.search(kernel.name)]
    work = [kernel for kernel in kernels if not COMMUNICATION.search(kernel.name)]
    busy, moving = union(_times(work)), union(_times(messages))
    exposed = minus(moving, busy)
    recompute = union(_times([kernel for kernel in work if kernel.recompute]))
    hidden = common(recompute, moving)
    delay = _delay(kernels, high)

    lost: dict[str, float] = defaultdict(float)
    for kernel in messages:
        alone = minus(union([(kernel.start, kernel.end)]), busy)
        lost[f"{_short(kernel.name)} ran with nothing to compute beside it"] += length(alone)
    idle = minus(minus([(start, end)], busy), moving)
    starts = [kernel.start for kernel in kernels]
    for begin, stop in idle:
        following = kernels[bisect_left(starts, stop)]
        late = following.launched is not None and following.launched > begin
        why = f"the host launched {_short(following.name)} late" if late else f"{_short(following.name)} waited for an event"
        lost[f"the device was idle: {why}"] += stop - begin
    lost["recomputation ran with no message under way"] = length(recompute) - length(hidden)
    lost["high-priority work was ready, but stood behind other work"] = delay
    losses = tuple(Loss(ms, why) for why, ms in lost.items())
    return Rank(
        name, end - start, length(busy), length(moving), length(exposed), length(recompute), length(hidden), delay, losses
    )


def _delay(kernels: Sequence[Kernel], high: Collection[int]) -> float:
    """How long kernels of `high` streams were ready while other streams computed."""
    others = union(_times([k for k in kernels if k.stream not in high and not COMMUNICATION.search(k.name)]))
    free: dict[int, float] = {}
    delay = 0.0
    for kernel in kernels:
        if kernel.stream in high and kernel.launched is not None:
            ready = max(kernel.launched, free.get(kernel.stream, kernel.launched))
            delay += length(common(union([(ready, kernel.start)]), others))
        free[kernel.stream] = kernel.end
    return delay


def _times(kernels: Sequence[Kernel]) -> list[tuple[float, float]]:
    return [(kernel.start, kernel.end) for kernel in kernels]


def _short(name: str) -> str:
    """A kernel's name without return type, template and arguments."""
    return re.split(r"[<(]", name.removeprefix("void "))[0][:60]
