"""Coefficients and the sub-layer's input together, where a stage starts: x is read for both at once."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor

from pipehc.kernels.backend import backend_of
from pipehc.kernels.coefficients import check_coefficients, coefficients_reference
from pipehc.kernels.manifolds.base import Manifold
from pipehc.kernels.mapping import Mapping
from pipehc.kernels.pre import pre, pre_reference


def coefficients_pre(
    x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, *, manifold: Manifold, fixed: Collection[str] = ()
) -> tuple[Tensor, Tensor, Tensor]:
    """y [T, C] = H_pre x, H_post [T, n] and H_res [T, n, n] of streams x [T, n, C]. Arguments as for `coefficients`."""
    check_coefficients(x, phi, alpha, bias, manifold, fixed)
    if backend_of(x, x.shape[1]) == "reference":
        return coefficients_pre_reference(x, phi, alpha, bias, manifold, fixed)
    if manifold.static:
        h_pre, h_post, h_res = coefficients_reference(x, phi, alpha, bias, manifold, fixed)
        return pre(x, h_pre), h_post, h_res
    _, y, _, h_post, h_res = Mapping.run(x, None, (phi, alpha, bias), manifold, fixed, with_y=True)
    return y, h_post, h_res


def coefficients_pre_reference(
    x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, manifold: Manifold, fixed: Collection[str] = ()
) -> tuple[Tensor, Tensor, Tensor]:
    """The same in plain PyTorch."""
    h_pre, h_post, h_res = coefficients_reference(x, phi, alpha, bias, manifold, fixed)
    return pre_reference(x, h_pre), h_post, h_res
