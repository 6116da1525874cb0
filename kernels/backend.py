"""Which of the two backends runs an operation: Triton kernels or the PyTorch reference."""

from __future__ import annotations

import os
from typing import Literal

from torch import Tensor

Backend = Literal["triton", "reference"]

MAX_STREAMS = 8
"""Largest number of streams the Triton kernels hold on chip; the reference takes any."""

MAX_CHANNELS = 2**20
"""Channels of a stream, at most: their tiles are counted in the second dimension of a grid, which ends at 65535, and the numbers of
16 tokens and of phi in 32 bits. Tokens are not limited."""


def backend_of(x: Tensor, streams: int) -> Backend:
    """The backend for streams `x`: `PIPEHC_KERNELS` (triton or reference) if set, else Triton on CUDA, and on meta, which stands
    for it in a dry run; the reference elsewhere.

    The reference also serves what Triton does not offer (fp64, more streams or channels than the kernels take), unless Triton is
    asked for by name.
    """
    forced = os.environ.get("PIPEHC_KERNELS", "")
    if forced not in ("", "triton", "reference"):
        raise ValueError(f"PIPEHC_KERNELS={forced!r}: must be 'triton' or 'reference'")
    fits = streams <= MAX_STREAMS and x.element_size() <= 4 and x.shape[2] <= MAX_CHANNELS
    if forced == "triton" and not fits:
        raise ValueError(
            f"PIPEHC_KERNELS=triton: n={streams} streams of {x.shape[2]} channels in {x.dtype}; "
            f"the kernels take n <= {MAX_STREAMS} and C <= {MAX_CHANNELS} in fp32, bf16 or fp16"
        )
    if forced:
        return "triton" if forced == "triton" else "reference"
    return "triton" if (x.is_cuda or x.is_meta) and fits else "reference"
