"""HC: the unconstrained map. H_res = I + offset, exactly as computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pipehc.kernels.manifolds.base import Manifold


@dataclass(frozen=True, eq=False)
class IdentityOffset(Manifold):
    """H_res = logits; the identity sits in the bias, the offset alpha * tanh(theta x~) is learned (paper eq. 5)."""

    per_stream: ClassVar[bool] = True

    def map(self, logits: Tensor) -> Tensor:
        return logits

    def initial_res(self, n: int) -> Tensor:
        return torch.eye(n)
