"""Where hyper-connections start: all starts but `scattered` are the plain residual at alpha = 0; streams come apart, or not."""

import itertools
from typing import get_args

import pytest
import torch

from pipehc.config.schema import ResidualConfig
from pipehc.kernels.manifolds import KINDS
from pipehc.model.hyper_connection import HyperConnection, contract, expand
from pipehc.model.start import INITS, SHARES, read_logits, reads

C, N, DEPTH = 6, 4, 8


def chain(kind, init, *, alpha=0.0, static=False, n=N):
    """What DEPTH sub-layers make of equal streams: under the plain residual, and under `kind`. F is tanh(norm(x) W)."""
    generator = torch.Generator().manual_seed(3)
    settings = {"alpha": alpha, "init": init, "static": static}
    connections = [HyperConnection(C, n, kind, sublayer=k, **settings).double() for k in range(DEPTH)]
    for connection in connections:
        connection.reset_parameters(generator)
    weights = [torch.randn(C, C, dtype=torch.float64, generator=torch.Generator().manual_seed(k)) for k in range(DEPTH)]
    x = torch.randn(5, 2, C, dtype=torch.float64, generator=torch.Generator().manual_seed(99))

    def f(k, y):
        return torch.tanh(torch.nn.functional.rms_norm(y, (C,)) @ weights[k])

    plain = x
    for k in range(DEPTH):
        plain = plain + f(k, plain)
    streams = expand(x, n)
    for k, connection in enumerate(connections):
        y, h_post, h_res = connection.coefficients_pre(streams)
        streams = connection.post_res(streams, f(k, y), h_post, h_res)
    return plain, streams


def test_the_configuration_knows_them():
    assert set(get_args(ResidualConfig.model_fields["init"].annotation)) == set(INITS) == set(SHARES)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("init", ["even", "staggered", "onehot"])
@pytest.mark.parametrize("n", [1, 3, 4])
def test_equals_the_plain_residual_without_alpha(kind, init, n):
    plain, streams = chain(kind, init, n=n)
    torch.testing.assert_close(contract(streams, n), plain, rtol=1e-6, atol=1e-6)  # H_res of mhc is the identity to 1e-7


def test_scattered_does_not():
    plain, streams = chain("mhc", "scattered")
    assert (contract(streams, N) - plain).abs().max() > 0.01


@pytest.mark.parametrize("init, n", itertools.product(INITS, (2, 4, 8)))
def test_what_a_sublayer_reads(init, n):
    for sublayer in range(2 * n):
        share, logits = reads(init, sublayer, n), read_logits(init, sublayer, n)
        assert share.sum() == pytest.approx(1, abs=1e-15) and torch.isfinite(logits).all()
        torch.testing.assert_close(torch.sigmoid(logits), share, rtol=0, atol=1.1e-3)
        if init != "even":
            assert int(share.argmax()) == sublayer % n and share.max() == SHARES[init]


def test_raw_hc_reads_one_stream_exactly():
    """As arXiv:2409.19606 starts."""
    connection = HyperConnection(C, N, "hc", alpha=0.0, init="onehot", sublayer=6)
    h_pre, h_post, h_res = connection.coefficients(torch.randn(1, 3, N * C))
    assert torch.equal(h_pre, torch.eye(N)[2].expand(3, N)) and torch.equal(h_post, torch.ones(3, N))
    assert torch.equal(h_res, torch.eye(N).expand(3, N, N))


def test_static_maps_start_as_asked():
    connection = HyperConnection(C, N, "harmonized", static=True, init="staggered", sublayer=1)
    h_pre, h_post, _ = connection.coefficients(torch.randn(1, 3, N * C))
    torch.testing.assert_close(h_pre, reads("staggered", 1, N).float().expand(3, N))
    torch.testing.assert_close(h_post, torch.full((3, N), 1 / N))


def test_scattered_writes_differ_by_seed_and_stream():
    def bias(seed):
        connection = HyperConnection(C, N, init="scattered")
        connection.reset_parameters(torch.Generator().manual_seed(seed))
        return connection.bias[N : 2 * N]

    assert bias(1).unique().numel() == N and not torch.equal(bias(1), bias(2)) and torch.equal(bias(1), bias(1))


def test_an_unknown_start_is_refused():
    with pytest.raises(ValueError, match="init='odd': must be one of even, staggered, onehot, scattered"):
        HyperConnection(C, N, init="odd")
