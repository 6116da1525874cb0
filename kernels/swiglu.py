# mypy: disable-error-code="assignment,misc"
"""SwiGLU of feed-forward networks: silu(gate) * up, for experts times the probability of their token, each way in one launch."""

from __future__ import annotations

import torch
from torch import Tensor

from pipehc.kernels.backend import backend_of
from pipehc.kernels.language import launch, launches, tl, triton
from pipehc.kernels.shapes import coefficient_dtype
from pipehc.kernels.tiles import store_rounded


def swiglu(h: Tensor, probs: Tensor | None = None) -> Tensor:
    """[T, F] in the dtype of h: silu of the first half of h [T, 2F] times the second half, times probs [T] if there are any.

    Computed in fp32 (fp64 for h in fp64) and rounded once.
    """
    if backend_of(h.unsqueeze(1), 1) == "triton":
        return launch_swiglu(h.contiguous(), None if probs is None else probs.contiguous())
    gate, up = h.to(coefficient_dtype(h)).chunk(2, dim=-1)
    out = torch.nn.functional.silu(gate) * up
    if probs is not None:
        out = out * probs.unsqueeze(-1)
    return out.to(h.dtype)


def swiglu_backward_(d_out: Tensor, h: Tensor, probs: Tensor | None = None, again: bool = False) -> Tensor | None:
    """Turns h, contiguous [T, 2F], into its gradient, and with `again` d_out, contiguous [T, F], into what `swiglu` returned, made
    once more, to the bit: a backward has both to spare, and experts hold no second tensor of either size. Returns the gradient of
    probs.

    A graph that kept h can be differentiated once: a second time torch says that h was modified.
    """
    if backend_of(h.unsqueeze(1), 1) == "triton":
        return launch_swiglu_backward(h, None if probs is None else probs.contiguous(), d_out, again)
    wide = coefficient_dtype(h)
    gate, up = h.to(wide).chunk(2, dim=-1)
    silu, d, d_probs = torch.nn.functional.silu(gate), d_out.to(wide), None
    out = silu * up if again or probs is not None else None
    if probs is not None:
        assert out is not None
        d_probs = (d * out).sum(-1).to(probs.dtype)
        d = d * probs.unsqueeze(-1)
        out = out * probs.unsqueeze(-1)
    d_gate, d_up = torch.ops.aten.silu_backward(d * up, gate), d * silu
    for half, gradient in zip(h.chunk(2, dim=-1), (d_gate, d_up)):
        half.copy_(gradient)
    if again:
        assert out is not None
        d_out.copy_(out)
    return d_probs


@triton.jit
def _out(gate, up, probability):
    """One formula for both ways, so that what is made again is equal to the bit."""
    return gate * tl.sigmoid(gate) * up * probability


@triton.jit
def swiglu_kernel(h, probs, out, F, B: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * B + tl.arange(0, B)
    inside = c < F
    gate = tl.load(h + row * (2 * F) + c, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(h + row * (2 * F) + F + c, mask=inside, other=0.0).to(tl.float32)
    probability = 1.0
    if probs is not None:
        probability = tl.load(probs + row).to(tl.float32)
    store_rounded(out + row * F + c, _out(gate, up, probability), inside)


@triton.jit
def swiglu_backward_kernel(h, probs, d_out, d_h, d_probs, out, F, B: tl.constexpr):
    """d_h may be h, and out d_out."""
    row = tl.program_id(0).to(tl.int64)
    probability = 1.0
    if probs is not None:
        probability = tl.load(probs + row).to(tl.float32)
    sums = tl.zeros([B], tl.float32)
    for first in range(0, F, B):
        c = first + tl.arange(0, B)
        inside = c < F
        gate = tl.load(h + row * (2 * F) + c, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(h + row * (2 * F) + F + c, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(d_out + row * F + c, mask=inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        sums += grad * (gate * sigmoid * up)
        grad *= probability
        tl.debug_barrier()  # what is written in the place of what is read: by another thread, where rows are not aligned
        store_rounded(d_h + row * (2 * F) + c, grad * up * sigmoid * (1.0 + gate * (1.0 - sigmoid)), inside)
        store_rounded(d_h + row * (2 * F) + F + c, grad * (gate * sigmoid), inside)
        if out is not None:
            store_rounded(out + row * F + c, _out(gate, up, probability), inside)
    if probs is not None:
        tl.store(d_probs + row, tl.sum(sums, 0))


@launches
def launch_swiglu(h: Tensor, probs: Tensor | None) -> Tensor:
    """`swiglu` in one launch, of contiguous tensors."""
    rows, width = h.shape[0], h.shape[1] // 2
    out = h.new_empty(rows, width)
    if rows:
        block = _block(width)
        launch(swiglu_kernel, (rows, triton.cdiv(width, block)), h, probs, out, width, B=block, num_warps=4)
    return out


@launches
def launch_swiglu_backward(h: Tensor, probs: Tensor | None, d_out: Tensor, again: bool) -> Tensor | None:
    """`swiglu_backward_` in one launch."""
    assert h.is_contiguous() and d_out.is_contiguous()
    rows, width = h.shape[0], h.shape[1] // 2
    d_probs = None if probs is None else torch.empty_like(probs)
    if rows:
        out = d_out if again else None
        launch(swiglu_backward_kernel, (rows,), h, probs, d_out, h, d_probs, out, width, B=_block(width), num_warps=4)
        for written in (h, d_out) if again else (h,):
            torch.autograd.graph.increment_version(written)
    return d_probs


def _block(width: int) -> int:
    """Channels at a time: eight for each thread of four warps, fewer in a narrow row."""
    return min(1024, max(16, triton.next_power_of_2(width)))
