"""Rotary embeddings of latent attention without copies: queries turn in place, keys and values are written once."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from megatron.core.models.common.embeddings import RotaryEmbedding
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipehc.megatron.fused import fused
from pipehc.megatron.trainer import rotary_kernels


class Rotation(NamedTuple):
    """Cosines and sines of all positions of a sequence, fp32 [s, 1, 1, r]; the two halves of r are equal."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def build(cls, length: int, dim: int, theta: float, cp_group: Any) -> Rotation:
        """For sequences of `length`, on the current device; angles as Megatron has them."""
        angles = RotaryEmbedding(dim, 1.0, rotary_base=theta, cp_group=cp_group).get_emb(length)  # type: ignore[arg-type]
        return cls(angles.cos(), angles.sin())

    def first(self, length: int) -> Rotation:
        return Rotation(self.cos[:length], self.sin[:length])

    def queries(self, q: Tensor, heads: int) -> Tensor:
        """[s, b, h * (d + r)], the result of a product that saved none of it -> [s, b, h, d + r], turned in place."""
        turned: Tensor = _Queries.apply(q, *self.first(q.shape[0]), heads)
        return turned.unflatten(-1, (heads, -1))

    def keys_and_values(self, kv: Tensor, k_rope: Tensor, heads: int, k_dim: int) -> tuple[Tensor, Tensor]:
        """kv [s, b, h * (k_dim + v_dim)], and k_rope [s, b, r], which all heads share -> keys [s, b, h, k_dim + r], values."""
        both: tuple[Tensor, Tensor] = _KeysAndValues.apply(kv.unflatten(-1, (heads, -1)), k_rope, *self.first(kv.shape[0]), k_dim)
        return both


class _Queries(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
        ctx.mark_dirty(q)
        ctx.save_for_backward(cos, sin)
        ctx.heads = heads
        rotate(_rope_part(q, heads, cos), cos, sin)
        return q

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        # In place: nobody else holds what the attention made of its queries' gradient.
        rotate_back(_rope_part(dq, ctx.heads, cos), cos, sin)
        return dq, None, None, None


class _KeysAndValues(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kv: Tensor, k_rope: Tensor, cos: Tensor, sin: Tensor, k_dim: int) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return join_keys(kv, k_rope, cos, sin, k_dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        return *join_keys_backward(dk, dv, *ctx.saved_tensors), None, None, None


def _rope_part(q: Tensor, heads: int, cos: Tensor) -> Tensor:
    return q.unflatten(-1, (heads, -1))[..., -cos.shape[-1] :]


@fused(mutates=("x",), cuda=rotary_kernels.rotate)
def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """x [s, b, h, r] in place: its pairs (2i, 2i + 1), turned by the angles of their position, go to (i, i + r/2)."""
    x.copy_(_turned(x, cos, sin))


@fused(mutates=("x",), cuda=rotary_kernels.rotate_back)
def rotate_back(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """What `rotate` undoes, which is its gradient."""
    x.copy_(_turned_back(x, cos, sin))


@fused(cuda=rotary_kernels.join_keys)
def join_keys(kv: Tensor, k_rope: Tensor, cos: Tensor, sin: Tensor, k_dim: int) -> tuple[Tensor, Tensor]:
    """See `Rotation.keys_and_values`."""
    rope = _turned(k_rope.unsqueeze(-2), cos, sin).to(kv.dtype).expand(-1, -1, kv.shape[-2], -1)
    return torch.cat((kv[..., :k_dim], rope), -1), kv[..., k_dim:].clone(memory_format=torch.contiguous_format)


@fused(cuda=rotary_kernels.join_keys_backward)
def join_keys_backward(dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of kv and k_rope."""
    k_dim = dk.shape[-1] - cos.shape[-1]
    rope = dk[..., k_dim:].sum(-2, keepdim=True, dtype=torch.promote_types(dk.dtype, torch.float32))
    return torch.cat((dk[..., :k_dim], dv), -1), _turned_back(rope, cos, sin).squeeze(-2).to(dk.dtype)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1] // 2
    cos, sin, even, odd = cos[..., :half], sin[..., :half], x[..., 0::2], x[..., 1::2]
    return torch.cat((even * cos - odd * sin, odd * cos + even * sin), -1)


def _turned_back(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1] // 2
    cos, sin, left, right = cos[..., :half], sin[..., :half], x[..., :half], x[..., half:]
    return torch.stack((left * cos + right * sin, right * cos - left * sin), -1).flatten(-2)
