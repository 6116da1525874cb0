"""A second run of an operation whose maps are kept: one launch, equal bits, the same backward."""

from contextlib import nullcontext

import pytest
import torch
from kernel_cases import DEVICE, all_manifolds, backend, make_inputs, norm_weight

from pipehc.kernels import coefficients_pre, post_res, post_res_pre
from pipehc.kernels.kept_maps import KeptMaps
from pipehc.kernels.language import noting

KINDS = ["birkhoff", "identity_offset", "harmonized"]


def run(leaves, manifold, normed, ended, kept=None):
    """Results and gradients of an operation and of the sub-layer's end, as a rebuilt piece and the one after it."""
    x, f, h_post, h_res, phi, alpha, bias, weight, f_next = leaves
    settings = {"manifold": manifold} | ({"norm": weight, "eps": 1e-6} if normed else {})
    with kept or nullcontext():
        if ended:
            x_next, *made = post_res_pre(x, f, h_post, h_res, phi, alpha, bias, **settings)
        else:
            x_next, made = x, coefficients_pre(x, phi, alpha, bias, **settings)
    results = [x_next, *made]
    if torch.is_grad_enabled():
        last = post_res(x_next, f_next, *made[1:])
        wanted = [leaf for leaf in leaves if normed or leaf is not weight]
        wanted = wanted if ended else [leaf for leaf in wanted if leaf is not f and leaf is not h_post and leaf is not h_res]
        results += torch.autograd.grad([last, made[0]], wanted, [last.detach().cos(), made[0].detach().sin()])
    return [result.detach() for result in results]


def leaves_of(tokens, n, channels, dtype, manifold):
    *streams, parameters = make_inputs(tokens, n, channels, dtype, manifold.per_stream)
    f_next = torch.randn(tokens, channels, generator=torch.Generator().manual_seed(9)).to(dtype)
    tensors = *streams, *parameters, norm_weight(channels, dtype), f_next
    return [tensor.to(DEVICE).requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("ended", [False, True])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_second_run_gives_the_same_bits_in_one_launch(kind, normed, ended):
    manifold, launched = all_manifolds()[kind], []
    with backend("triton"):
        for sizes in ((5, 3, 70, torch.float32), (18, 4, 24, torch.bfloat16)):
            leaves = leaves_of(*sizes, manifold)
            expected = run(leaves, manifold, normed, ended)
            kept = KeptMaps()
            with torch.no_grad():
                first = run(leaves, manifold, normed, ended, kept)
            with noting(lambda name, _: launched.append(name) or nullcontext()):
                second = run(leaves, manifold, normed, ended, kept)
            assert launched[:2] == ["rebuild_kernel", "post_res_kernel"] and not kept.tensors()
            assert not {"project_kernel", "map_kernel"} & set(launched)
            assert len(second) == len(expected) > len(first) == 4
            for one, other in zip(second, expected):
                assert torch.equal(one, other)
            for one, other in zip(first, expected):
                assert torch.equal(one, other)
            launched.clear()


def test_what_does_not_run_in_triton_keeps_nothing():
    manifold = all_manifolds()["birkhoff"]
    leaves, kept = leaves_of(5, 3, 8, torch.float32, manifold), KeptMaps()
    with backend("reference"):
        expected = run(leaves, manifold, True, True)
        with torch.no_grad():
            run(leaves, manifold, True, True, kept)
        assert not kept.tensors()
        assert all(torch.equal(one, other) for one, other in zip(run(leaves, manifold, True, True, kept), expected))


def test_maps_of_another_operation_are_not_taken():
    manifold = all_manifolds()["birkhoff"]
    kept = KeptMaps()
    with backend("triton"), torch.no_grad():
        run(leaves_of(5, 3, 8, torch.float32, manifold), manifold, True, True, kept)
        with pytest.raises(AssertionError, match="maps of"):
            run(leaves_of(6, 3, 8, torch.float32, manifold), manifold, True, True, kept)
