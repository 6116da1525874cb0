"""Coefficients and y in one launch."""

import pytest
import torch
from kernel_cases import (
    ADVERSARIAL,
    DEVICE,
    TOLERANCE,
    adversarial,
    all_manifolds,
    backend,
    compare,
    evaluate,
    make_inputs,
    norm_weight,
)

from pipehc.kernels import coefficients, coefficients_pre, post_res, pre
from pipehc.kernels.manifolds import Birkhoff, Harmonized

KINDS = ["birkhoff", "isometric", "hybrid", "identity_offset", "harmonized"]


def operation(manifold):
    return lambda x, phi, alpha, bias: coefficients_pre(x, phi, alpha, bias, manifold=manifold)


def with_norm(manifold, eps=1e-6, fixed=()):
    return lambda *t: coefficients_pre(*t[:4], manifold=manifold, fixed=fixed, norm=t[4], eps=eps)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_the_reference_in_fp64(kind):
    manifold = all_manifolds("cpu")[kind]
    x, _, _, _, parameters = make_inputs(2, 2, 3, torch.float64, manifold.per_stream)
    leaves = [t.double().requires_grad_() for t in (x, *parameters)]
    assert torch.autograd.gradcheck(operation(manifold), leaves)
    assert torch.autograd.gradcheck(with_norm(manifold), [*leaves, norm_weight(3, torch.float64).requires_grad_()])


@pytest.mark.parametrize("name", ["reference", "triton"])
def test_equals_the_two_operations(name):
    x, _, _, _, parameters = make_inputs(5, 3, 10, torch.float32)
    x, *parameters = (t.to(DEVICE) for t in (x, *parameters))
    with backend(name):
        y, h_post, h_res = coefficients_pre(x, *parameters, manifold=Birkhoff(3))
        h_pre, h_post_2, h_res_2 = coefficients(x, *parameters, manifold=Birkhoff(3))
        torch.testing.assert_close(y, pre(x, h_pre), rtol=1e-6, atol=1e-6)
    assert torch.equal(h_post, h_post_2) and torch.equal(h_res, h_res_2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("tokens", "n", "channels"), [(1, 1, 3), (18, 3, 24), (5, 4, 70)])
def test_kernel(kind, tokens, n, channels):
    manifold = all_manifolds()[kind]
    x, _, _, _, parameters = make_inputs(tokens, n, channels, torch.float32, manifold.per_stream)
    compare(operation(manifold), (x, *parameters), 1e-5)
    compare(with_norm(manifold), (x, *parameters, norm_weight(channels)), 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernel_with_streams_of_low_precision(dtype):
    x, _, _, _, parameters = make_inputs(18, 4, 70, dtype)
    compare(operation(Birkhoff(2)), (x, *parameters), TOLERANCE[dtype])
    for of_weight in (dtype, torch.float32):
        got = compare(with_norm(Birkhoff(2)), (x, *parameters, norm_weight(70, of_weight)), TOLERANCE[dtype])
        assert (got["out0"].dtype, got["grad4"].dtype) == (dtype, of_weight)


@pytest.mark.parametrize("n", [1, 2, 5, 6, 7, 8])
def test_norm_of_every_number_of_streams(n):
    x, _, _, _, parameters = make_inputs(17, n, 33, torch.float32)
    compare(with_norm(Birkhoff(2)), (x, *parameters, norm_weight(33)), 1e-5)


def test_norm_with_maps_switched_off():
    x, _, _, _, parameters = make_inputs(5, 3, 10, torch.float32)
    compare(with_norm(Birkhoff(2), fixed=("pre", "res")), (x, *parameters, norm_weight(10)), 1e-5)


def test_the_norm_takes_part_in_nothing_else():
    """Results and gradients beside those of y have the bits that they have without it."""
    x, _, _, _, parameters = make_inputs(5, 3, 10, torch.float32)
    x, *parameters, weight = (t.to(DEVICE) for t in (x, *parameters, norm_weight(10)))

    def maps(operation):
        return lambda *t: operation(*t)[1:]

    plain = evaluate("triton", maps(operation(Birkhoff(2))), (x, *parameters))
    normed = evaluate("triton", maps(with_norm(Birkhoff(2))), (x, *parameters, weight))
    assert all(torch.equal(normed[key], value) for key, value in plain.items()) and not normed["grad4"].any()


@pytest.mark.parametrize("kind", ["birkhoff", "harmonized"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_sublayer(kind, dtype):
    """With post_res straight after: its backward is left to this operation."""
    manifold = all_manifolds()[kind]

    def sublayer(x, phi, alpha, bias, gain):
        y, h_post, h_res = coefficients_pre(x, phi, alpha, bias, manifold=manifold)
        return post_res(x, y * gain, h_post, h_res)

    x, _, _, _, parameters = make_inputs(18, 4, 40, dtype, manifold.per_stream)
    compare(sublayer, (x, *parameters, torch.linspace(0.5, 2, 40).to(dtype)), 1.5 * TOLERANCE[dtype])


@pytest.mark.parametrize("kind", ["birkhoff", "identity_offset"])
@pytest.mark.parametrize("case", ADVERSARIAL)
def test_whole_sublayer_on_adversarial_inputs(kind, case):
    manifold = all_manifolds()[kind]

    def sublayer(x, f, phi, alpha, bias):
        y, h_post, h_res = coefficients_pre(x, phi, alpha, bias, manifold=manifold)
        return y, post_res(x, f, h_post, h_res)

    x, f, _, _, parameters = make_inputs(6, 3, 20, torch.float32, manifold.per_stream)
    x, f, parameters = adversarial(case, x, f, parameters)
    compare(sublayer, (x, f, *parameters), 1e-5)


@pytest.mark.parametrize("kind", ["birkhoff", "identity_offset"])
@pytest.mark.parametrize("case", ADVERSARIAL)
@pytest.mark.parametrize("eps", [1e-6, 1e-20])
def test_whole_normed_sublayer_on_adversarial_inputs(kind, case, eps):
    manifold = all_manifolds()[kind]

    def sublayer(x, f, *parameters):
        y, h_post, h_res = with_norm(manifold, eps)(x, *parameters)
        return y, post_res(x, f, h_post, h_res)

    x, f, _, _, parameters = make_inputs(6, 3, 20, torch.float32, manifold.per_stream)
    x, f, parameters = adversarial(case, x, f, parameters)
    compare(sublayer, (x, f, *parameters, norm_weight(20)), 1e-5)


def test_static_form():
    manifold = Harmonized(torch.tensor(0.5, device=DEVICE), unconditioned=True)
    x, _, _, _, (_, _, bias) = make_inputs(5, 3, 10, torch.float32)
    none = torch.empty(0)
    compare(lambda x, bias: coefficients_pre(x, none.to(bias), none.to(bias), bias, manifold=manifold), (x, bias), 1e-5)

    def normed(x, bias, weight):
        return with_norm(manifold)(x, none.to(bias), none.to(bias), bias, weight)

    compare(normed, (x, bias, norm_weight(10)), 1e-5)


def test_no_tokens():
    x, _, _, _, parameters = make_inputs(0, 3, 10, torch.float32)
    got = compare(operation(Birkhoff(2)), (x, *parameters), 1e-5)
    assert got["out0"].shape == (0, 10)
    got = compare(with_norm(Birkhoff(2)), (x, *parameters, norm_weight(10)), 1e-5)
    assert got["out0"].shape == (0, 10) and not got["grad4"].any()
