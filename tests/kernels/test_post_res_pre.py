"""The end of one sub-layer fused with the start of the next."""

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

from pipehc.kernels import backward, coefficients_pre, post_res, post_res_pre
from pipehc.kernels.manifolds import Birkhoff, Harmonized

KINDS = ["birkhoff", "isometric", "hybrid", "identity_offset", "harmonized"]


def operation(manifold, fixed=()):
    return lambda *tensors: post_res_pre(*tensors, manifold=manifold, fixed=fixed)


def with_norm(manifold, eps=1e-6, fixed=()):
    return lambda *t: post_res_pre(*t[:7], manifold=manifold, fixed=fixed, norm=t[7], eps=eps)


def arguments(tokens, n, channels, dtype, per_stream=False):
    *streams, parameters = make_inputs(tokens, n, channels, dtype, per_stream)
    return (*streams, *parameters)


@pytest.mark.parametrize("kind", ["birkhoff", "identity_offset"])
def test_gradients_of_the_reference_in_fp64(kind):
    manifold = all_manifolds("cpu")[kind]
    leaves = [t.double().requires_grad_() for t in arguments(2, 2, 3, torch.float64, manifold.per_stream)]
    assert torch.autograd.gradcheck(operation(manifold), leaves)
    assert torch.autograd.gradcheck(with_norm(manifold), [*leaves, norm_weight(3, torch.float64).requires_grad_()])


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
    if tokens > 5 and kind in ("isometric", "hybrid") and DEVICE == "cpu":
        pytest.skip("a minute in the interpreter, whose maps of five tokens are the same")
    manifold = all_manifolds()[kind]
    tensors = arguments(tokens, n, channels, torch.float32, manifold.per_stream)
    compare(operation(manifold), tensors, 1e-5)
    # The blend's backward magnifies rounding: 2.1e-5 on an H100, whose matrix units add three products of tf32.
    tolerance = 4e-5 if kind == "hybrid" and DEVICE != "cpu" else 1e-5
    compare(with_norm(manifold), (*tensors, norm_weight(channels)), tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_kernel_with_streams_of_low_precision(dtype):
    compare(operation(Birkhoff(2)), arguments(18, 4, 70, dtype), TOLERANCE[dtype])
    for of_weight in (dtype, torch.float32):
        got = compare(with_norm(Birkhoff(2)), (*arguments(18, 4, 70, dtype), norm_weight(70, of_weight)), TOLERANCE[dtype])
        assert (got["out1"].dtype, got["grad7"].dtype) == (dtype, of_weight)


@pytest.mark.parametrize("kind", ["birkhoff", "identity_offset"])
@pytest.mark.parametrize("case", ADVERSARIAL)
def test_kernel_on_adversarial_inputs(kind, case):
    manifold = all_manifolds()[kind]
    x, f, h_post, h_res, parameters = make_inputs(6, 3, 20, torch.float32, manifold.per_stream)
    x, f, parameters = adversarial(case, x, f, parameters)
    if kind == "birkhoff":
        compare(with_norm(manifold, 1e-20), (x, f, h_post, h_res, *parameters, norm_weight(20)), 1e-5)
    else:
        compare(operation(manifold), (x, f, h_post, h_res, *parameters), 1e-5)


@pytest.mark.parametrize("n", [2, 5, *(pytest.param(n, marks=pytest.mark.slow) for n in (6, 7, 8))])
def test_kernel_for_every_number_of_streams(n):
    compare(operation(Birkhoff(2)), arguments(17, n, 33, torch.float32), 1e-5)
    compare(with_norm(Birkhoff(2)), (*arguments(17, n, 33, torch.float32), norm_weight(33)), 1e-5)


def test_kernel_with_maps_switched_off():
    compare(operation(Birkhoff(2), ("pre", "res")), arguments(5, 3, 10, torch.float32), 1e-5)
    compare(with_norm(Birkhoff(2), fixed=("pre", "res")), (*arguments(5, 3, 10, torch.float32), norm_weight(10)), 1e-5)


@pytest.mark.parametrize("kind", ["birkhoff", "harmonized"])
@pytest.mark.parametrize("link", [True, False])
@pytest.mark.parametrize("normed", [True, False])
def test_chain_of_three_sublayers(kind, link, normed):
    """coefficients_pre, twice post_res_pre, post_res: every backward leaves work to the operation before it, or none does."""
    manifold = all_manifolds()[kind]

    def chain(x, gain, weight, *parameters):
        first, second, third = parameters[:3], parameters[3:6], parameters[6:]
        settings = {"manifold": manifold} | ({"norm": weight, "eps": 1e-6} if normed else {})
        y, h_post, h_res = coefficients_pre(x, *first, **settings)
        for following in (second, third):
            h_res = h_res if link else h_res.view_as(h_res)
            x, y, h_post, h_res = post_res_pre(x, torch.tanh(y * gain), h_post, h_res, *following, **settings)
        h_res = h_res if link else h_res.view_as(h_res)
        return post_res(x, torch.tanh(y * gain), h_post, h_res), x.square().mean()

    x, _, _, _, parameters = make_inputs(5, 3, 12, torch.float32, manifold.per_stream, parameters=3)
    compare(chain, (x, torch.linspace(0.5, 2, 12), norm_weight(12), *parameters), 1e-5)


@pytest.mark.slow
def test_gradients_of_many_blocks_have_the_same_bits_every_time(monkeypatch):
    """More blocks than programs: each adds several up; and the same in one program a block, to rounding."""
    tensors = (*arguments(16 * 5 + 3, 2, 8, torch.bfloat16), norm_weight(8, torch.bfloat16))
    monkeypatch.setattr(backward, "PHI_TOKENS", 16)
    apart = compare(with_norm(Birkhoff(2)), tensors, TOLERANCE[torch.bfloat16])
    monkeypatch.setattr(backward, "PROGRAMS", 2)
    together = compare(with_norm(Birkhoff(2)), tensors, TOLERANCE[torch.bfloat16])
    again = evaluate("triton", with_norm(Birkhoff(2)), [t.to(DEVICE) for t in tensors])
    assert all(torch.equal(again[key], value) for key, value in together.items())
    assert all(torch.equal(together[key], apart[key]) for key in apart if key.startswith("out"))


def test_static_form():
    manifold = Harmonized(torch.tensor(0.5, device=DEVICE), unconditioned=True)
    x, f, h_post, h_res, _, _, bias = arguments(5, 3, 10, torch.float32)

    def static(x, f, h_post, h_res, bias):
        none = bias.new_empty(0)
        return post_res_pre(x, f, h_post, h_res, none, none, bias, manifold=manifold)

    compare(static, (x, f, h_post, h_res, bias), 1e-5)

    def normed(x, f, h_post, h_res, bias, weight):
        none = bias.new_empty(0)
        return with_norm(manifold)(x, f, h_post, h_res, none, none, bias, weight)

    compare(normed, (x, f, h_post, h_res, bias, norm_weight(10)), 1e-5)


def test_no_tokens():
    got = compare(operation(Birkhoff(2)), arguments(0, 3, 10, torch.float32), 1e-5)
    assert got["out0"].shape == (0, 3, 10)


@pytest.mark.parametrize("kind", ["birkhoff", "harmonized"])
@pytest.mark.parametrize("link", [True, False])
@pytest.mark.parametrize("name", ["reference", "triton"])
def test_the_whole_gradient_between_two_sublayers_can_be_seen(name, link, kind):
    """What the next sub-layer's end sends past it included, whether linked or not."""
    manifold = all_manifolds()[kind]
    tensors = [t.to(DEVICE).requires_grad_() for t in arguments(5, 3, 10, torch.float32, manifold.per_stream)]
    seen = []
    with backend(name):
        x, y, h_post, h_res = post_res_pre(*tensors, manifold=manifold, on_gradient=seen.append)
        end = post_res(x, y.sin(), h_post if link else h_post.view_as(h_post), h_res if link else h_res.view_as(h_res))
        end.square().sum().backward()
    with backend("reference"):
        leaf = x.detach().clone().requires_grad_()
        y, h_post, h_res = coefficients_pre(leaf, *(t.detach() for t in tensors[4:]), manifold=manifold)
        (expected,) = torch.autograd.grad(post_res(leaf, y.sin(), h_post, h_res).square().sum(), leaf)
    (gradient,) = seen
    torch.testing.assert_close(gradient.view(expected.shape), expected, rtol=2e-5, atol=2e-5)
