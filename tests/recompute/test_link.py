"""The end of a sub-layer leaves half of its backward to its maps, though each has a graph of its own (kernels/link.py)."""

from collections import Counter
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from kernel_cases import backend, relative_error
from toy_chain import STREAMS, TOKENS, Toy, streams

from pipehc.comm.queues import IssueQueue, make_queues
from pipehc.kernels.language import noting
from pipehc.model import sublayers
from pipehc.model.sublayers import build_chain
from pipehc.recompute import Pass, Piece, SavedBytes

LATE = make_queues(torch.device("cpu"))
EARLY = dict.fromkeys(LATE, IssueQueue())


class Launched:
    """Kernels by phase and name."""

    def __init__(self):
        self.phases, self.phase = {"F": Counter(), "R": Counter(), "B": Counter()}, "F"

    def __call__(self, name, args):
        self.phases[self.phase][name] += 1
        return nullcontext()


def through(toy, chain, name="triton", queues=LATE, **options):
    """(result, gradients by name) and what was launched."""
    launched = Launched()
    with backend(name), noting(launched):
        run = Pass(chain, queues, {"x0": streams(1), "labels": streams(2)}, **options)
        run.forward_all()
        result = run.result()
        launched.phase = "R"
        run.rebuild()
        launched.phase = "B"
        run.seed(chain.result, result.cos())
        run.backward_all()
        return {"result": result, "x0": run.gradient("x0")} | toy.take_gradients(), launched.phases


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def assert_close(found, expected, tolerance=1e-5):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert relative_error(found[name], tensor) < tolerance, name


@pytest.mark.parametrize("kind", ["mhc", pytest.param("harmonized", marks=pytest.mark.slow)])
def test_every_end_of_a_sublayer_hands_on_its_backward(kind):
    """Whether or not its pieces are rebuilt, and whatever queues they are on; with the same gradients."""
    toy = Toy(2, kind=kind, iterations=2)
    expected, _ = through(toy, toy.chain(3), "reference")
    kept, launched = through(toy, toy.chain(3), queues=EARLY)
    assert_close(kept, expected)
    assert launched["B"]["map_backward_kernel"] == 4 and "post_res_backward_kernel" not in launched["B"]
    rebuilt, launched = through(toy, toy.chain(3), recompute=True)
    assert_equal(rebuilt, kept)
    assert launched["B"]["map_backward_kernel"] == 4 and "post_res_backward_kernel" not in launched["B"]


def test_without_it_gradients_are_the_same_and_launches_more(monkeypatch):
    toy = Toy(2, iterations=2)
    linked, few = through(toy, toy.chain(), recompute=True)
    monkeypatch.setattr(sublayers, "carriers", lambda h_post, h_res: (None, None))
    apart, many = through(toy, toy.chain(), recompute=True)
    assert_close(linked, apart)
    assert many["B"] == few["B"] + Counter(post_res_backward_kernel=4) - Counter(pre_kernel=1)


@pytest.mark.parametrize("recompute", [False, True])
def test_what_else_uses_the_streams_and_the_maps_adds_its_gradients(recompute):
    """An exit that takes the streams of the middle, too, and an F that looks at its own H_res."""
    toy = Toy(2, iterations=2)
    looking = Piece("f", lambda x, h_res: (x * h_res.mean(),), ("normed", "h_res"), ("f",), "0.attention")
    toy.sublayers[0] = replace(toy.sublayers[0], f=(looking,))
    del toy.weights["0.attention"]
    scale = toy._scale("exit")
    exit = Piece("exit", lambda x, middle, y: ((x * middle * scale - y).square().mean(),), ("x4", "x2", "labels"), ("loss",))
    chain = build_chain(toy.sublayers, [range(1), range(1, 4)], None, exit)
    expected, _ = through(toy, chain, "reference")
    found, launched = through(toy, chain, recompute=recompute)
    assert_close(found, expected)
    assert "post_res_backward_kernel" not in launched["B"]


def test_static_maps_compute_their_own_gradients():
    toy = Toy(1, static=True, kind="harmonized")
    expected, _ = through(toy, toy.chain(), "reference")
    for recompute in (False, True):
        found, launched = through(toy, toy.chain(), recompute=recompute)
        assert_close(found, expected)
        assert launched["B"]["post_res_backward_kernel"] == 2


@pytest.mark.parametrize("last", [False, True])
def test_the_end_of_a_block_is_rebuilt_for_the_backward_alone(last):
    """Where nobody takes the streams that it makes. The exit of the last block does."""
    toy = Toy(1, iterations=2)
    chain = toy.chain(1, last=last)
    kept, _ = through(toy, chain)
    count = SavedBytes()
    rebuilt, launched = through(toy, chain, recompute=True, count=count)
    assert_equal(rebuilt, kept)
    # Of two sub-layers the maps, their products, and what the two norms are.
    assert count.by_rebuilt == 4 * 2 * TOKENS * (2 * STREAMS * (STREAMS + 2) + 1 + STREAMS + 1)
    assert launched["F"]["post_res_kernel"] == 2
    assert launched["R"] + launched["B"] == Counter(
        rebuild_kernel=2, post_res_kernel=int(last), pre_kernel=2,
        map_backward_kernel=2, stream_gradient_kernel=2, phi_gradient_kernel=2, parameter_sum_kernel=2,
    )  # fmt: skip


def test_forwards_that_nobody_differentiates_link_nothing():
    toy = Toy(1, iterations=2)
    with backend("triton"), torch.no_grad():
        run = Pass(toy.chain(), LATE, {"x0": streams(1)}, recompute=True)
        run.forward_all()
        assert not run.result().requires_grad and not run._values and not run._graphs
