"""Coefficients and y in one launch."""

import pytest
import torch
from kernel_cases import ADVERSARIAL, DEVICE, TOLERANCE, adversarial, all_manifolds, backend, compare, make_inputs

from pipehc.kernels import coefficients, coefficients_pre, post_res, pre
from pipehc.kernels.manifolds import Birkhoff, Harmonized

KINDS = ["birkhoff", "isometric", "hybrid", "identity_offset", "harmonized"]


def operation(manifold):
    return lambda x, phi, alpha, bias: coefficients_pre(x, phi, alpha, bias, manifold=manifold)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_the_reference_in_fp64(kind):
    manifold = all_manifolds("cpu")[kind]
    x, _, _, _, parameters = make_inputs(2, 2, 3, torch.float64, manifold.per_stream)
    leaves = [t.double().requires_grad_() for t in (x, *parameters)]
    assert torch.autograd.gradcheck(operation(manifold), leaves)


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernel_with_streams_of_low_precision(dtype):
    x, _, _, _, parameters = make_inputs(18, 4, 70, dtype)
    compare(operation(Birkhoff(2)), (x, *parameters), TOLERANCE[dtype])


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


def test_static_form():
    manifold = Harmonized(torch.tensor(0.5), unconditioned=True)
    x, _, _, _, (_, _, bias) = make_inputs(5, 3, 10, torch.float32)
    none = torch.empty(0)
    compare(lambda x, bias: coefficients_pre(x, none.to(bias), none.to(bias), bias, manifold=manifold), (x, bias), 1e-5)


def test_no_tokens():
    x, _, _, _, parameters = make_inputs(0, 3, 10, torch.float32)
    got = compare(operation(Birkhoff(2)), (x, *parameters), 1e-5)
    assert got["out0"].shape == (0, 10)
