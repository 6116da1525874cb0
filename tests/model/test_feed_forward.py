"""Feed-forward networks against autograd's own: equal to the bit in fp32, grouped or not, whatever is made again."""

import weakref

import pytest
import torch
from torch.nn.functional import silu

from pipehc.model.feed_forward import Groups, Projection, feed_forward
from pipehc.model.products import add_product, meta_widens, product_adds, stacked, why_not_grouped
from pipehc.model.wgrad import Accumulate, WeightGradStore, linear

ROWS = (3, 0, 5, 1)
C, F = 16, 24


def inputs(rows, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    (x, dy), probs = torch.randn(2, sum(rows), C, generator=g), torch.rand(sum(rows), generator=g)
    w1, w2 = torch.randn(len(rows), 2 * F, C, generator=g), torch.randn(len(rows), C, F, generator=g)
    return x.to(dtype), probs, dy.to(dtype), w1.to(dtype), w2.to(dtype)


def plain(rows, x, probs, dy, w1, w2):
    """An expert after the other, as Megatron has it. Output, gradients of x, probs and weights."""
    leaves = [x.clone().requires_grad_(), probs.clone().requires_grad_()]
    weights = [[w.clone().requires_grad_() for w in ws] for ws in (w1, w2)]
    outs = []
    for part, p, a, b in zip(leaves[0].split(rows), leaves[1].split(rows), *weights):
        gate, up = part.matmul(a.t()).chunk(2, -1)
        outs.append(((silu(gate) * up) * p.unsqueeze(-1)).to(x.dtype).matmul(b.t()))
    y = torch.cat(outs)
    y.backward(dy)
    return y.detach(), *(leaf.grad for leaf in leaves), *(torch.stack([w.grad for w in ws]) for ws in weights)


def own(rows, x, probs, dy, w1, w2, *, rebuild=False, grouped=False, deferred=True):
    x, probs = x.clone().requires_grad_(), probs.clone().requires_grad_()
    found = [torch.zeros_like(w) for w in (w1, w2)]
    store = WeightGradStore()
    projections = []
    for w, into in zip((w1, w2), found):
        each = [part.detach().requires_grad_() for part in w]
        takes = [Accumulate(part.add_) for part in into]
        projections.append(Projection(each, w if grouped else None, takes if deferred else None))
    ends = torch.tensor(rows).cumsum(0, dtype=torch.int32) if grouped else None
    with store.deferring():
        y = feed_forward(x, *projections, Groups(rows, ends), probs, rebuild=rebuild)
    y.backward(dy)
    if deferred:
        assert len(store) == 2 * len(rows) and not any(f.any() for f in found)
        store.flush()
    else:
        found = [torch.stack([w.grad for w in p.weights]) for p in projections]
    return y.detach(), x.grad, probs.grad, *found


@pytest.mark.parametrize("rows", [ROWS, (7,), (0, 0)])
@pytest.mark.parametrize("form", ["", "rebuild", "at once", "grouped"])
def test_equals_autograd_to_the_bit_in_fp32(rows, form):
    given = inputs(rows)
    found = own(rows, *given, rebuild=form == "rebuild", grouped=form == "grouped", deferred=form != "at once")
    for got, want in zip(found, plain(rows, *given)):
        assert torch.equal(got, want)


@pytest.mark.parametrize("grouped", [False, True])
def test_bf16_is_nearer_to_the_truth_than_steps_that_round(grouped):
    """One rounding where the eager form has four; grouped products on a CPU are torch's own, as on a GPU."""
    given = inputs(ROWS, torch.bfloat16)
    truth = plain(ROWS, *(t.double() for t in given))
    found, again, eager = own(ROWS, *given, grouped=grouped), own(ROWS, *given, grouped=grouped, rebuild=True), plain(ROWS, *given)
    for got, same, rounded, want in zip(found, again, eager, truth):
        assert torch.equal(got, same)
        error = (got.double() - want).norm() / want.norm()
        assert error < 1e-2 and error < 1.2 * (rounded.double() - want).norm() / want.norm()


def test_what_is_rebuilt_is_not_kept():
    def kept(rebuild):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(tuple(t.shape)) or t, lambda t: t):
            x, probs, _, w1, w2 = inputs(ROWS)
            projections = [Projection(list(w), None, [Accumulate(lambda g: None)] * 4) for w in (w1, w2)]
            feed_forward(x.requires_grad_(), *projections, Groups(ROWS), probs, rebuild=rebuild)
        return sorted(sizes)

    assert kept(True) == [(9,), (9, C), (9, 2 * F)] and kept(False) == [(9,), (9, C), (9, F), (9, 2 * F)]


