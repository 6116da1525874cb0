"""Raw maps pulled towards the identity by one scalar."""

import loops
import pytest
import torch
from kernel_cases import DEVICE, check_map

from pipehc.kernels import coefficients
from pipehc.kernels.manifolds import Harmonized


@pytest.mark.parametrize("s", [0.0, 0.35, 1.0])
def test_equals_loops(s):
    logits = torch.randn(5, 4, 4).double()
    for one, h in zip(logits, Harmonized(torch.tensor(s, dtype=torch.float64)).map(logits)):
        torch.testing.assert_close(h, torch.from_numpy(loops.h_res("harmonized", one.numpy(), scalar=s)))


def test_gradient_in_fp64_and_none_for_s():
    s = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    logits = torch.randn(2, 3, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(Harmonized(s).map, (logits,))
    Harmonized(s).map(logits).sum().backward()
    assert s.grad is None


def test_s_changed_in_place_takes_effect():
    s = torch.tensor(1.0)
    manifold, logits = Harmonized(s), torch.randn(2, 3, 3)
    assert torch.equal(manifold.map(logits), torch.eye(3) + (logits - torch.eye(3)))
    s.fill_(0.0)
    assert torch.equal(manifold.map(logits), torch.eye(3).expand(2, 3, 3))


@pytest.mark.parametrize("n", [1, 4])
def test_kernel(n):
    check_map(Harmonized(torch.tensor(0.35, device=DEVICE)), torch.randn(9, n, n), 1e-6, 1e-6)


def test_static_form():
    n, tokens = 3, 4
    bias = torch.randn(n * n + 2 * n, dtype=torch.float64, requires_grad=True)
    x, none = torch.randn(tokens, n, 5, dtype=torch.float64), torch.empty(0, dtype=torch.float64)
    manifold = Harmonized(torch.tensor(0.5, dtype=torch.float64), unconditioned=True)
    h_pre, h_post, h_res = coefficients(x, none, none, bias, manifold=manifold)
    torch.testing.assert_close(h_pre, torch.softmax(bias[:n], 0).expand(tokens, n))
    torch.testing.assert_close(h_post, torch.softmax(bias[n : 2 * n], 0).expand(tokens, n))
    torch.testing.assert_close(h_res[1], torch.eye(n).double() + 0.5 * 0.05 * bias[2 * n :].view(n, n))
    assert torch.autograd.gradcheck(lambda b: coefficients(x, none, none, b, manifold=manifold), (bias,))
