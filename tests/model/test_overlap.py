"""Overlapped pairs: the order of the figure, and the same bits as one after the other."""

import itertools

import pytest
import torch
from toy_chain import Toy, streams

from pipehc.comm.queues import make_queues
from pipehc.model.overlap import Half, overlap
from pipehc.model.stage import ModelStage
from pipehc.schedules.execute import OverlapStage
from pipehc.schedules.pair_order import pair_order

QUEUES = make_queues(torch.device("cpu"))


class Written:
    """A pass that only writes down what would run."""

    def __init__(self, log, chain, host_ahead):
        self._log, self._chain, self.host_ahead = log, chain, host_ahead

    def forward(self, index):
        self._log.append(f"F {self._chain.pieces[index].name}")

    def backward(self, index):
        self._log.append(f"B {self._chain.pieces[index].name}")


def order(ahead, back, dense=1, host_ahead=False):
    log = []
    halves = [Half(chain, Written(log, chain, host_ahead)) for chain in (Toy(ahead, dense).chain(), Toy(back, dense).chain())]
    for mark in overlap(*halves, lambda node: log.append(f"W {node}")):
        log.append(mark)
    return log


def test_blocks_with_experts_are_figure_4():
    """Two blocks on either side; the end of one and the start of the next are one piece, and of the next one's sub-layers too."""
    assert order(2, 2, dense=0) == [
        *("B 1.mlp.post", "B 1.mlp.sum", "B 1.mlp.combine"),
        *("F 0.attention.pre", "F 0.attention.f", "F 0.attention.post_pre", "F 0.mlp.route", "F 0.mlp.dispatch"),
        *("B 1.mlp.experts", "B 1.mlp.dispatch"),
        *("F 0.mlp.experts", "F 0.mlp.combine"),
        *("B 1.mlp.route", "B 1.attention.post_pre", "B 1.attention.f"),
        *("F 0.mlp.sum", "F 0.mlp.post_pre"),
        *("B 0.mlp.post_pre", "B 0.mlp.sum", "B 0.mlp.combine"),
        *("F 1.attention.f", "F 1.attention.post_pre", "F 1.mlp.route", "F 1.mlp.dispatch"),
        *("B 0.mlp.experts", "B 0.mlp.dispatch"),
        *("F 1.mlp.experts", "F 1.mlp.combine", "W 0.mlp", "F 1.mlp.sum", "F 1.mlp.post", "output"),
        *("B 0.mlp.route", "B 0.attention.post_pre", "B 0.attention.f", "B 0.attention.pre", "gradient"),
        *("W 1.mlp", "W 1.attention", "W 0.attention", "end"),
    ]


def test_weight_gradients_of_the_last_blocks_hide_messages_and_those_before_all_to_alls():
    log = order(4, 4, dense=0)
    output, gradient = log.index("output"), log.index("gradient")
    assert [line for line in log[gradient:] if line.startswith("W ")] == ["W 1.mlp", "W 1.attention", "W 0.attention"]
    assert [line for line in log[:output] if line.startswith("W ")] == [
        *("W 3.mlp", "W 3.attention", "W 2.mlp", "W 2.attention", "W 0.mlp"),
    ]
    assert log.index("W 3.mlp") == log.index("B 3.mlp.dispatch") + 1
    assert log.index("W 3.attention") == log.index("B 2.mlp.combine") + 1
    assert log.index("W 0.mlp") == log.index("F 3.mlp.combine") + 1


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_on_a_device_the_same_order_on_each_queue_and_experts_backward_before_the_host_must_wait(blocks):
    queues = {piece.name: piece.queue for piece in Toy(blocks, 0).chain().pieces}

    def by_queue(log):
        names = "compute", "communication", "high"
        return [[line for line in log if queues.get(line[2:], "compute") == name] for name in names]

    host, device = order(blocks, blocks, dense=0), order(blocks, blocks, dense=0, host_ahead=True)
    assert by_queue(host) == by_queue(device) and host != device
    for k in range(blocks):
        assert device.index(f"B {blocks - 1 - k}.mlp.experts") + 1 == device.index(f"F {k}.mlp.dispatch")


def test_dense_blocks_leave_the_exchanges_out():
    assert order(1, 1) == [
        *("B 0.mlp.post", "F 0.attention.pre", "F 0.attention.f", "F 0.attention.post_pre", "B 0.mlp.f", "F 0.mlp.f"),
        *("F 0.mlp.post", "output", "B 0.attention.post_pre", "B 0.attention.f", "B 0.attention.pre", "gradient"),
        *("W 0.mlp", "W 0.attention", "end"),
    ]


@pytest.mark.parametrize(("ahead", "back"), list(itertools.product((1, 2, 4), repeat=2)))
def test_all_pieces_run_once_in_their_order(ahead, back):
    log = order(ahead, back)
    names = [piece.name for piece in Toy(ahead).chain().pieces]
    assert [line[2:] for line in log if line.startswith("F ")] == names
    names = [piece.name for piece in Toy(back).chain().pieces]
    assert [line[2:] for line in log if line.startswith("B ")] == names[::-1]
    assert log.index("output") > max(i for i, line in enumerate(log) if line.startswith("F "))
    assert log.index("gradient") > max(i for i, line in enumerate(log) if line.startswith("B "))
    last_w = max(i for i, line in enumerate(log) if line.startswith("W "))
    assert log.index("gradient") < last_w


@pytest.mark.parametrize(("ahead", "back"), [(2, 2), (3, 2), (1, 4)])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_pair_computes_what_its_halves_do_one_after_the_other(ahead, back, recompute):
    toys = Toy(ahead, seed=1), Toy(back, dense=2, seed=2)
    found = []
    for together in (False, True):
        one, other = (ModelStage(toy.chain(3), QUEUES, _no_batch, 1.0, recompute=recompute) for toy in toys)
        assert isinstance(one, OverlapStage)
        dy = other.forward(0, streams(0)).cos()
        if together:
            pair = one.overlap(1, streams(1), other, 0, dy)
            y, dx = pair.output(), pair.input_gradient()
            pair.finish()
        else:
            y, dx = one.forward(1, streams(1)), other.backward_input(0, dy)
        other.backward_weight(0)
        last = one.backward_input(1, y.sin())
        one.backward_weight(1)
        gradients = {(i, name): g for i, toy in enumerate(toys) for name, g in toy.take_gradients().items()}
        found.append({"y": y, "dx": dx, "last": last} | gradients)
    for name, tensor in found[0].items():
        assert torch.equal(found[1][name], tensor), name


def _no_batch(microbatch):
    raise AssertionError("a middle stage has no batch")


@pytest.mark.parametrize(("ahead", "back"), [(1, 1), (2, 2), (3, 1), (1, 3)])
def test_what_runs_is_what_the_simulator_takes_for_it(ahead, back):
    """Both walk `pair_order`: node by node the pieces of the chains, here with one dense block each."""
    chains = [Toy(blocks).chain() for blocks in (ahead, back)]
    pieces = [{node.name: [p.name for p in c.pieces[node.start : node.stop]] for node in c.nodes} for c in chains]
    expected = []
    for turn in pair_order(*(list(found) for found in pieces)):
        if isinstance(turn, str):
            expected.append(turn)
        elif turn[0] == "W":
            expected.append(f"W {turn[1]}")
        else:
            expected += [f"{turn[0]} {name}" for name in (pieces[0][turn[1]] if turn[0] == "F" else pieces[1][turn[1]][::-1])]
    assert order(ahead, back) == expected