class Held:
    """Something that can be referred to weakly."""


class Marked(torch.autograd.Function):
    """A step of a graph that holds something."""

    @staticmethod
    def forward(ctx, x, held):
        ctx.held = held
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad, None


@pytest.mark.parametrize("form", ["feed_forward", "rebuild", "linear"])
def test_weight_gradients_that_wait_hold_no_graph(form):
    x, probs, dy, w1, w2 = inputs(ROWS)
    held = Held()
    alive, store = weakref.ref(held), WeightGradStore()
    takes = [[Accumulate(torch.zeros_like(part).add_) for part in w] for w in (w1, w2)]
    with store.deferring():
        marked = Marked.apply(x.requires_grad_(), held)
        if form == "linear":
            y = linear(marked, w1[0, :C].clone().requires_grad_(), Accumulate(torch.zeros(C, C).add_))
        else:
            projections = [Projection(list(w), None, into) for w, into in zip((w1, w2), takes)]
            y = feed_forward(marked, *projections, Groups(ROWS), probs, rebuild=form == "rebuild")
    del held, marked
    assert alive() is not None
    y.backward(dy)
    del y
    assert len(store) and alive() is None
    store.flush()


@pytest.mark.parametrize("rebuild", [False, True])
def test_a_second_backward_is_refused(rebuild):
    """The first has written gradients over what it kept."""
    x, probs, dy, w1, w2 = inputs(ROWS)
    projections = [Projection([part.requires_grad_() for part in w.clone()]) for w in (w1, w2)]
    y = feed_forward(x.requires_grad_(), *projections, Groups(ROWS), probs, rebuild=rebuild)
    y.backward(dy, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(dy)


def test_an_input_without_gradient_still_owes_the_weights():
    x, probs, dy, w1, w2 = inputs(ROWS)
    store, found = WeightGradStore(), []
    with store.deferring():
        projections = [Projection(list(w), None, [Accumulate(found.append)] * 4) for w in (w1, w2)]
        y = feed_forward(x, *projections, Groups(ROWS), probs)
    y.backward(dy)
    store.flush()
    assert len(found) == 8


def test_weights_are_one_tensor_where_they_lie_equally_far_apart():
    memory = torch.arange(100.0)
    weights = [memory[k : k + 6].view(2, 3) for k in (10, 20, 30)]
    assert torch.equal(stacked(weights), torch.stack(weights)) and stacked(weights).data_ptr() == weights[0].data_ptr()
    assert torch.equal(stacked(weights[:1]), weights[0].unsqueeze(0))
    first, second, third = weights
    for others in (weights[::-1], [first, third, second], [first, second.clone()], [*weights, memory[41:47].view(2, 3)]):
        assert stacked(others) is None
    assert stacked([memory[0:6].view(2, 3), memory[4:10].view(2, 3)]) is None  # they overlap
    assert stacked([memory[0:6].view(2, 3), memory[6:12].view(3, 2)]) is None


def test_a_product_adds_itself():
    g = torch.Generator().manual_seed(1)
    grad, dy, x = torch.randn(4, 5, generator=g), torch.randn(7, 4, generator=g), torch.randn(7, 5, generator=g)
    want = grad.double() + dy.double().t() @ x.double()
    assert product_adds(x, grad)
    add_product(grad, dy, x)
    torch.testing.assert_close(grad.double(), want, rtol=1e-6, atol=1e-6)
    add_product(grad, dy[:0], x[:0])  # of no tokens
    torch.testing.assert_close(grad.double(), want, rtol=1e-6, atol=1e-6)


def test_products_of_bf16_add_themselves_where_torch_can(monkeypatch):
    """On a GPU; meta stands for one, unless plain PyTorch is asked for."""
    half = {d: torch.zeros(8, 8, dtype=torch.bfloat16, device=d) for d in ("cpu", "meta")}
    wide = {d: torch.zeros(8, 8, device=d) for d in half}
    assert [product_adds(half[d], wide[d]) for d in half] == [False, meta_widens()]
    assert [why_not_grouped(half[d]) is None for d in half] == [False, True]
    assert "bf16" in why_not_grouped(wide["meta"])
    assert "16 bytes" in why_not_grouped(half["meta"][:, :6])
    if meta_widens():
        add_product(wide["meta"], half["meta"], half["meta"])
    monkeypatch.setenv("PIPEHC_KERNELS", "reference")
    assert not product_adds(half["meta"], wide["meta"]) and why_not_grouped(half["meta"]) is not None
