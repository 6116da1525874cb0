"""Gradients of hyper-connections: computed where their piece runs, added by W, and no queue waits for another to add them."""

import copy
import threading

import pytest
import torch
from toy_chain import Toy, streams

from pipehc.comm.queues import IssueQueue, make_queues
from pipehc.kernels.manifolds import KINDS
from pipehc.model.hyper_connection import HyperConnection
from pipehc.model.stage import ModelStage
from pipehc.model.wgrad import Accumulate, StandIns, WeightGradStore
from pipehc.recompute import Chain, Pass, Piece


class Account:
    """What `install_deferral` makes for Megatron's modules."""

    def __init__(self):
        self.owed, self.added = [], []

    def __call__(self, parameter):
        def add(gradient):
            assert self.owed
            self.added.append(parameter)
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

        return Accumulate(add, owe=lambda: self.owed.append(parameter))


def deferred(toy, account):
    for sublayer in toy.sublayers:
        sublayer.connection.defer(StandIns(account))
    return toy


def connections(toy):
    return {name: p for name, p in toy.weights.items() if name.endswith((".phi", ".alpha", ".bias"))}


def steps(toy, queues, recompute, overlap, microbatches=4):
    """Gradients after one forward and backward of some micro-batches, in pairs or not."""
    stage = ModelStage(toy.chain(3), queues, lambda m: None, 1.0, recompute=recompute)
    stage.forward(0, streams(0))
    for m in range(1, microbatches):
        dy = streams(100 + m)
        if overlap:
            pair = stage.overlap(m, streams(m), stage, m - 1, dy)
            pair.output(), pair.input_gradient(), pair.finish()
        else:
            stage.forward(m, streams(m))
            stage.backward_input(m - 1, dy)
        stage.backward_weight(m - 1)
    stage.backward_input(microbatches - 1, streams(100 + microbatches))
    stage.backward_weight(microbatches - 1)
    return toy.take_gradients()


@pytest.mark.parametrize("late", [False, True])
def test_sums_have_the_same_bits_however_the_step_is_run_and_as_without(late):
    def queues():
        """late: as on CUDA at the worst, the queue of high priority has done nothing before somebody waits for it."""
        return make_queues(torch.device("cpu")) if late else dict.fromkeys(("compute", "high", "communication"), IssueQueue())

    expected = steps(Toy(2), queues(), False, False)
    assert all(gradient is not None for gradient in expected.values())
    for recompute in (False, True):
        for overlap in (False, True):
            account = Account()
            found = steps(deferred(Toy(2), account), queues(), recompute, overlap)
            assert found.keys() == expected.keys()
            for name, gradient in expected.items():
                assert torch.equal(found[name], gradient), (name, recompute, overlap)
            assert len(account.added) == len(account.owed) == 4 * len(connections(Toy(2)))


def accumulators(tensor):
    """The leaves below a result, whose gradients autograd adds."""
    found, todo, seen = [], [tensor.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        todo += [following for following, _ in node.next_functions]
    return found


@pytest.mark.parametrize("kind", [*KINDS, "static"])
def test_no_parameter_is_in_the_graph_of_a_piece(kind):
    """Autograd adds the gradient of a leaf on the queue where it first saw it: the queue of a piece would wait for that one."""
    static = kind == "static"
    one, other = (HyperConnection(4, 2, "harmonized" if static else kind, static=static, alpha=0.3) for _ in range(2))
    x = torch.randn(3, 1, 8)
    plain = one.post_res_pre(x, torch.randn(3, 1, 4), *one.coefficients_pre(x)[1:], other)
    assert {id(leaf) for leaf in accumulators(plain[1])} & {id(p) for p in other.parameters()}
    for connection in (one, other):
        connection.defer(StandIns(Account()))
    results = one.post_res_pre(x, torch.randn(3, 1, 4), *one.coefficients_pre(x)[1:], other)
    leaves = {id(leaf) for result in results for leaf in accumulators(result)}
    assert leaves and not leaves & {id(p) for c in (one, other) for p in c.parameters()}


def test_they_land_in_w_and_not_before():
    account = Account()
    toy = deferred(Toy(1), account)
    queues = make_queues(torch.device("cpu"))
    held = []
    stage = ModelStage(toy.chain(), queues, lambda m: None, 1.0)
    stage.forward(0, streams(0))
    stage.backward_input(0, streams(1))
    queues["compute"].hold = held.append
    assert len(account.owed) == len(connections(toy)) and account.added == []
    assert all(p.grad is None for p in connections(toy).values())
    stage.backward_weight(0)
    assert len(account.added) == len(connections(toy)) == len(held)  # of another queue's memory


def test_w_comes_after_every_queue_that_the_backward_used():
    """Also where nothing else makes it wait: nobody asks for the gradient of what enters this chain."""
    weight, store, queues = torch.nn.Parameter(torch.ones(2)), WeightGradStore(), make_queues(torch.device("cpu"))
    stand_ins = StandIns(Account())
    piece = Piece("scale", lambda x: (x * stand_ins(weight),), ("x0",), ("x1",), "0.mlp_post", queue="high")
    given = {"x0": torch.full((2,), 3.0)}
    run = Pass(Chain([[piece]], "x1"), queues, given, scope=store.deferring, backward_scope=store.receiving)
    run.forward_all()
    run.seed("x1", torch.ones_like(run.result()))
    run.backward_all()
    store.flush()
    assert weight.grad.tolist() == [3, 3]


def test_gradients_are_held_for_the_queue_that_adds_them():
    held, store, parameter = [], WeightGradStore(), torch.nn.Parameter(torch.ones(2))
    stand_in = StandIns(Account())(parameter)
    with store.receiving():
        (3 * stand_in).sum().backward()
    assert len(store) == 1 and parameter.grad is None and stand_in.grad is None
    store.compute()
    assert len(store) == 1  # another queue may be at it still
    store.flush(held.append)
    assert len(store) == 0 and [g.tolist() for g in held] == [[3, 3]] and held[0] is parameter.grad


def test_stand_ins_follow_their_parameters():
    stand_ins, parameter = StandIns(Account()), torch.nn.Parameter(torch.ones(2))
    first = stand_ins(parameter)
    assert first is stand_ins(parameter) and first.data_ptr() == parameter.data_ptr()
    with torch.no_grad():
        assert stand_ins(parameter) is parameter
    parameter.data = torch.zeros(2)  # as a wrapper does that moves all weights into one buffer
    assert stand_ins(parameter).tolist() == [0, 0]
    parameter.requires_grad_(False)
    assert stand_ins(parameter) is parameter
    parameter.requires_grad_(True)
    stand_ins(parameter).sum().backward()  # without a store: at once
    assert parameter.grad.tolist() == [1, 1]


def test_a_copied_module_has_stand_ins_of_its_own_parameters():
    account = Account()
    account.lock = threading.Lock()  # as DDP's groups, nothing that could be copied
    original = HyperConnection(4, 2)
    original.defer(StandIns(account))
    copied = copy.deepcopy(original)
    x = torch.randn(3, 1, 8)
    copied.coefficients_pre(x)[0].sum().backward()
    assert account.added and all(any(p is own for own in copied.parameters()) for p in account.added)
