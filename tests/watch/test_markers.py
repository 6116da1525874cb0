"""Ranges for profilers: each opens and closes on the thread that runs its work, they nest, and look as in our drawings."""

import sys
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from toy_chain import CHANNELS, STREAMS, TOKENS, Toy, streams

from pipehc.comm.messages import Mailbox
from pipehc.comm.queues import IssueQueue, make_queues
from pipehc.model.stage import ModelStage
from pipehc.recompute import Exchange
from pipehc.schedules import Costs, build, compile
from pipehc.schedules.draw.timeline import simulated
from pipehc.schedules.execute import execute
from pipehc.schedules.program import Post, Run, Send, Wait
from pipehc.schedules.spans import Span
from pipehc.watch.markers import Markers, available
from pipehc.watch.trace import Node, node_watch

AS_CUDA = dict.fromkeys(("compute", "high", "communication"), IssueQueue())  # all is launched when it is issued


class Domain:
    """In the place of NVTX's: what is open, innermost last, and who opened it."""

    def __init__(self):
        self.open, self.opened, self.closed = [], [], []

    def get_event_attributes(self, message, color, category):
        return message, color, category

    def push_range(self, attributes):
        self.opened.append(attributes)
        self.open.append((attributes, threading.get_ident()))

    def pop_range(self):
        attributes, thread = self.open.pop()
        assert thread == threading.get_ident()
        self.closed.append(attributes)

    def innermost(self):
        (message, _, _), thread = self.open[-1]
        assert thread == threading.get_ident()  # NVTX: kernels belong to the ranges of the thread that launches them
        return message


class Looks(torch.autograd.Function):
    """Notes which range is open where a piece runs forward, and where it runs backward."""

    @staticmethod
    def forward(ctx, x, look):
        ctx.look = look
        look("F")
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        assert not torch._C._is_multithreading_enabled()  # else a device's kernels are launched by another thread
        ctx.look("B")
        return gradient.clone(), None


def looking(toy, domain, seen):
    """The F of every sub-layer notes (F or B, its node, the innermost range)."""

    def around(piece):
        def look(kind):
            seen.append((kind, piece.node, domain.innermost()))

        def run(*values):
            if isinstance(piece, Exchange):
                look("F")
                return piece.run(*values)
            first, *others = piece.run(*values)
            return Looks.apply(first, look), *others

        if not isinstance(piece, Exchange):
            return replace(piece, run=run)

        def backward(*values):
            look("B")
            return piece.run_backward(*values)

        return replace(piece, run=run, run_backward=backward)

    toy.sublayers = [replace(s, f=tuple(map(around, s.f))) for s in toy.sublayers]
    return toy


def no_batch(microbatch):
    raise AssertionError("a middle stage has no batch")


def test_ranges_of_nodes_hold_their_work_forward_and_backward():
    domain, seen = Domain(), []
    markers = Markers([(0, 0)], domain)
    chain = looking(Toy(2), domain, seen).chain(3)
    stage = ModelStage(chain, AS_CUDA, no_batch, 1.0, recompute=True, watch=node_watch([markers], 0, 0))
    y = stage.forward(7, streams(1))
    stage.recompute(7)
    stage.backward_input(7, y.cos())
    stage.backward_weight(7)
    assert domain.open == [] and domain.opened == domain.closed
    assert {kind for kind, _, _ in seen} == {"F", "B"}
    for kind, node, innermost in seen:
        assert innermost == f"node {kind}7 {node}"
    nodes = [node.name for node in chain.nodes]
    assert {node for kind, node, _ in seen if kind == "B"} == set(nodes) - {"0.mlp_post"}  # a hyper-connection alone
    assert {message for message, _, _ in domain.opened} >= {f"node {kind}7 {node}" for kind in "FB" for node in nodes}
    assert any(message.startswith("node R7 ") for message, _, _ in domain.opened)


@pytest.mark.parametrize("queues", [AS_CUDA, make_queues(torch.device("cpu"))], ids=["as CUDA", "CPU"])
def test_ranges_of_interleaved_nodes_nest(queues):
    """On a CPU all-to-alls end among the work of other nodes; their ranges then close with those inside."""
    domain = Domain()
    markers = Markers([(0, 0), (0, 1)], domain)
    one, other = (
        ModelStage(Toy(2, seed=s).chain(3), queues, no_batch, 1.0, watch=node_watch([markers], 0, s)) for s in (0, 1)
    )
    dy = other.forward(0, streams(0)).cos()
    pair = one.overlap(1, streams(1), other, 0, dy)
    pair.output(), pair.input_gradient(), pair.finish()
    other.backward_weight(0)
    assert domain.open == [] and sorted(domain.opened) == sorted(domain.closed)
    if queues is AS_CUDA:
        assert domain.opened == domain.closed, "one node after the other, none inside another"


