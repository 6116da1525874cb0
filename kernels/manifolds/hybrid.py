"""A blend of the isometric and the doubly stochastic map."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipehc.kernels.manifolds.base import Manifold
from pipehc.kernels.manifolds.birkhoff import Birkhoff
from pipehc.kernels.manifolds.isometric import Isometric


@dataclass(frozen=True, eq=False)
class Hybrid(Manifold):
    """H_res = (1 - lambda) H_iso + lambda H_birk of the same logits; `blend` is lambda in [0, 1], shape [], learnable."""

    blend: Tensor
    birkhoff: Birkhoff = field(default_factory=Birkhoff)
    isometric: Isometric = field(default_factory=Isometric)

    @property
    def scalar(self) -> Tensor:
        return self.blend

    def map(self, logits: Tensor) -> Tensor:
        return torch.lerp(self.isometric.map(logits), self.birkhoff.map(logits), self.blend.to(logits.dtype))

    def initial_res(self, n: int) -> Tensor:
        """As for Birkhoff: the isometric part of 4 I is I."""
        return self.birkhoff.initial_res(n)
