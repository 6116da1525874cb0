# mypy: disable-error-code="assignment,misc"
"""A blend of the isometric and the doubly stochastic map."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from pipehc.kernels.language import tl, triton
from pipehc.kernels.manifolds.base import Manifold, Settings
from pipehc.kernels.manifolds.birkhoff import Birkhoff, sinkhorn, sinkhorn_backward
from pipehc.kernels.manifolds.isometric import Isometric, retract, retract_backward
from pipehc.kernels.matrices import total
from pipehc.kernels.shapes import check_shape


@dataclass(frozen=True, eq=False)
class Hybrid(Manifold):
    """H_res = (1 - lambda) H_iso + lambda H_birk of the same logits; `blend` is lambda in [0, 1], shape [], learnable."""

    scalar_is: ClassVar = "learned"
    blend: Tensor
    birkhoff: Birkhoff = field(default_factory=Birkhoff)
    isometric: Isometric = field(default_factory=Isometric)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shape(self.blend, (), "blend")
        for name, kind in (("birkhoff", Birkhoff), ("isometric", Isometric)):
            if not isinstance(getattr(self, name), kind):
                raise ValueError(f"{name}={getattr(self, name)!r}: must be an instance of {kind.__name__}")

    @classmethod
    def of(cls, settings: Settings, scalar: Tensor | None) -> Hybrid:
        assert scalar is not None
        return cls(scalar, Birkhoff.of(settings, None), Isometric.of(settings, None), norm_eps=settings.norm_eps)

    @property
    def scalar(self) -> Tensor:
        return self.blend

    @property
    def device_functions(self) -> tuple[Any, Any]:
        return blend, blend_backward

    @property
    def settings(self) -> tuple[tuple[float, ...], ...]:
        """Those of Birkhoff and those of Isometric."""
        return (self.birkhoff.settings, self.isometric.settings)

    def map(self, logits: Tensor) -> Tensor:
        return torch.lerp(self.isometric.map(logits), self.birkhoff.map(logits), self.blend.to(logits.dtype))

    def initial_res(self, n: int) -> Tensor:
        """As for Birkhoff: the isometric part of 4 I is I."""
        return self.birkhoff.initial_res(n)


@triton.jit
def blend(z, share, n: tl.constexpr, SETTINGS: tl.constexpr):
    # Named: up to Triton 3.6 a part of a tuple can be passed on only as a constant of its own.
    BIRKHOFF: tl.constexpr = SETTINGS[0]
    ISOMETRIC: tl.constexpr = SETTINGS[1]
    birkhoff = sinkhorn(z, None, n, BIRKHOFF)
    isometric = retract(z, None, n, ISOMETRIC)
    return isometric + share * (birkhoff - isometric)


@triton.jit
def blend_backward(z, grad, share, n: tl.constexpr, SETTINGS: tl.constexpr):
    BIRKHOFF: tl.constexpr = SETTINGS[0]
    ISOMETRIC: tl.constexpr = SETTINGS[1]
    birkhoff = sinkhorn(z, None, n, BIRKHOFF)
    isometric = retract(z, None, n, ISOMETRIC)
    d_share = total(grad * (birkhoff - isometric))
    from_birkhoff, _ = sinkhorn_backward(z, share * grad, None, n, BIRKHOFF)
    from_isometric, _ = retract_backward(z, grad - share * grad, None, n, ISOMETRIC)
    return from_birkhoff + from_isometric, d_share
