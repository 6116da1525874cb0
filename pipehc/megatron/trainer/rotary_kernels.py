"""Megatron's Triton kernels for the rotary embedding of latent attention, for what they are right for.

Upstream launches them with as many heads a program as was quickest in a measurement; where this does not divide the number of
heads, a program goes on into the heads of the next token (megatron-core 0.19.2). Here it divides it, and is the same in every run,
as gradients are sums over heads.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.fusions import fused_mla_yarn_rope_apply as upstream
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Any:
    return _rotate(upstream.rotary_fwd_q_kernel, x, cos, sin)


def rotate_back(x: Tensor, cos: Tensor, sin: Tensor) -> Any:
    return _rotate(upstream.rotary_bwd_q_kernel, x, cos, sin)


def join_keys(kv: Tensor, k_rope: Tensor, cos: Tensor, sin: Tensor, k_dim: int) -> Any:
    s, b, heads, width = kv.shape
    rope, v_dim = cos.shape[-1], width - k_dim
    if not (_in_rows(kv, k_rope) and _powers(k_dim, v_dim, rope)):
        return NotImplemented
    key, value = kv.new_empty(s, b, heads, k_dim + rope), kv.new_empty(s, b, heads, v_dim)
    strides = [n for t in (kv, k_rope, key, value) for n in _strides(t)]
    _launch(upstream.rotary_fwd_kv_kernel, kv, heads, (kv, k_rope, key, value, cos, sin, rope, k_dim, v_dim, heads), b, strides)
    return key, value


def join_keys_backward(dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor) -> Any:
    s, b, heads, width = dk.shape
    rope, v_dim = cos.shape[-1], dv.shape[-1]
    k_dim = width - rope
    if not (_in_rows(dk, dv) and _powers(k_dim, v_dim, rope)):
        return NotImplemented
    dkv, drope = dk.new_empty(s, b, heads, k_dim + v_dim), dk.new_empty(s, b, rope)
    strides = [n for t in (dk, dv, dkv, drope) for n in _strides(t)]
    _launch(upstream.rotary_bwd_kv_kernel, dk, heads, (dk, dv, dkv, drope, cos, sin, rope, k_dim, v_dim, heads), b, strides)
    return dkv, drope


def _rotate(kernel: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Any:
    heads, rope = x.shape[-2:]
    if not (_in_rows(x) and _powers(rope)):
        return NotImplemented
    _launch(kernel, x, heads, (x, cos, sin, 0, rope, heads), x.shape[1], _strides(x))
    return None


def _launch(kernel: Any, x: Tensor, heads: int, arguments: tuple[Any, ...], batch: int, strides: Any) -> None:
    """One program for every token and some of its heads. No sequences are joined, and none is split over processes."""
    own = min(heads & -heads, 32)
    with torch.cuda.device_of(x):
        kernel.fn[x.shape[0] * batch, heads // own](*arguments, batch, None, None, *strides, 0, 1, BLOCK_H=own)


def _strides(x: Tensor) -> tuple[int, ...]:
    """From token to token, and from head to head."""
    return x.stride()[1:-1] if x.shape[1] > 1 else (x.stride(0), *x.stride()[2:-1])


def _in_rows(*tensors: Tensor) -> bool:
    """Whether tokens follow each other at one distance."""
    return all(t.stride(-1) == 1 and (t.shape[1] == 1 or t.stride(0) == t.shape[1] * t.stride(1)) for t in tensors)


def _powers(*sizes: int) -> bool:
    """What a tile of Triton can have as an edge."""
    return all(n > 1 and n & (n - 1) == 0 for n in sizes)
