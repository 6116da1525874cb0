"""What autograd is promised: nothing changes under autocast, a second derivative is right or refused, and no gradient depends on
which others are asked for."""

import itertools

import pytest
import torch
from kernel_cases import DEVICE, TOLERANCE, all_manifolds, backend, evaluate, make_inputs, norm_weight, relative_error

from pipehc.kernels import coefficients, coefficients_pre, post_res, post_res_pre, pre
from pipehc.kernels.manifolds import Birkhoff, Harmonized, Hybrid, IdentityOffset, Isometric

KINDS = ["birkhoff", "isometric", "hybrid", "identity_offset", "harmonized"]
BOTH = pytest.mark.parametrize("name", ["reference", "triton"])


def operations(kind, dtype, channels=7):
    """Every operation with its inputs, all but the streams in fp32."""
    manifold = all_manifolds()[kind]
    x, f, h_post, h_res, parameters = make_inputs(5, 3, channels, dtype, manifold.per_stream)
    maps = {"manifold": manifold}
    found = {
        "pre": (pre, (x, h_post)),
        "post_res": (post_res, (x, f, h_post, h_res)),
        "coefficients": (lambda *t: coefficients(*t, **maps), (x, *parameters)),
        "coefficients_pre": (lambda *t: coefficients_pre(*t, **maps), (x, *parameters)),
        "post_res_pre": (lambda *t: post_res_pre(*t, **maps), (x, f, h_post, h_res, *parameters)),
        "normed": (
            lambda *t: post_res_pre(*t[:-1], **maps, norm=t[-1], eps=1e-6),
            (x, f, h_post, h_res, *parameters, norm_weight(channels)),
        ),
    }
    return {key: (call, [t.to(DEVICE) for t in inputs]) for key, (call, inputs) in found.items()}


