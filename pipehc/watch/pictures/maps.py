"""Heat maps of the mean maps of one step (mHC, Figure 8)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipehc.watch.pictures.line import Line


@dataclass(frozen=True)
class HeatMap:
    """matrix: [n, n]; row i is what stream i becomes, column j where stream j goes."""

    title: str
    matrix: np.ndarray


def heat_maps(line: Line, sublayers: Sequence[int] | None = None) -> list[HeatMap]:
    """Of the first, the middle and the last sub-layer, or of those asked for that are there, and of the product of all."""
    found = []
    if line.maps is not None:
        wanted = (0, line.sublayers // 2, line.sublayers - 1) if sublayers is None else sublayers
        there = [l for l in dict.fromkeys(wanted) if l < line.sublayers]
        found = [HeatMap(f"sub-layer {l} ({line.name_of(l)})", line.maps[l]) for l in there]
    if line.composite_map is not None:
        found.append(HeatMap(f"product of all {line.sublayers}", line.composite_map))
    return found
