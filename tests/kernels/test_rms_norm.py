"""RMSNorm against PyTorch's, and its first and second derivatives."""

import torch

from pipehc.kernels.rms_norm import rms_norm


def inputs(*shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=generator).to(dtype), 1 + 0.3 * torch.randn(shape[-1], generator=generator).to(dtype)


def test_equals_that_of_pytorch():
    x, weight = inputs(4, 3, 8)
    torch.testing.assert_close(rms_norm(x, weight, 1e-6), torch.nn.functional.rms_norm(x, (8,), weight, 1e-6))


def test_derivatives_of_first_and_second_order():
    leaves = [t.requires_grad_() for t in inputs(2, 3)]
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-6), leaves)
    assert torch.autograd.gradgradcheck(lambda x, w: rms_norm(x, w, 1e-6).square(), leaves)