def same_bits(found, expected):
    return all(found[key].dtype == value.dtype and torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.parametrize(
    ("name", "kind"), [*(("reference", kind) for kind in KINDS), ("triton", "birkhoff"), ("triton", "harmonized")]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_autocast_changes_no_bit_of_results_and_gradients(name, kind, dtype, low):
    if name == "triton" and dtype == low:
        return
    for key, (operation, inputs) in operations(kind, dtype).items():

        def cast_forward(*tensors, operation=operation):
            with torch.autocast(DEVICE, dtype=low):
                return operation(*tensors)

        plain = evaluate(name, operation, inputs)
        assert same_bits(evaluate(name, cast_forward, inputs), plain), key
        with torch.autocast(DEVICE, dtype=low):  # the backward as well
            assert same_bits(evaluate(name, operation, inputs), plain), key


@pytest.mark.parametrize(("streams", "branch"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
@pytest.mark.parametrize("case", ["alone", "fused", "handed on"])
def test_a_branch_in_another_dtype_than_the_streams(streams, branch, case):
    """As autocast makes them: nothing is rounded to the other's dtype on the way."""
    x, f, h_post, h_res, parameters = make_inputs(5, 3, 10, torch.float32)

    def handed_on(x, f, *parameters):
        _, h_post, h_res = coefficients_pre(x, *parameters, manifold=Birkhoff(2))
        return post_res_pre(x, f, h_post, h_res, *parameters, manifold=Birkhoff(2))

    operation, inputs = {
        "alone": (post_res, (x, f, h_post, h_res)),
        "fused": (lambda *t: post_res_pre(*t, manifold=Birkhoff(2)), (x, f, h_post, h_res, *parameters)),
        "handed on": (handed_on, (x, f, *parameters)),
    }[case]
    inputs = [t.to(DEVICE) for t in (inputs[0].to(streams), inputs[1].to(branch), *inputs[2:])]
    found = evaluate("triton", operation, inputs)
    expected = evaluate("reference", operation, [t.double() for t in inputs])
    for key, value in expected.items():
        # x' and its gradient are rounded to the dtype of x, on which all others depend.
        assert relative_error(found[key], value) <= 2 * max(TOLERANCE[found[key].dtype], TOLERANCE[streams]), key
    assert found["grad1"].dtype == branch


def test_the_gradient_of_a_branch_is_as_exact_as_its_dtype():
    x, f, h_post, h_res, parameters = make_inputs(5, 3, 10, torch.bfloat16)
    f, x, h_post, h_res = f.float().to(DEVICE).requires_grad_(), x.to(DEVICE).requires_grad_(), h_post.to(DEVICE), h_res.to(DEVICE)
    with backend("triton"):
        post_res(x, f, h_post, h_res).float().sum().backward()
        assert relative_error(f.grad, h_post.sum(1, keepdim=True).expand(5, 10)) < 1e-6
        _, h_post, h_res = coefficients_pre(x, *(p.to(DEVICE) for p in parameters), manifold=Birkhoff(2))
        f.grad = None
        post_res(x, f, h_post, h_res).float().sum().backward()  # handed on
        assert relative_error(f.grad, h_post.sum(1, keepdim=True).expand(5, 10)) < 1e-6


@pytest.mark.parametrize("manifold", [Birkhoff(3), Isometric(100.0), IdentityOffset(), Harmonized(torch.tensor(0.6))])
def test_second_derivatives_of_the_maps(manifold):
    logits = torch.randn(1, 3, 3, generator=torch.Generator().manual_seed(1)).double().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda z: manifold.map(z).square(), (logits,))


def test_second_derivatives_by_lambda():
    logits = torch.randn(1, 3, 3, generator=torch.Generator().manual_seed(1)).double().requires_grad_()
    share = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda z, s: Hybrid(s, Birkhoff(2), Isometric(10.0)).map(z), (logits, share))


@pytest.mark.parametrize("key", ["pre", "post_res", "coefficients", "coefficients_pre", "post_res_pre"])
def test_second_derivatives_of_the_references(key):
    x, f, h_post, h_res, parameters = make_inputs(2, 2, 2, torch.float64)
    call, inputs = {
        "pre": (pre, (x, h_post)),
        "post_res": (post_res, (x, f, h_post, h_res)),
        "coefficients": (coefficients, (x, *parameters)),
        "coefficients_pre": (coefficients_pre, (x, *parameters)),
        "post_res_pre": (post_res_pre, (x, f, h_post, h_res, *parameters)),
    }[key]
    maps = {} if key in ("pre", "post_res") else {"manifold": Birkhoff(2)}
    with backend("reference"):
        leaves = [t.double().requires_grad_() for t in inputs]
        assert torch.autograd.gradgradcheck(lambda *t: call(*t, **maps), leaves)
        if key.endswith("_pre"):
            leaves.append(norm_weight(2, torch.float64).requires_grad_())
            assert torch.autograd.gradgradcheck(lambda *t: call(*t[:-1], **maps, norm=t[-1], eps=1e-6), leaves)


@pytest.mark.parametrize("key", ["pre", "post_res", "coefficients", "coefficients_pre", "post_res_pre", "normed"])
def test_second_derivatives_of_the_kernels_are_refused(key):
    operation, inputs = operations("birkhoff", torch.float32)[key]
    leaves = [t.requires_grad_() for t in inputs]
    with backend("triton"):
        found = operation(*leaves)
        total = sum(v.sum() for v in (found if isinstance(found, tuple) else (found,)))
        with pytest.raises(RuntimeError, match="can be differentiated once only"):
            torch.autograd.grad(total, leaves, create_graph=True)


@pytest.mark.parametrize("wanted", [c for r in range(1, 5) for c in itertools.combinations(range(4), r)])
def test_gradients_do_not_depend_on_which_others_are_wanted(wanted):
    """Of three sub-layers whose backward is handed on wherever it can be: x, a gain inside F, and the parameters of two maps."""
    x, _, _, _, parameters = make_inputs(3, 2, 5, torch.float32, parameters=2)
    groups = [[x], [torch.linspace(0.5, 2, 5)], parameters[:3], parameters[3:]]
    found = {}
    for name, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        leaves = [[t.clone().to(DEVICE, dtype).requires_grad_(i in wanted) for t in group] for i, group in enumerate(groups)]
        with backend(name):
            (streams,), (gain,), first, second = leaves
            y, h_post, h_res = coefficients_pre(streams, *first, manifold=Birkhoff(1))
            streams, y, h_post, h_res = post_res_pre(streams, torch.tanh(y * gain), h_post, h_res, *second, manifold=Birkhoff(1))
            post_res(streams, torch.tanh(y * gain), h_post, h_res).square().sum().backward()
        found[name] = [t.grad for group in leaves for t in group]
    for got, want in zip(found["triton"], found["reference"]):
        assert (got is None) == (want is None) and (want is None or relative_error(got, want) < 1e-5)


@BOTH
def test_what_one_backward_left_behind_is_no_part_of_another(name):
    """A backward that ends at the gain hands on what only the coefficients' backward would take; that runs in another one."""
    x, _, _, _, parameters = make_inputs(3, 2, 5, torch.float32)
    x, *parameters = (t.to(DEVICE).requires_grad_() for t in (x, *parameters))
    gain = torch.ones(5, device=DEVICE, requires_grad=True)
    with backend(name):
        y, h_post, h_res = coefficients_pre(x, *parameters, manifold=Birkhoff(1))
        alone = torch.autograd.grad(y.sum(), x, retain_graph=True)[0]
        total = post_res(x, y * gain, h_post, h_res).square().sum()
        torch.autograd.grad(total, gain, retain_graph=True)
        assert torch.equal(torch.autograd.grad(y.sum(), x)[0], alone)


@BOTH
@pytest.mark.parametrize("kind", ["hybrid", "harmonized"])
def test_a_scalar_that_changes_before_the_backward_is_an_error(name, kind):
    scalar = torch.tensor(0.3, device=DEVICE)
    manifold = Harmonized(scalar) if kind == "harmonized" else Hybrid(scalar, Birkhoff(1), Isometric(1.0))
    x, _, _, _, parameters = make_inputs(2, 3, 4, torch.float32, manifold.per_stream)
    with backend(name):
        results = coefficients(*(t.to(DEVICE).requires_grad_() for t in (x, *parameters)), manifold=manifold)
        scalar.fill_(0.9)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            results[2].square().sum().backward()
