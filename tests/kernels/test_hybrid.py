"""The blend of isometric and doubly stochastic maps, and the gradient of lambda."""

import loops
import pytest
import torch
from kernel_cases import DEVICE, check_map, relative_error, run_map

from pipehc.kernels.manifolds import Birkhoff, Hybrid, Isometric


def logits_of(n, count=6):
    return 1.5 * torch.randn(count, n, n, generator=torch.Generator().manual_seed(n))


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_equals_loops(share):
    logits = logits_of(4).double()
    got = Hybrid(torch.tensor(share), isometric=Isometric(1e5)).map(logits)
    for one, h in zip(logits, got):
        want = loops.h_res("hybrid", one.numpy(), scalar=share)
        torch.testing.assert_close(h, torch.from_numpy(want), rtol=1e-6, atol=1e-7)


def test_gradient_of_logits_and_lambda_in_fp64():
    logits, share = logits_of(3, 2).double().requires_grad_(), torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z, s: Hybrid(s, Birkhoff(4)).map(z), (logits, share))


def test_kernel():
    share = torch.tensor(0.3, device=DEVICE, requires_grad=True)
    manifold = Hybrid(share, Birkhoff(3), Isometric(30.0))
    logits = logits_of(3, 20)
    check_map(manifold, logits, 2e-6, 1e-5)
    grad = torch.randn(logits.shape)
    _, _, by_share = run_map(manifold, logits, grad)
    exact = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    Hybrid(exact, Birkhoff(3), Isometric(30.0)).map(logits.double()).backward(grad.double())
    assert relative_error(by_share.sum().cpu(), exact.grad) < 1e-5
