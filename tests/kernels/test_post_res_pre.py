"""The end of one sub-layer fused with the start of the next."""

import pytest
import torch
from kernel_cases import ADVERSARIAL, DEVICE, TOLERANCE, adversarial, all_manifolds, backend, compare, make_inputs

from pipehc.kernels import coefficients_pre, post_res, post_res_pre
from pipehc.kernels.manifolds import Birkhoff, Harmonized

KINDS = ["birkhoff", "isometric", "hybrid", "identity_offset", "harmonized"]


def operation(manifold, fixed=()):
    return lambda *tensors: post_res_pre(*tensors, manifold=manifold, fixed=fixed)


def arguments(tokens, n, channels, dtype, per_stream=False):
    *streams, parameters = make_inputs(tokens, n, channels, dtype, per_stream)
    return (*streams, *parameters)


@pytest.mark.parametrize("kind", ["birkhoff", "identity_offset"])
def test_gradients_of_the_reference_in_fp64(kind):
    manifold = all_manifolds("cpu")[kind]
    leaves = [t.double().requires_grad_() for t in arguments(2, 2, 3, torch.float64, manifold.per_stream)]
    assert torch.autograd.gradcheck(operation(manifold), leaves)


@pytest.mark.parametrize("name", ["reference", "triton"])
def test_equals_the_two_operations(name):
    tensors = [t.to(DEVICE) for t in arguments(5, 3, 10, torch.float32)]
    with backend(name):
        x_next, y, h_post, h_res = post_res_pre(*tensors, manifold=Birkhoff(3))
        want = post_res(*tensors[:4])
        wanted_y, wanted_post, wanted_res = coefficients_pre(want, *tensors[4:], manifold=Birkhoff(3))
    for got, other in ((x_next, want), (y, wanted_y), (h_post, wanted_post), (h_res, wanted_res)):
        torch.testing.assert_close(got, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("tokens", "n", "channels"), [(1, 1, 3), (18, 3, 24), (5, 4, 70)])
def test_kernel(kind, tokens, n, channels):
    manifold = all_manifolds()[kind]
    compare(operation(manifold), arguments(tokens, n, channels, torch.float32, manifold.per_stream), 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernel_with_streams_of_low_precision(dtype):
    compare(operation(Birkhoff(2)), arguments(18, 4, 70, dtype), TOLERANCE[dtype])


@pytest.mark.parametrize("kind", ["birkhoff", "identity_offset"])
@pytest.mark.parametrize("case", ADVERSARIAL)
def test_kernel_on_adversarial_inputs(kind, case):
    manifold = all_manifolds()[kind]
    x, f, h_post, h_res, parameters = make_inputs(6, 3, 20, torch.float32, manifold.per_stream)
    x, f, parameters = adversarial(case, x, f, parameters)
    compare(operation(manifold), (x, f, h_post, h_res, *parameters), 1e-5)


@pytest.mark.parametrize("n", [2, 5, 6, 7, 8])
def test_kernel_for_every_number_of_streams(n):
    compare(operation(Birkhoff(2)), arguments(17, n, 33, torch.float32), 1e-5)


def test_kernel_with_maps_switched_off():
    compare(operation(Birkhoff(2), ("pre", "res")), arguments(5, 3, 10, torch.float32), 1e-5)


@pytest.mark.parametrize("kind", ["birkhoff", "harmonized"])
@pytest.mark.parametrize("link", [True, False])
def test_chain_of_three_sublayers(kind, link):
    """coefficients_pre, twice post_res_pre, post_res: every backward leaves work to the operation before it, or none does."""
    manifold = all_manifolds()[kind]

    def chain(x, gain, *parameters):
        first, second, third = parameters[:3], parameters[3:6], parameters[6:]
        y, h_post, h_res = coefficients_pre(x, *first, manifold=manifold)
        for following in (second, third):
            h_res = h_res if link else h_res.view_as(h_res)
            x, y, h_post, h_res = post_res_pre(x, torch.tanh(y * gain), h_post, h_res, *following, manifold=manifold)
        h_res = h_res if link else h_res.view_as(h_res)
        return post_res(x, torch.tanh(y * gain), h_post, h_res), x.square().mean()

    x, _, _, _, parameters = make_inputs(5, 3, 12, torch.float32, manifold.per_stream, parameters=3)
    compare(chain, (x, torch.linspace(0.5, 2, 12), *parameters), 1e-5)


def test_static_form():
    manifold = Harmonized(torch.tensor(0.5), unconditioned=True)
    x, f, h_post, h_res, _, _, bias = arguments(5, 3, 10, torch.float32)

    def static(x, f, h_post, h_res, bias):
        none = bias.new_empty(0)
        return post_res_pre(x, f, h_post, h_res, none, none, bias, manifold=manifold)

    compare(static, (x, f, h_post, h_res, bias), 1e-5)


def test_no_tokens():
    got = compare(operation(Birkhoff(2)), arguments(0, 3, 10, torch.float32), 1e-5)
    assert got["out0"].shape == (0, 3, 10)
