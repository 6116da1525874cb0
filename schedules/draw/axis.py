"""Where to write numbers on a time axis."""

from __future__ import annotations

import math


def ticks(end: float, about: int = 12) -> list[float]:
    """Round values (1, 2 or 5 times a power of ten apart) from 0 to `end`, roughly `about` of them."""
    if end <= 0:
        return [0.0]
    power = 10.0 ** math.floor(math.log10(end / about))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor * about >= end)
    return [round(i * step, 10) for i in range(int(end / step + 1e-9) + 1)]
