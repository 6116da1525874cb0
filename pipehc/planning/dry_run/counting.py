"""What surrounds a program that is counted."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from pipehc.kernels.language import noting
from pipehc.planning.dry_run.tracker import Tracker


@contextmanager
def counting(tracker: Tracker) -> Iterator[None]:
    """Around the program, in a process that runs nothing else. Cycles are not collected from then on."""
    gc.collect()
    gc.freeze()
    gc.disable()  # what a cycle holds is alive, in every run alike
    with tracker, noting(tracker.note_kernel):
        yield


def persistent(tracker: Tracker) -> dict[str, int]:
    """Bytes alive, by the category that they were marked with."""
    found = Counter[str]()
    for block in tracker.history:
        if block.died is None:
            found[str(block.category)] += block.nbytes
    return dict(found)
