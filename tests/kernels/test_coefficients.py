"""Mapping coefficients: reference against scalar loops, kernels against the reference in fp64."""

import itertools

import loops
import pytest
import torch
from kernel_cases import ADVERSARIAL, DEVICE, TOLERANCE, adversarial, all_manifolds, backend, compare, evaluate, make_inputs

from pipehc.kernels import coefficients, pre
from pipehc.kernels.manifolds import Birkhoff, Hybrid, IdentityOffset, Isometric

KINDS = ["birkhoff", "isometric", "hybrid", "identity_offset", "harmonized"]


def operation(manifold, fixed=()):
    return lambda x, phi, alpha, bias: coefficients(x, phi, alpha, bias, manifold=manifold, fixed=fixed)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 3, 4])
def test_reference_equals_loops(kind, n):
    tight = {"birkhoff": Birkhoff(7), "isometric": Isometric(1e6), "hybrid": Hybrid(torch.tensor(0.3), Birkhoff(7), Isometric(1e6))}
    manifold = tight.get(kind, all_manifolds("cpu")[kind])
    x, _, _, _, (phi, alpha, bias) = make_inputs(3, n, 5, torch.float64, manifold.per_stream)
    got = coefficients(x, phi.double(), alpha.double(), bias.double(), manifold=manifold)
    settings = {"scalar": None if manifold.scalar is None else float(manifold.scalar), "iterations": 7}
    for t in range(3):
        arrays = (v.double().numpy() for v in (x[t], phi, alpha, bias))
        want = loops.coefficients(kind, *arrays, **settings)
        for one, other in zip(got, want):
            torch.testing.assert_close(one[t], torch.from_numpy(other), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_the_reference_in_fp64(kind):
    manifold = all_manifolds("cpu")[kind]
    x, _, _, _, parameters = make_inputs(2, 2, 3, torch.float64, manifold.per_stream)
    leaves = [t.double().requires_grad_() for t in (x, *parameters)]
    assert torch.autograd.gradcheck(operation(manifold), leaves)


def test_dtypes_of_results():
    x, _, _, _, parameters = make_inputs(2, 2, 3, torch.bfloat16)
    assert all(h.dtype == torch.float32 for h in coefficients(x, *parameters, manifold=Birkhoff()))
    double = [p.double() for p in parameters]
    assert all(h.dtype == torch.float64 for h in coefficients(x.double(), *double, manifold=Birkhoff()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("tokens", "n", "channels"), [(5, 1, 7), (17, 3, 24), (6, 4, 70)])
def test_kernel(kind, tokens, n, channels):
    manifold = all_manifolds()[kind]
    x, _, _, _, parameters = make_inputs(tokens, n, channels, torch.float32, manifold.per_stream)
    compare(operation(manifold), (x, *parameters), 1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ADVERSARIAL)
def test_kernel_on_adversarial_inputs(kind, case):
    manifold = all_manifolds()[kind]
    x, f, _, _, parameters = make_inputs(6, 3, 20, torch.float32, manifold.per_stream)
    x, _, parameters = adversarial(case, x, f, parameters)
    compare(operation(manifold), (x, *parameters), 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "hybrid"])
def test_kernel_with_streams_of_low_precision(kind, dtype):
    manifold = all_manifolds()[kind]
    x, _, _, _, (phi, alpha, bias) = make_inputs(18, 4, 70, dtype, manifold.per_stream)
    got = compare(operation(manifold), (x, phi, alpha, bias), TOLERANCE[dtype] if DEVICE == "cpu" else 8e-3)
    # Only the gradient of x is ever rounded to the dtype of x: everything else is as good as in fp32.
    if DEVICE == "cpu":
        want = evaluate("reference", operation(manifold), [t.double() for t in (x, phi, alpha, bias)])
        for name in ("out0", "out1", "out2", "grad1", "grad2", "grad3"):
            assert (got[name].double() - want[name]).norm() <= 1e-5 * want[name].norm(), name


@pytest.mark.parametrize(
    ("kind", "n"), [*(("birkhoff", n) for n in (2, 5, 6, 7, 8)), ("identity_offset", 5), ("identity_offset", 8), ("hybrid", 8)]
)
def test_kernel_for_every_number_of_streams(kind, n):
    manifold = all_manifolds()[kind]
    x, _, _, _, parameters = make_inputs(18, n, 33, torch.float32, manifold.per_stream)
    compare(operation(manifold), (x, *parameters), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["birkhoff", "harmonized"])
def test_rows_of_zeros_and_constant_rows_stay_finite(kind, dtype):
    manifold = all_manifolds()[kind]
    x, _, _, _, parameters = make_inputs(6, 3, 20, dtype, manifold.per_stream)
    x[1], x[3], x[4, 2] = 0.0, 2.5, 0.0
    inputs = [t.to(DEVICE) for t in (x, *parameters)]
    got = evaluate("triton", operation(manifold), inputs)
    assert all(torch.isfinite(v).all() for v in got.values())
    if dtype != torch.float16:  # 1e10 is beyond fp16: the kernels saturate, the reference does not
        got = evaluate("reference", operation(manifold), inputs)
        assert all(torch.isfinite(v).all() for v in got.values())
    with backend("triton"):
        h = coefficients(*inputs, manifold=manifold)[0]
    bias = parameters[2][:3]
    torch.testing.assert_close(h[1].cpu(), bias if manifold.per_stream else torch.sigmoid(bias))


@pytest.mark.parametrize("fixed", [c for r in range(1, 4) for c in itertools.combinations(("pre", "post", "res"), r)])
def test_kernel_with_maps_switched_off(fixed):
    x, _, _, _, parameters = make_inputs(5, 3, 10, torch.float32)
    got = compare(operation(Birkhoff(2), fixed), (x, *parameters), 1e-5)
    constants = {"pre": torch.full((3,), 1 / 3), "post": torch.ones(3), "res": torch.eye(3)}
    for i, name in enumerate(("pre", "post", "res")):
        if name in fixed:
            torch.testing.assert_close(got[f"out{i}"].cpu(), constants[name].expand_as(got[f"out{i}"]))


def test_no_tokens():
    x, _, _, _, parameters = make_inputs(0, 3, 10, torch.float32)
    got = compare(operation(Birkhoff(2)), (x, *parameters), 1e-5)
    assert got["out2"].shape == (0, 3, 3) and got["grad1"].abs().sum() == 0


def test_views_of_larger_tensors():
    x, _, _, _, (phi, alpha, bias) = make_inputs(7, 3, 10, torch.float32)
    spread = torch.zeros(7, 3, 24)
    spread[:, :, 2:12] = x

    def of_view(x, phi, alpha, bias):
        return coefficients(x[:, :, 2:12], phi.T, alpha, bias, manifold=Birkhoff(2))

    got = compare(of_view, (spread, phi.T.contiguous(), alpha, bias), 1e-5)
    assert got["grad0"][:, :, 12:].abs().sum() == 0


def test_lambda_of_hybrid_gets_its_gradient():
    x, _, _, _, parameters = make_inputs(17, 3, 10, torch.float32)

    def with_lambda(x, phi, alpha, bias, share):
        manifold = Hybrid(share, Birkhoff(3), Isometric(10.0))
        return coefficients(x, phi, alpha, bias, manifold=manifold)

    compare(with_lambda, (x, *parameters, torch.tensor(0.3)), 1e-5)


def test_parameter_gradients_over_several_groups_have_the_same_bits_again(monkeypatch):
    """100 tokens in three spans: two blocks of tokens to a program and several programs, so both stages of the sums."""
    monkeypatch.setattr("pipehc.kernels.backward.PROGRAMS", 3)
    monkeypatch.setattr("pipehc.kernels.backward.PHI_TOKENS", 16)
    x, _, _, _, parameters = make_inputs(100, 2, 5, torch.float32)
    first = compare(operation(Birkhoff(1)), (x, *parameters), 1e-5)
    again = evaluate("triton", operation(Birkhoff(1)), [t.to(DEVICE) for t in (x, *parameters)])
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_bad_shapes_are_named():
    x, _, _, _, (phi, alpha, bias) = make_inputs(2, 3, 4, torch.float32)
    for arguments, words in [
        ((x[0], phi, alpha, bias), ["x has shape [3, 4]", "[T, n, C]"]),
        ((x.int(), phi, alpha, bias), ["x has dtype torch.int32"]),
        ((x, phi[:-1], alpha, bias), ["phi has shape [11, 15]", "[12, 15]"]),
        ((x, phi, alpha[:2], bias), ["alpha has shape [2]", "[3]"]),
        ((x, phi, alpha, bias[:-1]), ["bias has shape [14]", "[15]"]),
    ]:
        with pytest.raises(ValueError) as caught:
            coefficients(*arguments, manifold=Birkhoff())
        assert all(w in str(caught.value) for w in words), str(caught.value)
    with pytest.raises(ValueError, match=r"phi has shape \[12, 15\]: must be \[4, 5\]"):
        coefficients(x, phi, alpha, bias, manifold=IdentityOffset())


def test_choice_of_backend_is_checked():
    x, _, _, _, parameters = make_inputs(2, 3, 4, torch.float32)
    with backend("cuda"), pytest.raises(ValueError, match="PIPEHC_KERNELS='cuda': must be 'triton' or 'reference'"):
        coefficients(x, *parameters, manifold=Birkhoff())
    with backend("triton"), pytest.raises(ValueError, match=r"n=3 streams of 4 channels in torch\.float64"):
        coefficients(x.double(), *(p.double() for p in parameters), manifold=Birkhoff())
    wide, h_pre = torch.empty(0, 2, 2**20 + 1), torch.empty(0, 2)
    with backend("triton"), pytest.raises(ValueError, match=r"1048577 channels .* C <= 1048576"):
        pre(wide, h_pre)


@pytest.mark.parametrize("manifold", [Birkhoff(2, norm_eps=0.1), IdentityOffset(norm_eps=0.1)], ids=["whole token", "per stream"])
def test_the_epsilon_of_the_norm_is_the_manifolds(manifold):
    x, _, _, _, parameters = make_inputs(5, 3, 10, torch.float32, manifold.per_stream)
    small = 0.1 * x
    got = compare(operation(manifold), (small, *parameters), 1e-5)
    usual = evaluate("triton", operation(type(manifold)()), [t.to(DEVICE) for t in (small, *parameters)])
    assert (got["out2"] - usual["out2"]).abs().max() > 1e-2


def test_it_bounds_the_gradients_of_a_token_of_zeros():
    x, _, _, _, parameters = make_inputs(5, 3, 10, torch.float32)
    x[2] = 0
    for eps, least, most in ((1e-20, 1e8, 1e12), (1e-6, 1.0, 1e5)):
        got = compare(operation(Birkhoff(2, norm_eps=eps)), (x, *parameters), 1e-5)
        assert least < got["grad0"][2].abs().max() < most


@pytest.mark.parametrize("eps", [0, -1.0, float("nan"), float("inf"), True, "1e-6"])
def test_an_epsilon_that_is_none_is_refused(eps):
    with pytest.raises(ValueError, match=r"norm_eps=.*above 0"):
        Birkhoff(norm_eps=eps)
