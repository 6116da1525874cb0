"""The module of one sub-layer, on streams [s, b, n*C]."""

import copy
import itertools
import sys
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from kernel_cases import DEVICE, backend, relative_error

from pipehc.config.schema import ResidualConfig
from pipehc.kernels.rms_norm import rms_norm
from pipehc.model.hyper_connection import KINDS, HyperConnection, composite, composite_gain, contract, expand
from pipehc.model.norm import RMSNorm
from pipehc.planning.parameters import hyper_connection

S, B, C, N = 5, 3, 12, 4


def make(kind="mhc", streams=N, **settings):
    hc = HyperConnection(C, streams, kind, **settings)
    hc.reset_parameters(torch.Generator().manual_seed(7))
    return hc


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("streams", [1, 3, 4])
@pytest.mark.parametrize("how", ["mean", "sum"])
def test_alpha_zero_is_the_plain_residual_model(kind, streams, how):
    torch.manual_seed(0)
    layers = [torch.nn.Sequential(torch.nn.RMSNorm(C), torch.nn.Linear(C, C)).double() for _ in range(6)]
    connections = [make(kind, streams, alpha=0.0).double() for _ in layers]
    embedding = torch.randn(S, B, C, dtype=torch.float64)
    plain, x = embedding, expand(embedding, streams)
    for layer, hc in zip(layers, connections):
        plain = plain + layer(plain)
        y, h_post, h_res = hc.coefficients_pre(x)
        x = hc.post_res(x, layer(y), h_post, h_res)
    result = contract(x, streams, how)
    expected = plain * streams if how == "sum" else plain
    torch.testing.assert_close(result, expected, rtol=1e-7, atol=1e-7)  # b_pre = logit(1/n) is kept in fp32


@pytest.mark.parametrize("kind", KINDS)
def test_fused_and_single_operations_agree(kind):
    torch.manual_seed(0)
    hc, following = make(kind, alpha=0.5), make(kind, alpha=0.5)
    x, f = torch.randn(S, B, N * C), torch.randn(S, B, C)
    h_pre, h_post, h_res = hc.coefficients(x)
    y, h_post_2, h_res_2 = hc.coefficients_pre(x)
    torch.testing.assert_close(hc.pre(x, h_pre), y)
    assert torch.equal(h_post, h_post_2) and torch.equal(h_res, h_res_2)
    x_next = hc.post_res(x, f, h_post, h_res)
    fused = hc.post_res_pre(x, f, h_post, h_res, following)
    for got, want in zip(fused, (x_next, *following.coefficients_pre(x_next))):
        torch.testing.assert_close(got, want)
    by_hand = torch.einsum("tij,tjc->tic", h_res, x.view(-1, N, C)) + h_post[:, :, None] * f.view(-1, 1, C)
    torch.testing.assert_close(x_next.view(-1, N, C), by_hand)


class Owned(RMSNorm):
    """A norm that is not to be called."""

    def __call__(self, x):
        raise AssertionError("the connection does it")


@pytest.mark.parametrize("kind", [*KINDS, "static"])
@pytest.mark.parametrize("name", ["reference", "triton"])
def test_an_rms_norm_is_the_connections_own_and_others_come_after_it(kind, name):
    if name == "triton" and kind not in ("mhc", "static"):
        return
    settings = {"kind": "harmonized", "static": True} if kind == "static" else {"kind": kind, "alpha": 0.5}
    device = DEVICE if name == "triton" else "cpu"
    hc, following = make(**settings).to(device), make(**settings).to(device)
    generator = torch.Generator().manual_seed(0)
    x, f = torch.randn(S, B, N * C, generator=generator).to(device), torch.randn(S, B, C, generator=generator).to(device)
    weight = torch.linspace(0.5, 2, C, device=device, requires_grad=True)
    found = {}
    with backend(name):
        for how, norm in (("own", Owned(lambda: weight, 1e-6)), ("after", lambda y: rms_norm(y, weight, 1e-6))):
            y, h_post, h_res = hc(x, norm=norm)
            x_next, z, _, _ = following(x, (hc, f + y, h_post, h_res), norm)
            found[how] = y, x_next, z, torch.autograd.grad((y.sin() + z.cos()).sum(), weight)[0]
    for own, after in zip(found["own"], found["after"]):
        torch.testing.assert_close(own, after, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_gets_a_gradient(kind):
    torch.manual_seed(0)
    hc = make(kind)
    x = torch.randn(S, B, N * C)
    y, h_post, h_res = hc.coefficients_pre(x)
    hc.post_res(x, torch.tanh(y), h_post, h_res).square().sum().backward()
    for name, p in hc.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all() and p.grad.abs().max() > 0, name


def test_stays_fp32_in_a_bf16_model_with_the_same_bits():
    hc = make("hybrid")
    before = {k: v.clone() for k, v in hc.state_dict().items()}
    torch.nn.Sequential(hc).bfloat16()
    for name, value in hc.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, before[name])
    x = torch.randn(S, B, N * C, dtype=torch.bfloat16)
    y, h_post, h_res = hc.coefficients_pre(x)
    x_next = hc.post_res(x, y, h_post, h_res)
    assert (y.dtype, h_post.dtype, h_res.dtype, x_next.dtype) == (torch.bfloat16, torch.float32, torch.float32, torch.bfloat16)


