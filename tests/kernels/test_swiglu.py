"""SwiGLU: reference against autograd's own, to the bit; kernel against the reference in fp64; made again to the bit."""

import pytest
import torch
from kernel_cases import DEVICE, TOLERANCE, backend, relative_error

from pipehc.kernels.swiglu import swiglu, swiglu_backward_

SHAPES = [(0, 4), (1, 1), (5, 20), (3, 1024), (2, 1100), (7, 33)]


def inputs(rows, width, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    h, d_out = torch.randn(rows, 2 * width, generator=g).to(dtype), torch.randn(rows, width, generator=g).to(dtype)
    return h.to(DEVICE), torch.rand(rows, generator=g).to(DEVICE), d_out.to(DEVICE)


def plain(h, probs, d_out):
    """What Megatron's MLP computes eagerly, with autograd's gradients."""
    h = h.clone().requires_grad_()
    gate, up = torch.chunk(h, 2, dim=-1)
    out = torch.nn.functional.silu(gate) * up
    if probs is not None:
        probs = probs.clone().requires_grad_()
        out = (out * probs.unsqueeze(-1)).to(h.dtype)
    out.backward(d_out)
    return out.detach(), h.grad, None if probs is None else probs.grad


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_reference_is_the_eager_one_to_the_bit_in_fp32(rows, width, weighted):
    h, probs, d_out = inputs(rows, width, torch.float32)
    probs = probs if weighted else None
    out, d_h, d_probs = plain(h, probs, d_out)
    with backend("reference"):
        assert torch.equal(swiglu(h, probs), out)
        found = swiglu_backward_(given := d_out.clone(), h, probs)
    assert torch.equal(h, d_h) and torch.equal(given, d_out)
    assert found is None if d_probs is None else torch.equal(found, d_probs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_kernel(rows, width, weighted, dtype):
    """And of the eager form, in bf16, which rounds after every step: the kernel is nearer to the truth."""
    h, probs, d_out = inputs(rows, width, dtype)
    probs = probs if weighted else None
    wanted = plain(h.double(), None if probs is None else probs.double(), d_out.double())
    for name in ("triton", "reference"):
        with backend(name):
            out, d_h, again = swiglu(h, probs), h.clone(), d_out.clone()
            found = out, d_h, swiglu_backward_(again, d_h, probs, again=True)
        assert torch.equal(out, again), name
        for got, want in zip(found, wanted):
            if want is not None:
                assert relative_error(got, want) <= TOLERANCE[dtype], name
    if dtype == torch.bfloat16 and rows * width > 50:
        eager = plain(h, probs, d_out)
        assert relative_error(found[0], wanted[0]) <= relative_error(eager[0], wanted[0])


@pytest.mark.parametrize("name", ["triton", "reference"])
def test_large_numbers_stay_finite(name):
    h = torch.tensor([[-200.0, 200.0, 3.0, 3.0]], device=DEVICE)
    with backend(name):
        out = swiglu(h)
        swiglu_backward_(torch.ones(1, 2, device=DEVICE), h)
    assert out.tolist() == [[0.0, 600.0]] and h.tolist() == [[0.0, 3.0, 0.0, 200.0]]


@pytest.mark.parametrize("name", ["triton", "reference"])
def test_torch_is_told_that_they_are_overwritten(name):
    h, _, d_out = inputs(3, 8, torch.float32)
    before = h._version, d_out._version
    with backend(name):
        swiglu_backward_(d_out, h)
        assert h._version > before[0] and d_out._version == before[1]
        swiglu_backward_(d_out, h, again=True)
    assert d_out._version > before[1]
