# mypy: disable-error-code="assignment,misc"
"""F_post,res: the streams after a sub-layer, x' = H_res x + H_post^T f."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pipehc.kernels.backend import backend_of
from pipehc.kernels.differentiation import matmul, once
from pipehc.kernels.language import launch, launches, tl, triton
from pipehc.kernels.link import claim
from pipehc.kernels.pre import launch_pre
from pipehc.kernels.shapes import check_others, check_shape, check_streams, coefficient_dtype
from pipehc.kernels.tiles import block_channels, fold, load_columns, load_tiles, store_rounded, zeros


def post_res(x: Tensor, f: Tensor, h_post: Tensor, h_res: Tensor, *, result: bool = True) -> Tensor:
    """x' [T, n, C] in the dtype of x, from streams x [T, n, C], the sub-layer's output f [T, C], h_post [T, n] and h_res [T, n, n].

    Stream i of the result is the sum over j of h_res[i, j] x[j], plus h_post[i] f, summed in fp32; f may have another dtype than x,
    as under autocast. In Triton, with H_post and H_res
    straight from `coefficients_pre` or `post_res_pre` of the same x, most of the backward is left to that operation (link.py).

    result: False where only the backward is wanted; a backend that need not compute x' for it then leaves its contents open.
    """
    check_post_res(x, f, h_post, h_res)
    if backend_of(x, x.shape[1]) == "reference":
        return post_res_reference(x, f, h_post, h_res)
    link = claim(x, f, h_post, h_res) if torch.is_grad_enabled() else None
    linked = (None, None) if link is None else (link.x_next, link.f)
    x_next: Tensor = _PostRes.apply(x, f, h_post, h_res, *linked, result)
    return x_next


def check_post_res(x: Tensor, f: Tensor, h_post: Tensor, h_res: Tensor) -> None:
    """ValueError unless shapes, dtypes and devices fit each other."""
    tokens, n, channels = check_streams(x)
    check_shape(f, (tokens, channels), "f")
    check_shape(h_post, (tokens, n), "h_post")
    check_shape(h_res, (tokens, n, n), "h_res")
    check_others(x, f=f, h_post=h_post, h_res=h_res)


def post_res_reference(x: Tensor, f: Tensor, h_post: Tensor, h_res: Tensor) -> Tensor:
    """The same in plain PyTorch."""
    dtype = coefficient_dtype(x)
    mixed = matmul(h_res.to(dtype), x.to(dtype))
    return torch.addcmul(mixed, h_post.to(dtype).unsqueeze(-1), f.to(dtype).unsqueeze(1)).to(x.dtype)


@triton.jit(do_not_specialize=["T"])
def post_res_kernel(x, f, h_post, h_res, x_next, T, C, n: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr):
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)[:, None]
    c = tl.program_id(1) * BC + tl.arange(0, BC)[None, :]
    tokens = t < T
    inside = tokens & (c < C)
    post = load_columns(h_post, t, tokens, n)
    res = load_columns(h_res, t, tokens, n * n)
    streams = load_tiles(x, t, c, C, inside, n)
    branch = tl.load(f + t * C + c, mask=inside, other=0.0).to(tl.float32)
    for i in tl.static_range(n):
        out = post[i] * branch
        for j in tl.static_range(n):
            out += res[i * n + j] * streams[j].to(tl.float32)
        tl.store(x_next + t * (n * C) + i * C + c, out.to(x_next.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T"])
def post_res_backward_kernel(
    x, f, h_post, h_res, d_x_next, d_x, d_f, d_post, d_res, T, C, n: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr
):
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)[:, None]
    tokens = t < T
    post = load_columns(h_post, t, tokens, n)
    post_sums = zeros(n, BT, BC // 8)
    res_sums = zeros(n * n, BT, BC // 8)
    for first in range(0, C, BC):
        c = first + tl.arange(0, BC)[None, :]
        inside = tokens & (c < C)
        grads = load_tiles(d_x_next, t, c, C, inside, n)
        branch = tl.load(f + t * C + c, mask=inside, other=0.0).to(tl.float32)
        grad_f = post[0] * grads[0].to(tl.float32)
        new_post = (post_sums[0] + fold(grads[0].to(tl.float32) * branch),)
        for i in tl.static_range(1, n):
            grad_f += post[i] * grads[i].to(tl.float32)
            new_post += (post_sums[i] + fold(grads[i].to(tl.float32) * branch),)
        store_rounded(d_f + t * C + c, grad_f, inside)
        post_sums = new_post
        transposed = ()
        for j in tl.static_range(n):
            stream = tl.load(x + t * (n * C) + j * C + c, mask=inside, other=0.0).to(tl.float32)
            # H_res is loaded where it is used, from L1: held over the loop it would take n*n registers.
            out = tl.zeros([BT, BC], tl.float32)
            for i in tl.static_range(n):
                out += tl.load(h_res + t * (n * n) + i * n + j, mask=tokens, other=0.0) * grads[i].to(tl.float32)
            store_rounded(d_x + t * (n * C) + j * C + c, out, inside)
            for i in tl.static_range(n):
                transposed += (res_sums[j * n + i] + fold(grads[i].to(tl.float32) * stream),)
        res_sums = transposed
    for i in tl.static_range(n):
        tl.store(d_post + t * n + i, tl.sum(post_sums[i], 1, keep_dims=True), mask=tokens)
        for j in tl.static_range(n):
            tl.store(d_res + t * (n * n) + i * n + j, tl.sum(res_sums[j * n + i], 1, keep_dims=True), mask=tokens)


@launches
def launch_post_res(x: Tensor, f: Tensor, h_post: Tensor, h_res: Tensor) -> Tensor:
    """x' in one launch; all contiguous, coefficients in fp32."""
    tokens, n, channels = x.shape
    x_next = torch.empty_like(x)
    if tokens:
        block = block_channels(n)
        grid = (triton.cdiv(tokens, 16), triton.cdiv(channels, block))
        launch(post_res_kernel, grid, x, f, h_post, h_res, x_next, tokens, channels, n=n, BT=16, BC=block, num_warps=4)
    return x_next


