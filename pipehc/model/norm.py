"""The RMSNorm between a connection and its F, as something that the connection may do itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from pipehc.kernels.rms_norm import rms_norm

Norm = Callable[[Tensor], Tensor]
"""[..., C] -> [..., C]."""


@dataclass(frozen=True)
class RMSNorm:
    """RMSNorm over the last dimension, of a value or of what a connection makes next. weight: called for every use, for what enters
    the graph, [C]."""

    weight: Callable[[], Tensor]
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight(), self.eps)
