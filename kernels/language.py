"""Triton, ready for the machine at hand: compiled on a GPU, interpreted (and repaired) on a CPU when asked for there.

Triton decides between compiler and interpreter while its own modules load, from TRITON_INTERPRET. With `PIPEHC_KERNELS=triton` and
no GPU this module chooses the interpreter; otherwise it leaves the environment alone.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from typing import Any, Concatenate

import torch
from torch import Tensor

if os.environ.get("PIPEHC_KERNELS") == "triton" and not torch.cuda.is_available() and "triton" not in sys.modules:
    os.environ.setdefault("TRITON_INTERPRET", "1")

import triton
import triton.language as tl

__all__ = ["INTERPRETED", "Noting", "launch", "launches", "noting", "tl", "triton"]

INTERPRETED: bool = bool(triton.knobs.runtime.interpret)
"""True when kernels run in Triton's interpreter: on the CPU, slowly, for tests and for counting traffic."""

if INTERPRETED:
    from pipehc.kernels.interpreter import repair
    from pipehc.kernels.interpreter_types import remember

    repair()
    remember()


def launches[**P, R](function: Callable[Concatenate[Tensor, P], R]) -> Callable[Concatenate[Tensor, P], R]:
    """Decorator of what launches kernels on its first argument: Triton launches on the current device; that is made the tensor's.

    The function raises ValueError if kernels cannot run on tensors of this device.
    """

    @wraps(function)
    def on_its_device(x: Tensor, *args: P.args, **kwargs: P.kwargs) -> R:
        if x.device.type == "cpu" and not INTERPRETED:
            raise ValueError(
                "PIPEHC_KERNELS=triton on CPU tensors: Triton was loaded for a GPU before; "
                "set TRITON_INTERPRET=1 in the environment"
            )
        with torch.cuda.device_of(x):  # does nothing for CPU tensors
            return function(x, *args, **kwargs)

    return on_its_device


Noting = Callable[[str, Mapping[str, Any]], AbstractContextManager[object]]
"""Told the name of a kernel and, in order and by name, its arguments at run time; the kernel runs inside of what it returns."""

_noting: list[Noting] = []


@contextmanager
def noting(note: Noting) -> Iterator[None]:
    """In this block `note` is told about every launch, the innermost of several."""
    _noting.append(note)
    try:
        yield
    finally:
        _noting.pop()


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launches a kernel: the only place that does. On meta tensors, which have no data, it is noted and not launched."""
    with _noting[-1](kernel.fn.__name__, dict(zip(kernel.arg_names, args))) if _noting else nullcontext():
        if not args[0].is_meta:
            kernel[grid](*args, **options)
