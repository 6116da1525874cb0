"""Triton, ready for the machine at hand: compiled on a GPU, interpreted (and repaired) on a CPU when asked for there.

Triton decides between compiler and interpreter while its own modules load, from TRITON_INTERPRET. With `PIPEHC_KERNELS=triton` and
no GPU this module chooses the interpreter; otherwise it leaves the environment alone.
"""

from __future__ import annotations

import os
import sys

import torch

if os.environ.get("PIPEHC_KERNELS") == "triton" and not torch.cuda.is_available() and "triton" not in sys.modules:
    os.environ.setdefault("TRITON_INTERPRET", "1")

import triton
import triton.language as tl

__all__ = ["INTERPRETED", "check_launchable", "tl", "triton"]

INTERPRETED: bool = bool(triton.knobs.runtime.interpret)
"""True when kernels run in Triton's interpreter: on the CPU, slowly, for tests and for counting traffic."""

if INTERPRETED:
    from pipehc.kernels.interpreter import repair

    repair()


def check_launchable(device: torch.device) -> None:
    """ValueError if kernels cannot run on tensors of this device."""
    if device.type == "cpu" and not INTERPRETED:
        raise ValueError(
            "PIPEHC_KERNELS=triton on CPU tensors: Triton was loaded for a GPU before; set TRITON_INTERPRET=1 in the environment"
        )