def test_reset_is_deterministic_and_copies_are_independent():
    a, b = make("harmonized"), make("harmonized")
    for p, q in zip(a.parameters(), b.parameters()):
        assert torch.equal(p, q)
    c = copy.deepcopy(a)
    c.s.fill_(0.25)
    x = torch.randn(S, B, N * C)
    assert a.s == 1.0
    _, _, raw = a.coefficients_pre(x)
    _, _, applied = c.coefficients_pre(x)
    eye = torch.eye(N)
    torch.testing.assert_close(applied, eye + 0.25 * (raw - eye))


def test_composite_is_the_ordered_product_of_token_means():
    torch.manual_seed(0)
    connections = [make("hc", alpha=1.0) for _ in range(3)]
    x, means = torch.randn(S, B, N * C), []
    for hc in connections:
        hc.track = True
        assert hc.take_mean_h_res() is None
        halves = [hc.coefficients_pre(x[:2])[2], hc.coefficients_pre(x[2:])[2]]
        mean = hc.take_mean_h_res()
        torch.testing.assert_close(mean, torch.cat(halves).mean(0))
        means.append(mean)
    product = composite(means, N)
    torch.testing.assert_close(product, (means[2] @ means[1] @ means[0]).double(), rtol=1e-5, atol=1e-6)
    loops = max(
        max(sum(abs(float(product[i, j])) for j in range(N)) for i in range(N)),
        max(sum(abs(float(product[i, j])) for i in range(N)) for j in range(N)),
    )
    assert composite_gain(product) == pytest.approx(loops, rel=1e-12)


def test_expand_and_contract():
    x = torch.randn(S, B, C)
    streams = expand(x, N)
    for j in range(N):
        assert torch.equal(streams[:, :, j * C : (j + 1) * C], x)
    torch.testing.assert_close(contract(streams, N), x)
    torch.testing.assert_close(contract(streams, N, "sum"), N * x)


def test_static_form_has_no_projection():
    hc = make("harmonized", static=True)
    assert [name for name, _ in hc.named_parameters()] == ["bias"]
    with torch.no_grad():
        hc.bias.normal_()
    hc.s.fill_(0.5)
    _, h_post, h_res = hc.coefficients_pre(torch.randn(S, B, N * C))
    torch.testing.assert_close(h_post.sum(-1), torch.ones(S * B))
    torch.testing.assert_close(h_res[3], torch.eye(N) + 0.5 * 0.05 * hc.bias[2 * N :].view(N, N))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"kind": "mHC"}, ["kind='mHC'", "mhc"]),
        ({"streams": 0}, ["streams=0", "at least 1"]),
        ({"iterations": 0}, ["iterations=0", "at least 1"]),
        ({"static": True}, ["static=True", "harmonized"]),
        ({"condition": 0.5}, ["condition=0.5", "[1, 1e8]"]),
        ({"kind": "birkhoff"}, ["kind='birkhoff'", "hc, mhc, isohc, hybrid, harmonized"]),
        ({"kind": None}, ["kind=None", "mhc"]),
        ({"kind": ["mhc"]}, ["kind=['mhc']", "mhc"]),
        ({"streams": 2.0}, ["streams=2.0", "whole number"]),
        ({"hidden_size": "12"}, ["hidden_size='12'", "whole number"]),
        ({"alpha": "0.01"}, ["alpha='0.01'", "number"]),
        ({"alpha": float("nan")}, ["alpha=nan", "finite"]),
        ({"fixed": "pre"}, ["fixed='pre'", "pre, post, res"]),
        ({"kind": "isohc", "iterations": 2.5}, ["iterations=2.5", "whole number"]),
    ],
)
def test_bad_arguments_are_named(arguments, words):
    with pytest.raises(ValueError) as caught:
        HyperConnection(**{"hidden_size": C, **arguments})
    assert all(w in str(caught.value) for w in words)


