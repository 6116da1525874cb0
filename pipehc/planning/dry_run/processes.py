"""Ranks of dry runs side by side, each in a process of its own: it becomes its rank for good."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence

import torch


def side_by_side[Request, Result](
    run: Callable[[Request], Result], requests: Sequence[Request], processes: int | None = None
) -> list[Result]:
    """What `run`, a function of a module, returns for each; in their order.

    processes: at a time; default: one a core. The caller must have no threads at work and no CUDA context: processes are forked.
    """
    context = multiprocessing.get_context("fork")
    with context.Pool(min(len(requests), processes or os.cpu_count() or 1), _begin, maxtasksperchild=1) as pool:
        return pool.map(run, requests, chunksize=1)


def _begin() -> None:
    torch.set_num_threads(1)
