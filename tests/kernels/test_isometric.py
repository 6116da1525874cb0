"""The polar retraction: isometry for badly conditioned logits, equality with an SVD, gradients."""

import loops
import pytest
import torch
from kernel_cases import check_map, run_map

from pipehc.kernels.manifolds import Isometric
from pipehc.kernels.manifolds.isometric import EARLY_LOW, HIGHEST, cubic_steps


def with_condition(count, n, condition, seed=0):
    """Logits whose block on the complement of 1 has singular values spread over [1 / condition, 1], plus parts it must ignore."""
    g = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.cat([torch.ones(n, 1), torch.randn(n, n - 1, generator=g)], 1).double())[0][:, 1:]
    left, _ = torch.linalg.qr(torch.randn(count, n - 1, n - 1, generator=g).double())
    right, _ = torch.linalg.qr(torch.randn(count, n - 1, n - 1, generator=g).double())
    values = condition ** -torch.rand(count, n - 1, generator=g).double()
    values[:, 0], values[:, -1] = 1.0, 1.0 / condition
    scale = 10.0 ** (4 * torch.rand(count, 1, 1, generator=g).double() - 2)
    inner = scale * basis @ (left * values.unsqueeze(1)) @ right @ basis.T
    ones = torch.ones(n, 1).double()
    means = ones @ torch.randn(1, n, generator=g).double() + torch.randn(n, 1, generator=g).double() @ ones.T
    return (inner + scale * means).float()


def isometry_error(h):
    n = h.shape[-1]
    return float((h.mT @ h - torch.eye(n, device=h.device)).abs().max()), float((h.sum(-1) - 1).abs().max())


@pytest.mark.parametrize("n", [2, 3, 4, 8])
@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4])
def test_isometry_in_fp32(n, condition):
    h = Isometric().map(with_condition(200, n, condition))
    assert max(isometry_error(h)) < 1e-5


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7])
def test_equals_the_polar_factor_of_an_svd(n):
    logits = 2 * torch.randn(6, n, n, generator=torch.Generator().manual_seed(2)).double()
    for one, h in zip(logits, Isometric(1e6).map(logits)):
        torch.testing.assert_close(h, torch.from_numpy(loops.polar_on_complement(one.numpy())), rtol=1e-7, atol=1e-9)


def test_gradient_in_fp64():
    logits = torch.randn(4, 4, 4, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    assert torch.autograd.gradcheck(Isometric().map, (logits,))


def test_steps_never_overshoot_and_end_at_one():
    for condition in (1.0, 10.0, 1e4, 1e6):
        values = torch.logspace(0, -torch.log10(torch.tensor(condition * 4)).item(), 2000, dtype=torch.float64) * HIGHEST
        for a, b in cubic_steps(condition):
            values = a * values - b * values**3
            assert values.max() <= HIGHEST + 1e-9
        assert (values - 1).abs().max() < 1e-11
    assert len(cubic_steps(1e4)) == 19
    a, b = cubic_steps(1e4)[0]
    assert a * EARLY_LOW - b * EARLY_LOW**3 == pytest.approx(2 - HIGHEST)  # the error at the lower end equals the overshoot


def test_energy_is_kept_over_sixty_random_sublayers():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(32, 4, 8, generator=g)
    start, mean = x.square().sum(1), x.mean(1)
    for _ in range(60):
        x = Isometric().map(2 * torch.randn(32, 4, 4, generator=g)) @ x
    torch.testing.assert_close(x.square().sum(1), start, rtol=1e-4, atol=0)
    torch.testing.assert_close(x.mean(1), mean, rtol=1e-4, atol=1e-5)


def test_equal_logits_stay_finite():
    logits = torch.zeros(2, 4, 4, requires_grad=True)
    h = Isometric().map(logits)
    h.sum().backward()
    assert torch.isfinite(h).all() and torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("n", [1, 3, 4])
def test_kernel(n):
    logits = 2 * torch.eye(n) + torch.randn(40, n, n, generator=torch.Generator().manual_seed(4))
    h = check_map(Isometric(100.0), logits, 2e-6, 1e-5)
    assert max(isometry_error(h)) < 1e-5


@pytest.mark.parametrize(("n", "condition"), [(4, 1.0), (2, 1e4), (3, 1e4), (4, 1e4), (8, 1e4)])
def test_kernel_keeps_the_isometry_for_bad_conditions(n, condition):
    logits = with_condition(60, n, condition)
    out, d_z, _ = run_map(Isometric(), logits, torch.zeros_like(logits))
    assert max(isometry_error(out)) < 1e-5 and not d_z.any()


@pytest.mark.parametrize("condition", [1.0, 1e4])
def test_kernel_is_as_exact_as_the_condition_allows(condition):
    """A polar factor moves by 2 |dA| / (s + s'), s and s' the two least singular values, and fp32 rounds A by 2^-24 |A|: the error
    is a small multiple of 2^-24 kappa with kappa = |A| / (s + s'). The gradient, |G| / (s + s') in size, goes back through the
    steps, which have stretched s to 1 alone: there rounding may weigh up to |A| / s as much."""
    logits = with_condition(60, 4, condition, seed=5)
    grad = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    out, d_z, _ = run_map(Isometric(), logits, grad)
    exact = logits.double().requires_grad_()
    want = Isometric().map(exact)
    want.backward(grad.double())
    centre = torch.eye(4, dtype=torch.float64) - 0.25
    values = torch.linalg.svdvals(centre @ logits.double() @ centre)[:, :3]  # the fourth is that of the direction of ones
    # |A| with the means: what centring takes out was rounded too.
    gap = values[:, 1] + values[:, 2]
    kappa = logits.double().flatten(1).norm(dim=1) / gap
    unit = 2.0**-24 * kappa
    assert ((out.cpu() - want.detach()).abs().amax((1, 2)) <= 10 * unit).all()
    error = (d_z.cpu() - exact.grad).flatten(1).norm(dim=1)
    stretched = logits.double().flatten(1).norm(dim=1) / values[:, 2]
    assert (error <= (20 + stretched / 5) * unit * grad.flatten(1).norm(dim=1) / gap).all()


def test_kernel_of_many_streams():
    check_map(
        Isometric(30.0), 2 * torch.eye(7) + 0.3 * torch.randn(9, 7, 7, generator=torch.Generator().manual_seed(4)), 2e-6, 1e-5
    )


def test_bad_condition_is_refused():
    with pytest.raises(ValueError, match=r"condition=0.1: must lie in \[1, 1e8\]"):
        Isometric(0.1)
