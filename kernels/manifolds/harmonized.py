# mypy: disable-error-code="assignment,misc"
"""Harmonized HC: raw HC pulled towards the identity by one scalar for the whole depth, which a feedback loop sets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from pipehc.kernels.language import tl, triton
from pipehc.kernels.manifolds.base import Manifold, Settings
from pipehc.kernels.matrices import diagonal
from pipehc.kernels.shapes import check_shape

STATIC_SCALE = 0.05
"""Static form: H_raw = I + 0.05 * logits."""


@dataclass(frozen=True, eq=False)
class Harmonized(Manifold):
    """H_res = I + s (H_raw - I). `s` is a tensor of shape [] on the device of the streams, changed in place by the controller.

    No gradient flows to s: the composite gain sets it, not the loss. With `unconditioned`, the coefficients do not depend on x:
    H_raw = I + 0.05 * logits, and H_pre and H_post are softmax of logits.
    """

    per_stream: ClassVar[bool] = True
    scalar_is: ClassVar = "controlled"
    static_form: ClassVar[bool] = True
    s: Tensor
    unconditioned: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shape(self.s, (), "s")

    @classmethod
    def of(cls, settings: Settings, scalar: Tensor | None) -> Harmonized:
        assert scalar is not None
        return cls(scalar, settings.static, norm_eps=settings.norm_eps)

    @property
    def scalar(self) -> Tensor:
        return self.s.detach()

    @property
    def static(self) -> bool:
        return self.unconditioned

    @property
    def device_functions(self) -> tuple[Any, Any]:
        return towards_identity, towards_identity_backward

    def map(self, logits: Tensor) -> Tensor:
        eye = torch.eye(logits.shape[-1], dtype=logits.dtype, device=logits.device)
        s = self.scalar.to(logits.dtype)
        if self.unconditioned:
            return eye + s * STATIC_SCALE * logits
        return eye + s * (logits - eye)

    def initial_res(self, n: int) -> Tensor:
        return torch.zeros(n, n) if self.unconditioned else torch.eye(n)

    def initial_bias(self, read: Tensor, read_logits: Tensor, write_logits: Tensor) -> Tensor:
        """As for HC; in the static form H_pre is the softmax of logits too, and H_post starts as 1/n where the logits are equal."""
        if not self.unconditioned:
            return super().initial_bias(read, read_logits, write_logits)
        logits = torch.log(read.clamp_min(1e-9))
        return torch.cat([(logits - logits.mean()).float(), write_logits.float(), self.initial_res(len(read)).flatten()])


@triton.jit
def towards_identity(z, s, n: tl.constexpr, SETTINGS: tl.constexpr):
    eye = tl.where(diagonal(z.shape[1]), 1.0, 0.0)
    return eye + s * (z - eye)


@triton.jit
def towards_identity_backward(z, grad, s, n: tl.constexpr, SETTINGS: tl.constexpr):
    return s * grad, tl.zeros([z.shape[0]], tl.float32)
