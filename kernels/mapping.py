"""Autograd around the mapping kernels: one function for `coefficients`, `coefficients_pre` and `post_res_pre`."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from pipehc.kernels.backward import Incoming, launch_mapping_backward
from pipehc.kernels.differentiation import once
from pipehc.kernels.forward import launch_mapping
from pipehc.kernels.kept_maps import current
from pipehc.kernels.link import Link, claim, new_carriers
from pipehc.kernels.manifolds.base import Manifold
from pipehc.kernels.post_res import launch_post_res_backward
from pipehc.kernels.rebuild import launch_rebuild
from pipehc.kernels.rms_norm import Norm

_SAVED = ("h_pre", "h_post", "h_res", "product", "inverse_rms", "norms")


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
        norm: Norm | None = None,
        on_gradient: Callable[[Tensor], None] | None = None,
    ) -> tuple[Any, ...]:
        """Applies it, after taking up the link of the previous sub-layer, and links the new coefficients.

        on_gradient: called in the backward with the gradient of x', through everything.
        """
        f, h_post, h_res = previous if previous is not None else (None, None, None)
        grad = torch.is_grad_enabled()
        before = claim(x, *previous) if previous is not None and grad else None
        linked = (None, None) if before is None else (before.x_next, before.f)
        phi, alpha, bias = parameters
        weight, eps = norm if norm is not None else (None, 0.0)
        *results, x_carrier, f_carrier = cls.apply(
            x,
            f,
            h_post,
            h_res,
            *linked,
            phi,
            alpha,
            bias,
            manifold.scalar,
            weight,
            eps,
            manifold,
            tuple(fixed),
            with_y,
            with_y and grad,
            on_gradient,
        )
        x_next, _, _, h_post_new, h_res_new = results
        if x_carrier is not None and x_carrier.requires_grad:
            Link(x if x_next is None else x_next, x_carrier, f_carrier).attach(h_post_new, h_res_new)
        return tuple(results)

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        f: Tensor | None,
        h_post: Tensor | None,
        h_res: Tensor | None,
        linked_x_next: Tensor | None,
        linked_f: Tensor | None,
        phi: Tensor,
        alpha: Tensor,
        bias: Tensor,
        scalar: Tensor | None,
        weight: Tensor | None,
        eps: float,
        manifold: Manifold,
        fixed: tuple[str, ...],
        with_y: bool,
        with_link: bool,
        on_gradient: Callable[[Tensor], None] | None,
    ) -> tuple[Tensor | None, ...]:
        x = x.contiguous()
        previous = None
        if f is not None and h_post is not None and h_res is not None:
            previous = (f.contiguous(), h_post.float().contiguous(), h_res.float().contiguous())
        parameters = tuple(p.float().contiguous() for p in (phi, alpha, bias))
        norm = None if weight is None else Norm(weight.contiguous(), eps)
        kept = current() if with_y else None  # what looks at coefficients alone is never run again
        operation = tuple(x.shape), type(manifold), fixed, previous is None, norm is None
        maps = None if kept is None else kept.take(operation)
        if maps is None:
            out = launch_mapping(x, previous, parameters, manifold, fixed, with_y, norm)  # type: ignore[arg-type]
            if kept is not None:
                kept.keep(operation, {name: out[name] for name in _SAVED if name in out})
        else:
            out = maps | launch_rebuild(x, previous, maps, norm)
        mapped = out.get("x_next", x)
        # A linked sub-layer end leaves its x to the operation it is linked to.
        ctx.linked = linked_x_next is not None
        kept_x = x if previous is not None and not ctx.linked else None
        kept_f, kept_post, kept_res = previous if previous is not None else (None, None, None)
        ctx.save_for_backward(
            mapped,
            *(out.get(name) for name in _SAVED),
            *parameters,
            None if norm is None else norm.weight,
            kept_x,
            kept_f,
            kept_post,
            None if ctx.linked else kept_res,
            scalar,  # not read there, but if it has changed in between, autograd says so
        )
        ctx.manifold, ctx.fixed, ctx.on_gradient = manifold, fixed, on_gradient
        inputs = (f, h_post, h_res, linked_x_next, linked_f, phi, alpha, bias, scalar, weight)
        ctx.dtypes = tuple(None if t is None else t.dtype for t in inputs)
        ctx.set_materialize_grads(False)
        carriers = new_carriers(mapped) if with_link else (None, None)
        return out.get("x_next"), out.get("y"), out["h_pre"], out["h_post"], out["h_res"], *carriers

    @staticmethod
    @once
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        d_x_next, d_y, d_pre, d_post, d_res, left, left_f = (None if g is None else g.contiguous() for g in grads)
        mapped, *rest = ctx.saved_tensors
        saved = dict(zip(_SAVED, rest[: len(_SAVED)]))
        phi, alpha, bias, weight, x, f, h_post, h_res, _ = rest[len(_SAVED) :]
        deferred = None if left is None or left_f is None else (left, left_f)
        incoming = Incoming(d_y, d_x_next, d_pre, d_post, d_res, deferred)
        before = (h_post, f.dtype) if ctx.linked else None
        parameters = phi, alpha, bias
        got = launch_mapping_backward(mapped, saved, parameters, incoming, before, ctx.manifold, ctx.fixed, weight)
        if ctx.on_gradient is not None:
            ctx.on_gradient(got.x)
        if f is None:
            previous: tuple[Tensor | None, ...] = (got.x, None, None, None, None, None)
        elif ctx.linked:
            previous = (None, got.f_before, None, None, got.x, f.detach())
        else:
            previous = (*launch_post_res_backward(got.x, x, f, h_post, h_res), None, None)
        d_scalar = got.scalar if ctx.needs_input_grad[9] else None
        results = (*previous[1:], got.phi, got.alpha, got.bias, d_scalar, got.norm_weight)
        cast = (None if g is None or d is None else g.to(d) for g, d in zip(results, ctx.dtypes))
        return (previous[0], *cast, None, None, None, None, None, None)