def test_instructions_hold_their_nodes():
    domain = Domain()
    markers = Markers([(0, 0)], domain)
    program = compile(build("1f1b", 1, 2), recompute=True, high=True)
    innermost = []
    watch = node_watch([markers], 0, 0)

    def watching(*of):
        innermost.append((of[0], of[1], domain.innermost()))
        return watch(*of)

    batch = streams(1), streams(2)
    stage = ModelStage(Toy(1).chain(None, True, True), AS_CUDA, lambda m: batch, 1.0, recompute=True, watch=watching)
    mailbox = Mailbox({}, (TOKENS, 1, STREAMS * CHANNELS), torch.float32)
    execute(program.instructions[0], program.schedule.placement, {(0, 0): stage}, mailbox, [markers], queues=AS_CUDA)
    assert domain.open == []
    runs = [message for message, _, _ in domain.opened if message.startswith("Run ")]
    assert runs == [f"Run {i.action}" for i in program.instructions[0] if isinstance(i, Run)]
    assert {(kind, m) for kind, m, _ in innermost} == {(kind, m) for kind in "FRB" for m in (0, 1)}
    for kind, m, name in innermost:
        assert name in (f"Run 0{kind}{m}", *(["Run 0I0", "Run 0I1"] if kind == "B" else [])), (kind, m, name)


def test_categories_and_colours_are_those_of_queues_and_drawings():
    program = compile(build("dualpipe", 4, 8), recompute=True, high=True)
    timeline = simulated(program, Costs(f=4, b=5, w=3, r=1, link=1))
    rank = 1
    held = program.schedule.placement.held(rank)
    domain = Domain()
    markers = Markers(held, domain)
    drawn = {s[5:9]: timeline.color(s) for s in timeline.spans if s.rank == rank and s.queue == "compute"}
    drawn_messages = {s.kind: timeline.color(s) for s in timeline.spans if s.queue in ("send", "recv")}
    for instruction in program.instructions[rank]:
        markers.begin(instruction)
        markers.end(instruction)
        name, color, category = domain.closed[-1]
        if isinstance(instruction, Run):
            a = instruction.action
            expected = drawn[a.kind, a.lane, a.stage, a.microbatch], "compute"
        elif isinstance(instruction, Wait):
            expected = timeline.color(Span(rank, "wait", 0, 1, "", *instruction.message[:4])), instruction.queue
        else:
            expected = drawn_messages[instruction.message.kind], {Post: "receive", Send: "send"}[type(instruction)]
        assert (f"#{color:06x}", category) == expected, name
    for lane, stage in held:
        for kind, node, queue in (("F", "0.mlp", "compute"), ("B", "0.mlp_post", "high"), ("B", "0.combine", "communication")):
            markers.node(Node(kind, lane, stage, 2, node, queue))()
            line = "high" if queue == "high" else "node"
            span = Span(rank, line, 0, 1, f"{kind}2 {node}", kind, lane, stage, 2)
            name, color, category = domain.closed[-1]
            assert (f"#{color:06x}", category) == (timeline.color(span), queue), name
    assert {category for _, _, category in domain.closed} == {"compute", "high", "communication", "receive", "send"}


def test_torch_profiler_sees_them_too_and_nvtx_is_content_without_a_profiler():
    instructions = compile(build("1f1b", 1, 2)).instructions[0]
    markers = Markers([(0, 0)])
    with torch.profiler.profile() as profiler:
        for instruction in instructions:
            markers.begin(instruction)
            torch.zeros(1)
            markers.end(instruction)
    names = [event.name for event in profiler.events() if event.name.startswith("Run ")]
    assert names == [f"Run {instruction.action}" for instruction in instructions]


def test_a_package_without_ranges_of_domains_is_none(monkeypatch):
    assert available()
    monkeypatch.setitem(sys.modules, "nvtx", SimpleNamespace(get_domain=lambda name: object()))  # before 0.2.12
    assert not available()
    monkeypatch.setitem(sys.modules, "nvtx", None)
    assert not available()
