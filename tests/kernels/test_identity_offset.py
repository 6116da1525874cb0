"""Raw hyper-connections: no invariant, and a composite gain that grows with depth where the others' does not."""

import pytest
import torch
from kernel_cases import check_map

from pipehc.kernels.manifolds import IdentityOffset
from pipehc.model.hyper_connection import HyperConnection, expand


def test_is_the_identity_on_logits():
    logits = torch.randn(5, 3, 3)
    assert torch.equal(IdentityOffset().map(logits), logits)


@pytest.mark.parametrize("n", [1, 3])
def test_kernel(n):
    check_map(IdentityOffset(), torch.randn(9, n, n), 0.0, 0.0)


def gain_at_depth_sixty(kind):
    """Amax gain of the composite of 60 sub-layers with strong dynamic maps, mean over tokens."""
    generator = torch.Generator().manual_seed(11)
    x = expand(torch.randn(16, 1, 24, generator=generator), 4)
    x = x + 0.1 * torch.randn(x.shape, generator=generator)
    product = torch.eye(4).expand(16, 4, 4)
    with torch.no_grad():
        for _ in range(60):
            hc = HyperConnection(24, 4, kind, alpha=0.5, fixed=("pre", "post"))
            hc.reset_parameters(generator)
            hc.phi.normal_(0.0, 0.3, generator=generator)
            if kind == "harmonized":
                hc.s.fill_(0.05)
            y, h_post, h_res = hc.coefficients_pre(x)
            x = hc.post_res(x, torch.tanh(y), h_post, h_res)
            product = h_res @ product
    return float(torch.maximum(product.abs().sum(-1).amax(-1), product.abs().sum(-2).amax(-1)).mean())


def test_gain_runs_away_at_depth_and_the_manifolds_hold_it():
    raw = gain_at_depth_sixty("hc")
    assert raw > 300
    assert gain_at_depth_sixty("mhc") <= 1.7
    assert gain_at_depth_sixty("isohc") <= 2.0 + 1e-4  # the largest row sum of an isometry is sqrt(n)
    assert gain_at_depth_sixty("harmonized") < 5
