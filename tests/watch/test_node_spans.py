"""Recorded nodes, and a simulation that knows when the messages of an interleaved pair leave: over processes whose nodes sleep."""

import contextlib
import os
import time

import preloaded  # noqa: F401
import pytest
import torch
import torch.distributed as dist
from browser import browse
from processes import run_ranks

from pipehc.comm.groups import edge_groups
from pipehc.comm.messages import Mailbox
from pipehc.comm.queues import make_queues
from pipehc.model.stage import ModelStage
from pipehc.model.wgrad import Accumulate, linear
from pipehc.recompute import Chain, Exchange, Piece
from pipehc.schedules import Costs, build, compile, simulate
from pipehc.schedules.__main__ import main
from pipehc.schedules.draw import recorded
from pipehc.schedules.execute import execute
from pipehc.schedules.recording import Recording, measured_costs
from pipehc.watch.trace import Recorder, node_watch, save_step

pytestmark = pytest.mark.timed

RANKS, MICROBATCHES, STEPS = 4, 10, 6
ATTENTION, MLP, MOVE = 0.008, 0.010, 0.002  # a forward, and each half of a backward; an all-to-all


class Slept(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, seconds):
        ctx.seconds = seconds
        time.sleep(seconds)
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        time.sleep(ctx.seconds)
        return dy.clone(), None


def chain(first, last):
    """One block with experts, of nodes that sleep; its stage message is one number."""

    def work(seconds):
        weight = torch.ones(1, 1, requires_grad=True)

        def run(x):
            return (linear(Slept.apply(x, seconds), weight, Accumulate(lambda gradient: time.sleep(seconds))),)

        return run

    def exchange(name, inputs, outputs):
        def start(values):
            there = time.monotonic() + MOVE
            values = [v.clone() for v in values]

            def end():
                time.sleep(max(0.0, there - time.monotonic()))
                return tuple(values)

            return end

        return Exchange(
            name, lambda *values: start(values), inputs, outputs, f"0.{name}", queue="communication",
            run_backward=lambda gradients: start(gradients),
        )  # fmt: skip

    pieces = [
        Piece("attention", work(ATTENTION), ("x0",), ("a",), "0.attention"),
        exchange("dispatch", ("a",), ("b",)),
        Piece("mlp", work(MLP), ("b",), ("c",), "0.mlp"),
        exchange("combine", ("c",), ("d",)),
        Piece("post", lambda d: (d.clone(),), ("d",), ("x1",), "0.mlp_post", queue="high"),
    ]
    if first:
        pieces.insert(0, Piece("embedding", lambda tokens: (tokens.clone(),), ("tokens",), ("x0",), "0.attention"))
    if last:
        pieces.append(Piece("loss", lambda x, labels: ((x * labels).sum(),), ("x1", "labels"), ("loss",), "0.mlp_post"))
    return Chain([pieces], "loss" if last else "x1")


def record(rank, folder, overlap):
    with contextlib.suppress(PermissionError):  # before other work on the machine: sleeping stages then keep their times
        for thread in os.listdir("/proc/self/task"):
            os.sched_setscheduler(int(thread), os.SCHED_FIFO, os.sched_param(1))
    program = compile(build("dualpipe", RANKS, MICROBATCHES), high=True)
    placement, queues = program.schedule.placement, make_queues(torch.device("cpu"))
    mailbox = Mailbox(edge_groups([list(range(RANKS))], program.edges()), (1, 1), torch.float32, timeout_s=30)
    for step in range(1 + STEPS):
        recorder = Recorder(rank, torch.device("cpu"), {})
        stages = {
            (lane, stage): ModelStage(
                chain(stage == 0, stage == placement.stages - 1), queues, lambda m: (torch.ones(1, 1), torch.ones(1, 1)), 1.0,
                watch=node_watch([recorder], lane, stage),
            )
            for lane, stage in placement.held(rank)
        }  # fmt: skip
        dist.barrier()
        with recorder.attached(mailbox):
            execute(program.instructions[rank], placement, stages, mailbox, [recorder], overlap, queues)
        save_step(recorder, program, step, folder, (0, rank), recompute=False)


@pytest.fixture(scope="module")
def all_recordings(tmp_path_factory):
    found = {}
    for overlap in (False, True):
        folder = tmp_path_factory.mktemp("trace")
        run_ranks(record, RANKS, folder, overlap)
        found[overlap] = [Recording.load(path) for path in sorted(folder.iterdir())[1:]]  # the first one warms up
    return found


def measured(recording):
    return max(span.end for span in recording.spans)


@pytest.fixture(scope="module")
def recordings(all_recordings):
    """Other work on the machine can only make a step longer: the shortest."""
    return {overlap: min(steps, key=measured) for overlap, steps in all_recordings.items()}