def test_bad_tensors_are_named():
    hc = make()
    x = torch.randn(S, B, N * C)
    y, h_post, h_res = hc.coefficients_pre(x)
    for call, words in [
        (lambda: hc.coefficients_pre(x[..., :-1]), ["streams", "4*12"]),
        (lambda: hc.post_res(x, y[1:], h_post, h_res), ["f has shape", "[15, 12]"]),
        (lambda: contract(x[..., :-1], N), ["streams", "4*C"]),
        (lambda: contract(x, N, "max"), ["how='max'"]),
    ]:
        with pytest.raises(ValueError) as caught:
            call()
        assert all(w in str(caught.value) for w in words), str(caught.value)


def test_unknown_fixed_map_is_named():
    with pytest.raises(ValueError, match="fixed contains 'all'"):
        make(fixed=("all",))


def test_yaml_and_planner_know_every_kind():
    """The two places that know no torch, and so not the registry of maps."""
    assert get_args(ResidualConfig.model_fields["kind"].annotation) == ("none", *KINDS)
    for kind, family in KINDS.items():
        for static in {False, family.static_form}:
            settings = SimpleNamespace(kind=kind, streams=N, static=static)
            config = SimpleNamespace(residual=settings, model=SimpleNamespace(hidden_size=C))
            assert hyper_connection(config) == sum(p.numel() for p in make(kind, static=static).parameters())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backward_too", [False, True])
def test_autocast_changes_no_bit(kind, backward_too):
    """Of a sub-layer of fp32 streams, and of its parameters' gradients, where F is not under autocast."""
    found = []
    for enabled in (False, True):
        torch.manual_seed(0)
        hc, x = make(kind, alpha=0.5), torch.randn(S, B, N * C, requires_grad=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            y, h_post, h_res = hc.coefficients_pre(x)
            out = contract(hc.post_res(x, torch.tanh(y), h_post, h_res), N)
            if backward_too:
                out.square().sum().backward()
        if not backward_too:
            out.square().sum().backward()
        found.append([y, h_post, h_res, out, x.grad, *(p.grad for p in hc.parameters())])
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(*found))


@pytest.mark.parametrize("fixed", [c for r in range(1, 4) for c in itertools.combinations(("pre", "post", "res"), r)])
@pytest.mark.parametrize("kind", ["mhc", "hc"])
def test_ablation_switches(kind, fixed):
    torch.manual_seed(1)
    hc, free = make(kind, alpha=1.0, fixed=fixed), make(kind, alpha=1.0)
    x = torch.randn(S, B, N * C)
    constants = {"pre": torch.full((N,), 1 / N), "post": torch.ones(N), "res": torch.eye(N)}
    for name, got, learned in zip(("pre", "post", "res"), hc.coefficients(x), free.coefficients(x)):
        want = constants[name].expand_as(got) if name in fixed else learned
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("kind", ["mhc", "harmonized"])
def test_kernels_agree_and_hand_on_their_backward(kind, monkeypatch):
    """Two sub-layers on [s, b, n*C]: every post_res finds the operation that made its coefficients, through all the views."""
    gradients = {}
    for name in ("reference", "triton"):
        torch.manual_seed(0)
        first, second = make(kind, 3, iterations=2, alpha=0.5).to(DEVICE), make(kind, 3, iterations=2, alpha=0.5).to(DEVICE)
        x = torch.randn(3, 2, 3 * C).to(DEVICE).requires_grad_()
        if name == "reference":
            first, second, x = first.double(), second.double(), x.detach().double().requires_grad_()
        with backend(name), monkeypatch.context() as patch:
            for module in ("mapping", "post_res"):
                patch.setattr(sys.modules[f"pipehc.kernels.{module}"], "launch_post_res_backward", None)
            y, h_post, h_res = first.coefficients_pre(x)
            x_next, y, h_post, h_res = first.post_res_pre(x, torch.tanh(y), h_post, h_res, second)
            second.post_res(x_next, torch.tanh(y), h_post, h_res).square().sum().backward()
        gradients[name] = [x.grad, *(p.grad for hc in (first, second) for p in hc.parameters())]
    for got, want in zip(gradients["triton"], gradients["reference"]):
        assert relative_error(got, want) < 1e-5
