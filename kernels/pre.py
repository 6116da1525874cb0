# mypy: disable-error-code="assignment,misc"
"""F_pre: the input of a sub-layer from the streams, y = H_pre x."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pipehc.kernels.backend import backend_of
from pipehc.kernels.differentiation import matmul, once
from pipehc.kernels.language import launch, launches, tl, triton
from pipehc.kernels.shapes import check_others, check_shape, check_streams, coefficient_dtype
from pipehc.kernels.tiles import block_channels, fold, load_columns, load_tiles, store_rounded, zeros


def pre(x: Tensor, h_pre: Tensor) -> Tensor:
    """y [T, C] in the dtype of x: the sum of streams x [T, n, C] with weights h_pre [T, n], summed in fp32."""
    tokens, n, _ = check_streams(x)
    check_shape(h_pre, (tokens, n), "h_pre")
    check_others(x, h_pre=h_pre)
    if backend_of(x, n) == "reference":
        return pre_reference(x, h_pre)
    y: Tensor = _Pre.apply(x, h_pre)
    return y


def pre_reference(x: Tensor, h_pre: Tensor) -> Tensor:
    """The same in plain PyTorch."""
    dtype = coefficient_dtype(x)
    return matmul(h_pre.to(dtype).unsqueeze(1), x.to(dtype)).squeeze(1).to(x.dtype)


@triton.jit(do_not_specialize=["T"])
def pre_kernel(x, h_pre, y, T, C, n: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr):
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)[:, None]
    c = tl.program_id(1) * BC + tl.arange(0, BC)[None, :]
    tokens = t < T
    inside = tokens & (c < C)
    weights = load_columns(h_pre, t, tokens, n)
    streams = load_tiles(x, t, c, C, inside, n)
    out = weights[0] * streams[0].to(tl.float32)
    for j in tl.static_range(1, n):
        out += weights[j] * streams[j].to(tl.float32)
    store_rounded(y + t * C + c, out, inside)


@triton.jit(do_not_specialize=["T"])
def pre_backward_kernel(x, h_pre, d_y, d_x, d_pre, T, C, n: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr):
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)[:, None]
    tokens = t < T
    weights = load_columns(h_pre, t, tokens, n)
    sums = zeros(n, BT, BC // 8)
    for first in range(0, C, BC):
        c = first + tl.arange(0, BC)[None, :]
        inside = tokens & (c < C)
        grad = tl.load(d_y + t * C + c, mask=inside, other=0.0).to(tl.float32)
        streams = load_tiles(x, t, c, C, inside, n)
        new_sums = ()
        for j in tl.static_range(n):
            new_sums += (sums[j] + fold(grad * streams[j].to(tl.float32)),)
            store_rounded(d_x + t * (n * C) + j * C + c, weights[j] * grad, inside)
        sums = new_sums
    for j in tl.static_range(n):
        tl.store(d_pre + t * n + j, tl.sum(sums[j], 1, keep_dims=True), mask=tokens)


@launches
def launch_pre(x: Tensor, h_pre: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """y in one launch, in `dtype` or that of x; x [T, n, C] and h_pre [T, n] (fp32) contiguous. Also the gradient of f, from d_x'
    and H_post."""
    tokens, n, channels = x.shape
    y = x.new_empty(tokens, channels, dtype=dtype)
    if tokens:
        block = block_channels(n)
        grid = (triton.cdiv(tokens, 16), triton.cdiv(channels, block))
        launch(pre_kernel, grid, x, h_pre, y, tokens, channels, n=n, BT=16, BC=block, num_warps=4)
    return y


@launches
def launch_pre_backward(x: Tensor, h_pre: Tensor, d_y: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and H_pre in one launch; all contiguous, coefficients in fp32."""
    tokens, n, channels = x.shape
    d_x, d_pre = torch.empty_like(x), torch.empty_like(h_pre)
    if tokens:
        grid, tensors = (triton.cdiv(tokens, 16),), (x, h_pre, d_y, d_x, d_pre)
        launch(pre_backward_kernel, grid, *tensors, tokens, channels, n=n, BT=16, BC=block_channels(n), num_warps=4)
    return d_x, d_pre


class _Pre(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, h_pre: Tensor) -> Tensor:
        ctx.dtype_of_weights = h_pre.dtype
        x, h_pre = x.contiguous(), h_pre.float().contiguous()
        ctx.save_for_backward(x, h_pre)
        return launch_pre(x, h_pre)

    @staticmethod
    @once
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor, Tensor]:
        x, h_pre = ctx.saved_tensors
        d_x, d_pre = launch_pre_backward(x, h_pre, d_y.contiguous())
        return d_x, d_pre.to(ctx.dtype_of_weights)