@pytest.mark.parametrize("overlap", [False, True])
def test_every_node_of_every_action_is_there_once(recordings, overlap):
    spans = recordings[overlap].spans
    nodes = ["0.attention", "0.dispatch", "0.mlp", "0.combine", "0.mlp_post"]
    for rank in range(RANKS):
        own = [s for s in spans if s.rank == rank and s.queue in ("node", "high")]
        for lane, stage in recordings[overlap].schedule.placement.held(rank):
            for m in recordings[overlap].schedule.lane_microbatches(lane):
                for kind in "FB":
                    found = sorted(s.what.split()[1] for s in own if s[5:9] == (kind, lane, stage, m))
                    # On the last stage the loss is a piece of mlp_post too, but on another queue.
                    extra = ["0.mlp_post"] if stage == RANKS - 1 else []
                    assert found == sorted(nodes + extra), (kind, lane, stage, m)
        for span in own:
            at_least = {"0.attention": ATTENTION, "0.mlp": MLP, "0.dispatch": MOVE, "0.combine": MOVE}
            if span.kind in "FB":
                assert span.end - span.start >= 1e3 * at_least.get(span.what.split()[1], 0.0) - 0.5
        high = [s for s in own if s.queue == "high"]
        assert len(high) == 2 * MICROBATCHES and all(s.what.endswith("mlp_post") for s in high)


def test_all_to_alls_run_beside_the_other_half_only_where_pairs_are_interleaved(recordings):
    """An all-to-all of a pair lasts as long as what its partner computes meanwhile; alone it is waited for at once."""

    def longest(recording):
        pairs = [s for s in recording.spans if s.pair is not None]
        moves = [s for s in recording.spans if s.queue == "node" and s.what.split()[1] in ("0.dispatch", "0.combine")]
        return max(
            s.end - s.start for s in moves
            if any(p.rank == s.rank and p.start <= s.start and s.end <= p.end + 1e3 * MLP for p in pairs)
        )  # fmt: skip

    assert longest(recordings[True]) >= 1e3 * ATTENTION > longest(recordings[False])


def test_a_real_recording_comes_out_of_every_drawing(recordings, tmp_path):
    pytest.importorskip("matplotlib")
    assert 1 <= recordings[True].step <= STEPS and recordings[True].device == "cpu"
    recordings[True].save(tmp_path / "x.json")
    files = {kind: tmp_path / f"x.{kind}" for kind in ("svg", "png", "html", "trace")}
    assert main(["show", str(tmp_path / "x.json"), *(str(a) for kind, path in files.items() for a in (f"--{kind}", path))]) == 0
    spans = sum(span.end > span.start for span in recordings[True].spans)
    assert files["svg"].read_text().count("<title>") > spans
    assert files["trace"].read_text().count('"ph":"X"') > spans
    assert files["png"].read_bytes()[1:4] == b"PNG"
    probe = """
        const missing = panels.filter(p => +p.canvas.dataset.drawn < 50).length, names = panels[1].tracks.map(t => t.name);
        document.body.dataset.probe = missing || !names.includes("nodes") || !names.includes("high") ? "blank" : "passed";
    """
    assert browse(files["html"].read_text(), probe, tmp_path) == "passed"


def test_nothing_is_counted_twice(recordings):
    """Nodes are in the drawing, and in no sum."""
    spans = recordings[True].spans
    without = [s for s in spans if s.queue not in ("node", "high")]
    timeline = recorded(spans, "with")
    assert timeline.summaries == recorded(without, "without").summaries
    assert [row.name for row in timeline.rows if row.rank == 0] == ["compute", "nodes", "high", "comm"]


@pytest.mark.parametrize("overlap", [False, True])
def test_prediction_and_measurement_agree(all_recordings, recordings, overlap):
    """In one of the steps at least: a delay of one rank, by other work on the machine, is in no cost."""
    costs = measured_costs(recordings[overlap])
    assert (costs.pair_leave is not None) == overlap
    ratios = [measured(r) / simulate(r.program(), measured_costs(r)).makespan for r in all_recordings[overlap]]
    assert len(ratios) == STEPS and min(abs(ratio - 1) for ratio in ratios) < 0.04, ratios
    if overlap:
        # Attention F, mlp B, mlp F and mlp W come before the output leaves, attention B before the gradient, attention W after.
        output, whole = ATTENTION + 3 * MLP, 3 * ATTENTION + 3 * MLP
        assert costs.pair_leave[0] == pytest.approx(output / whole, abs=0.03)
        assert costs.pair_leave[1] == pytest.approx((output + ATTENTION) / whole, abs=0.03)


def test_pairs_leave_messages_when_the_costs_say():
    """Two ranks, one pair each: what waits for the output of a pair gets it at its share of the pair's time."""
    program = compile(build("dualpipe", 4, 8))
    whole = 4.0 + 5.0 + 3.0
    for output, gradient in ((0.5, 0.75), (1.0, 1.0), (0.1, 0.2)):
        result = simulate(program, Costs(f=4, b=5, w=3, pair_leave=(output, gradient)))
        ends = {(s.rank, s.pair, s.kind): s for s in result.spans if s.queue == "compute" and s.pair is not None}
        sent = {(s.rank, s.kind, s.stage, s.microbatch): s.start for s in result.spans if s.queue == "send"}
        assert ends
        for (rank, pair, kind), span in ends.items():
            start = ends[rank, pair, "F"].start
            if kind == "F":
                assert span.end - start == pytest.approx(max(4.0, output * whole))
                if ("activation", span.stage + 1) in {key[1:3] for key in sent if key[0] == rank}:
                    assert sent[rank, "activation", span.stage + 1, span.microbatch] >= span.end - 1e-9
            if kind == "I":
                assert span.end - start == pytest.approx(max(5.0, output * whole, gradient * whole, 4.0))
            if kind in "WB":
                assert span.end - start == pytest.approx(whole)
    with pytest.raises(ValueError, match=r"costs.pair_leave = \(0.8, 0.5\)"):
        Costs(pair_leave=(0.8, 0.5))
