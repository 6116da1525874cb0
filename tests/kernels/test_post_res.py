"""x' = H_res x + H_post^T f: reference against loops, kernel against the reference in fp64; and the backward it hands on."""

import loops
import pytest
import torch
from kernel_cases import ADVERSARIAL, DEVICE, TOLERANCE, adversarial, backend, compare, make_inputs, relative_error

from pipehc.kernels import coefficients_pre, post_res
from pipehc.kernels.link import claim
from pipehc.kernels.manifolds import Birkhoff


def inputs(tokens, n, channels, dtype):
    return make_inputs(tokens, n, channels, dtype)[:4]


def test_reference_equals_loops():
    arguments = [v.double() for v in inputs(3, 4, 5, torch.float64)]
    for *token, x_next in zip(*arguments, post_res(*arguments)):
        torch.testing.assert_close(x_next, torch.from_numpy(loops.post_res(*(v.numpy() for v in token))))


def test_gradients_of_the_reference_in_fp64():
    leaves = [v.double().requires_grad_() for v in inputs(2, 2, 3, torch.float64)]
    assert torch.autograd.gradcheck(post_res, leaves)


@pytest.mark.parametrize(("tokens", "n", "channels"), [(0, 2, 5), (1, 1, 1), (17, 3, 70), (5, 4, 64), (3, 8, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernel(tokens, n, channels, dtype):
    compare(post_res, inputs(tokens, n, channels, dtype), TOLERANCE[dtype])


@pytest.mark.parametrize("case", ADVERSARIAL)
def test_kernel_on_adversarial_inputs(case):
    x, f, h_post, h_res, parameters = make_inputs(6, 3, 20, torch.float32)
    x, f, _ = adversarial(case, x, f, parameters)
    compare(post_res, (x, f, h_post, h_res), 1e-5)


@pytest.mark.parametrize("n", [2, 5, 6, 7])
def test_kernel_for_every_number_of_streams(n):
    compare(post_res, inputs(18, n, 40, torch.float32), 1e-5)


def test_views_of_larger_tensors():
    x, f, h_post, h_res = inputs(5, 3, 6, torch.float32)

    def of_views(x, f, h_post, h_res):
        return post_res(x.transpose(0, 1), f[:, ::2], h_post.T, h_res.mT)

    wide = f.repeat_interleave(2, 1)
    compare(of_views, (x.transpose(0, 1).contiguous(), wide, h_post.T.contiguous(), h_res), 1e-5)


def test_bad_shapes_are_named():
    x, f, h_post, h_res = inputs(3, 2, 4, torch.float32)
    with pytest.raises(ValueError, match=r"h_res has shape \[3, 4\]: must be \[3, 2, 2\]"):
        post_res(x, f, h_post, h_res.flatten(1))


class Sublayer:
    """coefficients_pre, a branch, post_res; `between` may exchange the tensors that post_res gets."""

    def __init__(self, between=lambda x, h_post, h_res: (x, h_post, h_res), branch=torch.tanh, layers=1):
        self.between, self.branch = between, branch
        self.x, _, _, _, self.parameters = make_inputs(5, 3, 10, torch.float32)
        self.leaves = [t.to(DEVICE).requires_grad_() for t in (self.x, *self.parameters)]

    def output(self):
        x, *parameters = self.leaves
        y, h_post, h_res = coefficients_pre(x, *parameters, manifold=Birkhoff(2))
        x, h_post, h_res = self.between(x, h_post, h_res)
        return post_res(x, self.branch(y), h_post, h_res)

    def gradients(self, name, wrt=None):
        with backend(name):
            loss = (self.output() * torch.linspace(-1, 1, 150, device=DEVICE).view(5, 3, 10)).sum()
            return torch.autograd.grad(loss, wrt if wrt is not None else self.leaves, allow_unused=True)


def recombined(x, h_post, h_res):
    return x.view(-1).view(x.shape), h_post, h_res


def detached(x, h_post, h_res):
    return x.detach(), h_post, h_res


def restarted(x, h_post, h_res):
    return x.detach().requires_grad_(), h_post, h_res


def copied(x, h_post, h_res):
    return x * 1.0, h_post, h_res


def exchanged(x, h_post, h_res):
    return x, h_post.view_as(h_post), h_res


def mixed(x, h_post, h_res):
    return x, h_post, h_res.detach()


@pytest.mark.parametrize("between", [recombined, detached, restarted, copied, exchanged, mixed])
@pytest.mark.parametrize("branch", [torch.tanh, torch.zeros_like], ids=["tanh", "constant"])
def test_gradients_whether_or_not_the_backward_can_be_handed_on(between, branch):
    sublayer = Sublayer(between, branch)
    for got, want in zip(sublayer.gradients("triton"), sublayer.gradients("reference")):
        assert (got is None or not got.any()) if want is None else relative_error(got, want) < 1e-5


def test_handed_on_backward_runs_again_in_a_kept_graph():
    sublayer = Sublayer()
    with backend("triton"):
        loss = sublayer.output().square().sum()
        first = torch.autograd.grad(loss, sublayer.leaves, retain_graph=True)
        second = torch.autograd.grad(loss, sublayer.leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_second_use_of_the_same_coefficients_computes_its_own_gradients():
    def twice(x, *parameters):
        y, h_post, h_res = coefficients_pre(x, *parameters, manifold=Birkhoff(2))
        return post_res(x, torch.tanh(y), h_post, h_res), post_res(x, y.square(), h_post, h_res)

    x, _, _, _, parameters = make_inputs(5, 3, 10, torch.float32)
    compare(twice, (x, *parameters), 1e-5)


def test_coefficients_that_are_watched_get_their_gradient():
    seen = []

    def watch(x, h_post, h_res):
        h_res.register_hook(lambda grad: seen.append(grad.clone()))
        return x, h_post, h_res

    Sublayer(watch).gradients("triton")
    Sublayer(watch).gradients("reference")
    assert len(seen) == 2 and relative_error(*seen) < 1e-5


def test_gradient_by_coefficients_alone_is_an_error_or_right_never_wrong():
    kept = {}

    def keep(x, h_post, h_res):
        kept["h_res"] = h_res
        return x, h_post, h_res

    def loss(between):
        with backend("triton"):
            return Sublayer(between).output().sum()

    total = loss(keep)
    with pytest.raises(RuntimeError, match="not have been used"):
        torch.autograd.grad(total, kept["h_res"])

    def view(x, h_post, h_res):
        kept["h_res"] = h_res
        return x, h_post, h_res.view_as(h_res)

    total = loss(view)
    (grad,) = torch.autograd.grad(total, kept["h_res"])
    assert grad.abs().sum() > 0


@pytest.mark.parametrize("change", ["nothing", "x", "a wider f"])
def test_nothing_is_handed_on_when_x_has_changed_or_f_would_be_rounded(change):
    leaf, f, _, _, parameters = make_inputs(5, 3, 10, torch.float32)
    x, f = leaf.to(DEVICE).requires_grad_() * 1.0, f.to(DEVICE)
    with backend("triton"):
        _, h_post, h_res = coefficients_pre(x, *(p.to(DEVICE) for p in parameters), manifold=Birkhoff(2))
    if change == "x":
        x.mul_(2.0)
    assert (claim(x, f.double() if change == "a wider f" else f, h_post, h_res) is None) == (change != "nothing")


def test_no_gradients_wanted():
    x, f, h_post, h_res = (t.to(DEVICE) for t in inputs(3, 2, 4, torch.float32))
    with backend("triton"), torch.no_grad():
        assert not post_res(x.requires_grad_(), f, h_post, h_res).requires_grad
