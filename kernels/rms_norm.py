"""RMSNorm that saves its input and one number a token: PyTorch's on CPU saves the normalised input as well."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipehc.kernels.shapes import check_others, check_shape


class Norm(NamedTuple):
    """The RMSNorm that follows an operation."""

    weight: Tensor
    eps: float


def check_norm(x: Tensor, norm: Tensor | None, eps: float | None) -> Norm | None:
    """The arguments `norm` and `eps` of an operation on streams x [T, n, C], None if neither is given; ValueError if they do not
    fit."""
    if norm is None and eps is None:
        return None
    if norm is None:
        raise ValueError(f"eps={eps!r} without norm: it is the epsilon of the RMSNorm whose weight is norm")
    check_shape(norm, (x.shape[2],), "norm")
    check_others(x, norm=norm)
    if isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 <= eps < math.inf:
        raise ValueError(f"eps={eps!r}: must be a finite number, at least 0, with norm")
    return Norm(norm, float(eps))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in fp32 or better inside; dtype and shape of x."""
    result: Tensor = _RMSNorm.apply(x, weight, eps)
    return result


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, scale = normalised(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: a second derivative needs to see where it comes from
            scale = _scale(x.to(scale.dtype), ctx.eps)
        return *gradients(dy, x, weight, scale), None


def normalised(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """What `rms_norm` returns, and 1 / sqrt(mean(x^2) + eps) [..., 1] in fp32 or better."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = _scale(wide, eps)
    return (wide * scale * weight).to(x.dtype), scale


def gradients(dy: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Of x and of the weight."""
    normed = x.to(scale.dtype) * scale
    wide = dy.to(scale.dtype)
    dn = wide * weight
    dx = (dn - normed * (dn * normed).mean(-1, keepdim=True)) * scale
    dw = (wide * normed).flatten(0, -2).sum(0)
    return dx.to(x.dtype), dw.to(weight.dtype)


def _scale(wide: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
