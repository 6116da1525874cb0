"""Sinkhorn-Knopp: order, invariants, gradients, and what far-apart logits do to it."""

import loops
import pytest
import torch
from kernel_cases import check_map

from pipehc.kernels.manifolds import Birkhoff


def normal(count, n, scale, seed=0):
    return scale * torch.randn(count, n, n, generator=torch.Generator().manual_seed(seed))


def adversarial(n):
    """One-hot +-50, a constant row or column far above the rest, all equal, and logits spread over +-50."""
    one_hot = torch.full((n, n, n), -50.0)
    for k in range(n):
        one_hot[k, torch.arange(n), (torch.arange(n) + k) % n] = 50.0
    row, column = torch.full((1, n, n), -50.0), torch.full((1, n, n), -50.0)
    row[0, 0], column[0, :, 0] = 50.0, 50.0
    single = torch.full((1, n, n), -50.0)
    single[0, 0, 0] = 50.0
    spread = (torch.rand(40, n, n, generator=torch.Generator().manual_seed(3)) - 0.5) * 100
    return torch.cat([one_hot, row, column, single, torch.zeros(1, n, n), spread])


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("iterations", [1, 2, 20])
def test_equals_loops_over_columns_then_rows(n, iterations):
    logits = normal(5, n, 2.0).double()
    got = Birkhoff(iterations).map(logits)
    for one, h in zip(logits, got):
        torch.testing.assert_close(h, torch.from_numpy(loops.sinkhorn(one.numpy(), iterations)), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("iterations", [1, 2, 5, 20])
def test_gradient_in_fp64(iterations):
    logits = normal(3, 3, 1.5).double().requires_grad_()
    assert torch.autograd.gradcheck(Birkhoff(iterations).map, (logits,))


# Read as variance 2, then as standard deviation 2: the share of 1e5 matrices whose columns are within 1e-2 after 20 iterations, and
# the worst column of all. A near-permutation converges slowly, whatever computes it: exact arithmetic has the same exceptions.
@pytest.mark.parametrize(
    ("n", "deviation", "share", "worst"),
    [(4, 2**0.5, 0.999, 0.025), (8, 2**0.5, 0.9999, 0.015), (4, 2.0, 0.98, 0.05), (8, 2.0, 0.99, 0.05)],
)
def test_rows_sum_to_one_and_columns_nearly(n, deviation, share, worst):
    logits = normal(100_000, n, deviation)
    h, exact = Birkhoff().map(logits), Birkhoff().map(logits.double())
    assert (h.sum(-1) - 1).abs().max() < 1e-6
    assert h.min() >= 0
    columns, exact_columns = ((m.sum(-2) - 1).abs().amax(-1) for m in (h, exact))
    assert (columns < 1e-2).double().mean() >= share and columns.max() < worst
    assert (columns - exact_columns).abs().max() < 1e-6


def test_order_is_columns_then_rows():
    h = Birkhoff(1).map(normal(50, 4, 2.0))
    assert (h.sum(-1) - 1).abs().max() < 1e-6 and (h.sum(-2) - 1).abs().max() > 0.05


@pytest.mark.parametrize("n", [2, 4])
def test_far_apart_logits_in_fp32(n):
    logits = adversarial(n)
    single, double = logits.clone().requires_grad_(), logits.double().requires_grad_()
    grad = normal(len(logits), n, 1.0, seed=5)
    got, want = Birkhoff().map(single), Birkhoff().map(double)
    got.backward(grad)
    want.backward(grad.double())
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5)
    assert (got.sum(-1) - 1).abs().max() < 1e-6
    assert (single.grad.double() - double.grad).norm() <= 1e-5 * double.grad.norm()


def test_composite_gain_over_sixty_random_sublayers():
    products = torch.eye(4).expand(64, 4, 4)
    for layer in range(60):
        products = Birkhoff().map(normal(64, 4, 2.0, seed=layer)) @ products
    gain = torch.maximum(products.abs().sum(-1).amax(-1), products.abs().sum(-2).amax(-1))
    assert float(gain.mean()) <= 1.7


@pytest.mark.parametrize(("n", "iterations"), [(1, 3), (2, 20), (3, 6), (4, 1), (4, 2), (4, 20)])
def test_kernel(n, iterations):
    h = check_map(Birkhoff(iterations), normal(70, n, 2.0), 1e-6, 1e-5)
    assert (h.sum(-1) - 1).abs().max() < 1e-6 and h.min() >= 0


@pytest.mark.slow
@pytest.mark.parametrize("n", [5, 8])
def test_kernel_of_many_streams(n):
    check_map(Birkhoff(11), normal(20, n, 2.0), 1e-6, 1e-5)


def test_kernel_of_far_apart_logits():
    h = check_map(Birkhoff(), adversarial(4), 1e-5, 1e-5)
    assert (h.sum(-1) - 1).abs().max() < 1e-6


def test_no_iterations_are_refused():
    with pytest.raises(ValueError, match="iterations=0: must be a whole number, at least 1"):
        Birkhoff(0)