@launches
def launch_post_res_backward(
    d_x_next: Tensor, x: Tensor, f: Tensor, h_post: Tensor, h_res: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, f, H_post and H_res in one launch; all contiguous, coefficients in fp32."""
    tokens, n, channels = x.shape
    d_x, d_f, d_post, d_res = (torch.empty_like(v) for v in (x, f, h_post, h_res))
    if tokens:
        grid, tensors = (triton.cdiv(tokens, 16),), (x, f, h_post, h_res, d_x_next, d_x, d_f, d_post, d_res)
        launch(post_res_backward_kernel, grid, *tensors, tokens, channels, n=n, BT=16, BC=block_channels(n), num_warps=4)
    return d_x, d_f, d_post, d_res


class _PostRes(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        f: Tensor,
        h_post: Tensor,
        h_res: Tensor,
        linked_x_next: Tensor | None,
        linked_f: Tensor | None,
        result: bool,
    ) -> Tensor:
        ctx.dtypes, ctx.linked = (h_post.dtype, h_res.dtype, x.dtype), linked_x_next is not None
        x, f, h_post, h_res = x.contiguous(), f.contiguous(), h_post.float().contiguous(), h_res.float().contiguous()
        # A link leaves x and H_res to the operation it is linked to.
        ctx.save_for_backward(*((f, h_post) if ctx.linked else (f, h_post, x, h_res)))
        return launch_post_res(x, f, h_post, h_res) if result else x.new_empty_strided(x.shape, (0, 0, 0))

    @staticmethod
    @once
    def backward(ctx: Any, d_x_next: Tensor) -> tuple[Tensor | None, ...]:
        d_x_next = d_x_next.contiguous()
        f, h_post, *rest = ctx.saved_tensors
        dtype_post, dtype_res, dtype_x = ctx.dtypes
        if not ctx.linked:
            x, h_res = rest
            d_x, d_f, d_post, d_res = launch_post_res_backward(d_x_next, x, f, h_post, h_res)
            return d_x, d_f, d_post.to(dtype_post), d_res.to(dtype_res), None, None, None
        d_f = launch_pre(d_x_next, h_post, f.dtype)  # f is one stream's worth of x': the same sum over streams
        return None, d_f, None, None, d_x_next, f.detach().to(dtype_x), None
