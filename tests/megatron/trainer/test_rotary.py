"""Queries, keys and values of latent attention against Megatron's own; its kernels, in Triton's interpreter, against ours."""

import pytest
import torch
from megatron.core.fusions import fused_mla_yarn_rope_apply as upstream
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd
from torch import Tensor

import pipehc.kernels.language  # noqa: F401 (repairs the interpreter)
from pipehc.megatron.trainer import rotary_kernels
from pipehc.megatron.trainer.rotary import Rotation, join_keys, join_keys_backward, rotate, rotate_back

K, V, R, LONGEST = 8, 16, 4, 13  # of a head: keys without position, values, and the part that is turned; positions


def angles(length: int = LONGEST) -> Tensor:
    found = torch.outer(torch.arange(length).float(), torch.tensor([1.0, 0.3]))
    return torch.cat((found, found), -1)[:, None, None]


def rotation(length: int = LONGEST) -> Rotation:
    return Rotation(angles(length).cos(), angles(length).sin())


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def gradients(outputs: tuple[Tensor, ...], leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    given = [random(*y.shape, dtype=y.dtype, seed=5 + i) for i, y in enumerate(outputs)]
    return torch.autograd.grad(outputs, leaves, given)


def turned(x: Tensor) -> Tensor:
    return _apply_rotary_pos_emb_bshd(x, angles(x.shape[0]), mla_rotary_interleaved=True)


@pytest.mark.parametrize(("s", "b", "heads"), [(LONGEST, 1, 3), (5, 2, 4), (1, 1, 1)])
def test_queries_are_upstreams_to_the_bit(s, b, heads):
    q = random(s, b, heads * (K + R)).requires_grad_()
    parts = (2 * q).unflatten(-1, (heads, -1)).split([K, R], -1)
    plain = torch.cat((parts[0], turned(parts[1])), -1)
    ours = rotation().queries(2 * q, heads)
    assert torch.equal(ours, plain)
    assert torch.equal(*(gradients((y,), (q,))[0] for y in (ours, plain)))


@pytest.mark.parametrize(("s", "b", "heads"), [(LONGEST, 1, 3), (5, 2, 4), (1, 1, 1)])
def test_keys_and_values_are_upstreams_to_the_bit(s, b, heads):
    kv, latent = random(s, b, heads, K + V).requires_grad_(), random(s, b, 20 + R, seed=1).requires_grad_()
    k_rope = latent[..., -R:]
    k, value = kv.split([K, V], -1)
    key = torch.cat((k, turned(k_rope.unsqueeze(-2)).expand(-1, -1, heads, -1)), -1)
    ours = rotation().keys_and_values(kv.flatten(2), k_rope, heads, K)
    assert torch.equal(ours[0], key) and torch.equal(ours[1], value) and ours[1].is_contiguous()
    for mine, plain in zip(gradients(ours, (kv, latent)), gradients((key, value), (kv, latent))):
        assert torch.equal(mine, plain)


def test_angles_are_those_of_the_first_positions_whatever_the_length():
    q = random(5, 1, 2 * (K + R))
    assert torch.equal(rotation(5).queries(q.clone(), 2), rotation(LONGEST).queries(q.clone(), 2))


def test_16_bit_turns_in_fp32():
    q = random(LONGEST, 1, 3 * (K + R), dtype=torch.bfloat16)
    exact = rotation().queries(q.double(), 3)
    assert torch.equal(rotation().queries(q.clone(), 3), exact.bfloat16())


@pytest.mark.parametrize(("b", "heads"), [(1, 1), (2, 6), (1, 32)])
def test_upstreams_kernels_agree(b, heads):
    cos, sin = rotation(2)
    for kernel, plain in ((rotary_kernels.rotate, rotate), (rotary_kernels.rotate_back, rotate_back)):
        whole = random(2, b, heads, K + R)
        other = whole.clone()
        assert kernel(whole[..., K:], cos, sin) is None
        plain(other[..., K:], cos, sin)
        torch.testing.assert_close(whole, other)
        assert torch.equal(whole[..., :K], other[..., :K])
    for kernel, plain, *given in (
        (rotary_kernels.join_keys, join_keys, random(2, b, heads, K + V), random(2, b, 20 + R)[..., -R:], cos, sin, K),
        (rotary_kernels.join_keys_backward, join_keys_backward, random(2, b, heads, K + R), random(2, b, heads, V), cos, sin),
    ):
        for mine, ours in zip(kernel(*given), plain(*given), strict=True):
            torch.testing.assert_close(mine, ours, rtol=1e-5, atol=1e-5)  # sums over heads in another order


def test_upstreams_kernels_turn_16_bit_in_fp32():
    """Forward; in the backward the interpreter negates the bits of a bf16, which a GPU does not."""
    cos, sin = rotation(2)
    q, kv, k_rope = (random(*shape, dtype=torch.bfloat16) for shape in ((2, 1, 3, R), (2, 1, 3, K + V), (2, 1, R)))
    other = q.clone()
    rotary_kernels.rotate(q, cos, sin)
    rotate(other, cos, sin)
    assert torch.equal(q, other)
    for mine, ours in zip(rotary_kernels.join_keys(kv, k_rope, cos, sin, K), join_keys(kv, k_rope, cos, sin, K), strict=True):
        assert torch.equal(mine, ours)


def test_upstreams_own_launch_goes_on_into_the_next_token():
    """Why we choose the heads of a program: here 2 of 3, which upstream may find the quickest."""
    q, (cos, sin) = random(2, 1, 3, R), rotation(2)
    plain = q.clone()
    rotate(plain, cos, sin)
    memory = torch.cat((q.flatten(), torch.zeros(R)))  # what is behind the last token
    wrong = memory[: q.numel()].view_as(q)
    upstream.rotary_fwd_q_kernel.fn[2, 2](wrong, cos, sin, 0, R, 3, 1, None, None, 3 * R, R, 0, 1, BLOCK_H=2)
    assert not torch.allclose(wrong, plain)


def test_kernels_leave_what_they_were_not_made_for():
    cos, sin = rotation(3)
    assert rotary_kernels.rotate(random(3, 2, 2, R).transpose(0, 1)[:3], cos, sin) is NotImplemented
    assert rotary_kernels.join_keys(random(3, 1, 2, 6 + V), random(3, 1, R), cos, sin, 6) is NotImplemented
    assert rotary_kernels.join_keys_backward(random(3, 1, 2, K + R), random(3, 1, 2, 12), cos, sin) is NotImplemented
    odd = torch.randn(3, 1, 1, 6)
    assert rotary_kernels.rotate(random(3, 1, 2, 6), odd, odd) is NotImplemented
