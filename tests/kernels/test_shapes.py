"""Arguments that are wrong in type, shape, dtype or name are refused by name, by every operation."""

import pytest
import torch
from kernel_cases import make_inputs

from pipehc.kernels import coefficients, coefficients_pre, post_res, post_res_pre, pre
from pipehc.kernels.manifolds import Birkhoff, Harmonized, Hybrid, Isometric

T, N, C = 3, 2, 4


def arguments(dtype=torch.float32):
    x, f, h_post, h_res, (phi, alpha, bias) = make_inputs(T, N, C, dtype)
    return {"x": x, "f": f, "h_post": h_post, "h_res": h_res, "phi": phi, "alpha": alpha, "bias": bias}


CALLS = {
    "pre": (pre, ["x", "h_post"]),
    "post_res": (post_res, ["x", "f", "h_post", "h_res"]),
    "coefficients": (coefficients, ["x", "phi", "alpha", "bias"]),
    "coefficients_pre": (coefficients_pre, ["x", "phi", "alpha", "bias"]),
    "post_res_pre": (post_res_pre, ["x", "f", "h_post", "h_res", "phi", "alpha", "bias"]),
}
OF_MAPS = ["coefficients", "coefficients_pre", "post_res_pre"]
PLACES = [(call, name) for call, (_, names) in CALLS.items() for name in names]


def run(call, changes=None, **settings):
    function, names = CALLS[call]
    values = arguments() | (changes or {})
    if call in OF_MAPS:
        settings = {"manifold": Birkhoff(1)} | settings
    return function(*(values[name] for name in names), **settings)


def refused(words, call, changes=None, **settings):
    with pytest.raises(ValueError) as caught:
        run(call, changes, **settings)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def shown(call, name):
    return "h_pre" if call == "pre" and name == "h_post" else name


@pytest.mark.parametrize(("call", "name"), PLACES)
def test_tensors_are_checked_by_name(call, name):
    good, title = arguments()[name], shown(call, name)
    run(call)
    refused([f"{title} is of type", "must be a tensor"], call, {name: None})
    refused([f"{title} is of type list", "must be a tensor"], call, {name: good.tolist()})
    refused([f"{title} has dtype torch.int64", "fp64, fp32, bf16 or fp16"], call, {name: good.long()})
    refused([f"{title} has dtype torch.complex64"], call, {name: good.to(torch.complex64)})
    refused([f"{title} has shape", "must be"], call, {name: good.unsqueeze(0)})
    if name == "x":
        refused(["has dtype torch.float32 and x torch.float64"], call, {name: good.double()})
    else:
        refused([f"{title} has shape", "must be"], call, {name: good[:-1]})
        refused([f"{title} has dtype torch.float64 and x torch.float32", "all must be fp64, or none"], call, {name: good.double()})
        refused([f"{title} is on meta: must be on cpu, like x"], call, {name: good.to("meta")})


@pytest.mark.parametrize("call", OF_MAPS)
@pytest.mark.parametrize("manifold", ["birkhoff", "mhc", None, Birkhoff, 4])
def test_what_is_no_manifold_is_refused_with_what_there_is(call, manifold):
    words = [f"manifold={manifold!r}", "Birkhoff, Harmonized, Hybrid, IdentityOffset, Isometric", "Birkhoff()"]
    refused(words, call, manifold=manifold)


@pytest.mark.parametrize("call", OF_MAPS)
def test_names_of_fixed_maps(call):
    refused(["fixed='pre'", "a collection of names among pre, post, res"], call, fixed="pre")
    refused(["fixed=None"], call, fixed=None)
    refused(["fixed=<generator"], call, fixed=(name for name in ("pre",)))
    refused(["fixed contains 'Pre': must be among pre, post, res"], call, fixed=("post", "Pre"))
    refused(["fixed contains 3: must be among"], call, fixed=[3, "pre"])
    for fixed in (["pre", "res"], {"pre", "res"}, ("res", "pre")):
        assert all(torch.equal(a, b) for a, b in zip(run(call, fixed=fixed), run(call, fixed=("pre", "res"))))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Birkhoff("20"), ["iterations='20'", "whole number"]),
        (lambda: Birkhoff(2.5), ["iterations=2.5", "whole number"]),
        (lambda: Birkhoff(True), ["iterations=True", "whole number"]),
        (lambda: Isometric("1e4"), ["condition='1e4'", "[1, 1e8]"]),
        (lambda: Isometric(float("nan")), ["condition=nan", "[1, 1e8]"]),
        (lambda: Hybrid(0.5), ["blend is of type float", "tensor"]),
        (lambda: Hybrid(torch.tensor([0.5])), ["blend has shape [1]", "[]"]),
        (lambda: Hybrid(torch.tensor(0)), ["blend has dtype torch.int64"]),
        (lambda: Hybrid(torch.tensor(0.5), 20), ["birkhoff=20", "Birkhoff"]),
        (lambda: Hybrid(torch.tensor(0.5), isometric=Birkhoff()), ["isometric=", "Isometric"]),
        (lambda: Harmonized(0.5), ["s is of type float", "tensor"]),
        (lambda: Harmonized(torch.ones(2)), ["s has shape [2]", "[]"]),
    ],
)
def test_settings_of_manifolds(make, words):
    with pytest.raises(ValueError) as caught:
        make()
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("call", ["coefficients_pre", "post_res_pre"])
def test_the_norm_of_y(call):
    weight = torch.ones(C)
    run(call, norm=weight, eps=1e-6), run(call, norm=weight.bfloat16(), eps=0)
    refused(["norm is of type float: must be a tensor"], call, norm=1.0, eps=1e-6)
    refused(["norm has shape [3]: must be [4]"], call, norm=weight[:-1], eps=1e-6)
    refused(["norm has dtype torch.float64 and x torch.float32"], call, norm=weight.double(), eps=1e-6)
    refused(["norm is on meta: must be on cpu, like x"], call, norm=weight.to("meta"), eps=1e-6)
    refused(["eps=1e-06 without norm"], call, eps=1e-6)
    for eps in (None, "1e-6", True, -1e-6, float("nan"), float("inf"), torch.tensor(1e-6)):
        refused([f"eps={eps!r}", "a finite number, at least 0"], call, norm=weight, eps=eps)


def test_a_scalar_on_another_device_is_refused():
    for manifold in (Hybrid(torch.tensor(0.5, device="meta")), Harmonized(torch.tensor(0.5, device="meta"), unconditioned=True)):
        refused(["scalar is on meta: must be on cpu, like x"], "coefficients", manifold=manifold)


@pytest.mark.parametrize("call", CALLS)
def test_no_tokens(call):
    """Results and gradients of an empty batch; n = 1, where there is nothing to mix, as well."""
    for tokens, n in ((0, 2), (0, 1), (2, 1)):
        x, f, h_post, h_res, parameters = make_inputs(tokens, n, C, torch.float32)
        values = dict(zip(("x", "f", "h_post", "h_res", "phi", "alpha", "bias"), (x, f, h_post, h_res, *parameters)))
        leaves = {name: value.requires_grad_() for name, value in values.items()}
        results = run(call, leaves)
        results = results if isinstance(results, tuple) else (results,)
        sum(r.square().sum() for r in results).backward()
        used = CALLS[call][1]
        assert all(torch.isfinite(leaves[name].grad).all() for name in used) and all(r.shape[0] == tokens for r in results)
