"""The end of one sub-layer fused with the start of the next: the new streams are projected and aggregated as they are made."""

from __future__ import annotations

from collections.abc import Callable, Collection

from torch import Tensor

from pipehc.kernels.backend import backend_of
from pipehc.kernels.coefficients import check_coefficients
from pipehc.kernels.coefficients_pre import coefficients_pre, coefficients_pre_reference
from pipehc.kernels.differentiation import watch_gradient
from pipehc.kernels.manifolds.base import Manifold
from pipehc.kernels.mapping import Mapping
from pipehc.kernels.post_res import check_post_res, post_res, post_res_reference
from pipehc.kernels.rms_norm import Norm, check_norm


def post_res_pre(
    x: Tensor,
    f: Tensor,
    h_post: Tensor,
    h_res: Tensor,
    phi_next: Tensor,
    alpha_next: Tensor,
    bias_next: Tensor,
    *,
    manifold: Manifold,
    fixed: Collection[str] = (),
    norm: Tensor | None = None,
    eps: float | None = None,
    on_gradient: Callable[[Tensor], None] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x' [T, n, C] as `post_res`, and y' [T, C], H_post' [T, n], H_res' [T, n, n] as `coefficients_pre` of x' with the next
    sub-layer's parameters, manifold, switches and norm.

    on_gradient: called in the backward with the whole gradient of x', [T, n, C], through whatever uses it.
    """
    check_post_res(x, f, h_post, h_res)
    check_coefficients(x, phi_next, alpha_next, bias_next, manifold, fixed)
    pre_norm = check_norm(x, norm, eps)
    if backend_of(x, x.shape[1]) == "reference":
        results = post_res_pre_reference(x, f, h_post, h_res, phi_next, alpha_next, bias_next, manifold, fixed, pre_norm)
        watch_gradient(results[0], on_gradient)
        return results
    if manifold.static:
        x_next = post_res(x, f, h_post, h_res)
        watch_gradient(x_next, on_gradient)
        made = coefficients_pre(x_next, phi_next, alpha_next, bias_next, manifold=manifold, fixed=fixed, norm=norm, eps=eps)
        return x_next, *made
    x_next, y, _, h_post_next, h_res_next = Mapping.run(
        x,
        (f, h_post, h_res),
        (phi_next, alpha_next, bias_next),
        manifold,
        fixed,
        with_y=True,
        norm=pre_norm,
        on_gradient=on_gradient,
    )
    return x_next, y, h_post_next, h_res_next


def post_res_pre_reference(
    x: Tensor,
    f: Tensor,
    h_post: Tensor,
    h_res: Tensor,
    phi_next: Tensor,
    alpha_next: Tensor,
    bias_next: Tensor,
    manifold: Manifold,
    fixed: Collection[str] = (),
    norm: Norm | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same in plain PyTorch."""
    x_next = post_res_reference(x, f, h_post, h_res)
    return x_next, *coefficients_pre_reference(x_next, phi_next, alpha_next, bias_next, manifold, fixed, norm)
