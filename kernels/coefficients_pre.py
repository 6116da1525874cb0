"""Coefficients and the sub-layer's input together, where a stage starts: x is read for both at once."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor

from pipehc.kernels.backend import backend_of
from pipehc.kernels.coefficients import check_coefficients, coefficients_reference
from pipehc.kernels.manifolds.base import Manifold
from pipehc.kernels.mapping import Mapping
from pipehc.kernels.pre import pre, pre_reference
from pipehc.kernels.rms_norm import Norm, check_norm, rms_norm
from pipehc.kernels.shapes import coefficient_dtype


def coefficients_pre(
    x: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    *,
    manifold: Manifold,
    fixed: Collection[str] = (),
    norm: Tensor | None = None,
    eps: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """y [T, C] = H_pre x, H_post [T, n] and H_res [T, n, n] of streams x [T, n, C]. Arguments as for `coefficients`.

    With norm [C] and eps, y is RMSNorm(H_pre x), y / sqrt(mean(y^2) + eps) * norm with the mean over channels, rounded once; it
    is summed where it is made (forward.py), in fp32 before it is rounded.
    """
    check_coefficients(x, phi, alpha, bias, manifold, fixed)
    pre_norm = check_norm(x, norm, eps)
    if backend_of(x, x.shape[1]) == "reference":
        return coefficients_pre_reference(x, phi, alpha, bias, manifold, fixed, pre_norm)
    if manifold.static:
        h_pre, h_post, h_res = coefficients_reference(x, phi, alpha, bias, manifold, fixed)
        y = pre(x, h_pre)
        return y if pre_norm is None else rms_norm(y, *pre_norm), h_post, h_res
    _, y, _, h_post, h_res = Mapping.run(x, None, (phi, alpha, bias), manifold, fixed, with_y=True, norm=pre_norm)
    return y, h_post, h_res


def coefficients_pre_reference(
    x: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    manifold: Manifold,
    fixed: Collection[str] = (),
    norm: Norm | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same in plain PyTorch."""
    h_pre, h_post, h_res = coefficients_reference(x, phi, alpha, bias, manifold, fixed)
    if norm is None:
        return pre_reference(x, h_pre), h_post, h_res
    y = pre_reference(x.to(coefficient_dtype(x)), h_pre)
    return rms_norm(y, *norm).to(x.dtype), h_post, h_res
