"""Autograd around the mapping kernels: one function for `coefficients`, `coefficients_pre` and `post_res_pre`."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from pipehc.kernels.backward import Incoming, launch_mapping_backward
from pipehc.kernels.differentiation import once
from pipehc.kernels.forward import launch_mapping
from pipehc.kernels.link import Link, claim
from pipehc.kernels.manifolds.base import Manifold
from pipehc.kernels.post_res import launch_post_res_backward

_SAVED = ("h_pre", "h_post", "h_res", "product", "inverse_rms")


class Mapping(torch.autograd.Function):
    """(x', y, H_pre, H_post, H_res) of x and, for post_res_pre, the previous f, H_post, H_res; None for what is not asked for."""

    @classmethod
    def run(
        cls,
        x: Tensor,
        previous: tuple[Tensor, Tensor, Tensor] | None,
        parameters: tuple[Tensor, Tensor, Tensor],
        manifold: Manifold,
        fixed: Collection[str],
        with_y: bool,
    ) -> tuple[Any, ...]:
        """Applies it, after taking up the link of the previous sub-layer, and links the new coefficients."""
        f, h_post, h_res = previous if previous is not None else (None, None, None)
        before = claim(x, *previous[1:]) if previous is not None and torch.is_grad_enabled() else None
        phi, alpha, bias = parameters
        ahead: list[Link] = []
        results: tuple[Any, ...] = cls.apply(
            x, f, h_post, h_res, phi, alpha, bias, manifold.scalar, manifold, tuple(fixed), with_y, before, ahead
        )
        x_next, _, _, h_post_new, h_res_new = results
        if with_y and h_res_new.requires_grad:
            link = Link(x if x_next is None else x_next)
            link.attach(h_post_new, h_res_new)
            ahead.append(link)
        return results

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        f: Tensor | None,
        h_post: Tensor | None,
        h_res: Tensor | None,
        phi: Tensor,
        alpha: Tensor,
        bias: Tensor,
        scalar: Tensor | None,
        manifold: Manifold,
        fixed: tuple[str, ...],
        with_y: bool,
        before: Link | None,
        ahead: list[Link],
    ) -> tuple[Tensor | None, ...]:
        x = x.contiguous()
        previous = None
        if f is not None and h_post is not None and h_res is not None:
            previous = (f.contiguous(), h_post.float().contiguous(), h_res.float().contiguous())
        parameters = tuple(p.float().contiguous() for p in (phi, alpha, bias))
        out = launch_mapping(x, previous, parameters, manifold, fixed, with_y)  # type: ignore[arg-type]
        mapped = out.get("x_next", x)
        # A linked sub-layer end leaves its x to the operation it is linked to.
        kept_x = x if previous is not None and before is None else None
        kept_f, kept_post, kept_res = previous if previous is not None else (None, None, None)
        ctx.save_for_backward(
            mapped,
            *(out[name] for name in _SAVED),
            *parameters,
            kept_x,
            kept_f,
            kept_post,
            kept_res if before is None else None,
            scalar,  # not read there, but if it has changed in between, autograd says so
        )
        ctx.manifold, ctx.fixed, ctx.before, ctx.ahead = manifold, fixed, before, ahead
        ctx.dtypes = tuple(None if t is None else t.dtype for t in (f, h_post, h_res, phi, alpha, bias, scalar))
        ctx.set_materialize_grads(False)
        return out.get("x_next"), out.get("y"), out["h_pre"], out["h_post"], out["h_res"]

    @staticmethod
    @once
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        d_x_next, d_y, d_pre, d_post, d_res = (None if g is None else g.contiguous() for g in grads)
        mapped, *rest = ctx.saved_tensors
        saved = dict(zip(_SAVED, rest[: len(_SAVED)]))
        phi, alpha, bias, x, f, h_post, h_res, _ = rest[len(_SAVED) :]
        deferred = ctx.ahead[0].take() if ctx.ahead else None
        incoming = Incoming(d_y, d_x_next, d_pre, d_post, d_res, deferred)
        linked = ctx.before is not None
        before = (h_post, f.dtype) if linked else None
        got = launch_mapping_backward(mapped, saved, (phi, alpha, bias), incoming, before, ctx.manifold, ctx.fixed)
        if f is None:
            previous: tuple[Tensor | None, ...] = (got.x, None, None, None)
        elif linked:
            ctx.before.deliver(got.x, f)
            previous = (None, got.f_before, None, None)
        else:
            previous = launch_post_res_backward(got.x, x, f, h_post, h_res)
        d_scalar = got.scalar if ctx.needs_input_grad[7] else None
        results = (*previous[1:], got.phi, got.alpha, got.bias, d_scalar)
        cast = (None if g is None or d is None else g.to(d) for g, d in zip(results, ctx.dtypes))
        return (previous[0], *cast, None, None, None, None, None)
