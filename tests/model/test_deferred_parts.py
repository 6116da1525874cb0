"""Weight gradients that a stage computes in its backward, by kinds of nodes: when, and with which bits."""

import pytest
import torch
from toy_chain import Toy, streams

from pipehc.comm.queues import make_queues
from pipehc.model.stage import ModelStage

ATTENTION = {"0.attention", "1.attention", "1.tokens", "1.probs"}
FFN = {"0.mlp", "1.expert"}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("at_once", "there"), [((), set()), (("attention",), ATTENTION), (("mlp", "mlp_post"), FFN)])
def test_those_and_no_others_are_there_before_w_with_the_same_bits(at_once, there, recompute):
    def stage(at_once):
        toy = Toy(2)
        queues = make_queues(torch.device("cpu"))
        return toy, ModelStage(toy.chain(2), queues, lambda m: None, 1.0, recompute=recompute, at_once=at_once)

    (toy, own), (plain, other) = stage(at_once), stage(())
    for one in (own, other):
        one.forward(0, streams(0))
        one.backward_input(0, streams(1))
    products = ATTENTION | FFN
    assert {name for name in products if toy.weights[name].grad is not None} == there
    for one in (own, other):
        one.backward_weight(0)
    found, expected = toy.take_gradients(), plain.take_gradients()
    assert found.keys() == expected.keys() >= products and all(torch.equal(found[name], expected[name]) for name in expected)


def test_experts_compute_theirs_once_the_all_to_all_of_their_gradient_is_on_its_way():
    toy = Toy(2)
    told = []

    def watch(kind, microbatch, node, queue):
        told.append((kind, node))
        return lambda: None

    class Told(ModelStage):
        def around(self, microbatch):
            def around(node):
                told.append(("W", node))
                return super(Told, self).around(microbatch)(node)

            return around

    stage = Told(toy.chain(), make_queues(torch.device("cpu")), lambda m: None, 1.0, watch=watch, at_once=("mlp",))
    stage.forward(0, streams(0))
    del told[:]
    stage.backward_input(0, streams(1))
    at = told.index(("W", "1.mlp"))
    assert told[at - 1] == ("B", "1.dispatch") and told[at + 1] == ("B", "1.attention")
    assert [node for kind, node in told if kind == "W"] == ["1.mlp", "0.mlp"]
    stage.backward_weight(0)
    assert {node for kind, node in told if kind == "W"} == {"0.attention", "1.attention", "0.mlp", "1.mlp"}
