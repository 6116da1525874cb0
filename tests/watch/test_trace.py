"""Recorded steps: spans against what is known to have happened, over real processes with stages that sleep."""

import contextlib
import os
import time

import preloaded  # noqa: F401
import pytest
import torch
import torch.distributed as dist
from processes import run_ranks
from tiny_model import tiny_config

from pipehc.comm.groups import edge_groups
from pipehc.comm.messages import Mailbox
from pipehc.data.batches import Sampler
from pipehc.schedules import Costs, Span, build, compile, simulate
from pipehc.schedules.__main__ import main
from pipehc.schedules.draw import recorded
from pipehc.schedules.execute import execute
from pipehc.schedules.placement import linear
from pipehc.schedules.recording import Recording, link_spans, measured_costs, merge
from pipehc.watch.trace import Recorder, save_step

pytestmark = pytest.mark.timed

F, I, W = 0.03, 0.05, 0.02


class Sleeping:
    def __init__(self, first, last):
        self.first, self.last = first, last

    def forward(self, microbatch, x):
        time.sleep(F)
        return None if self.last else torch.zeros(4)

    def backward_input(self, microbatch, grad):
        time.sleep(I)
        return None if self.first else torch.zeros(4)

    def backward_weight(self, microbatch):
        time.sleep(W)

    def recompute(self, microbatch):
        time.sleep(W)


def record(rank, folder, name, recompute, ranks=2, microbatches=4, transport="device"):
    program = compile(build(name, ranks, microbatches), recompute=recompute)
    placement = program.schedule.placement
    last = placement.stages - 1
    stages = {key: Sleeping(key[1] == 0, key[1] == last) for key in placement.held(rank)}
    mailbox = Mailbox(edge_groups([list(range(ranks))], program.edges()), (4,), torch.float32, timeout_s=30, transport=transport)
    recorder = Recorder(rank, torch.device("cpu"), {})
    dist.barrier()
    with recorder.attached(mailbox):
        execute(program.instructions[rank], placement, stages, mailbox, [recorder])
    save_step(recorder, program, 7, folder, (0, rank), recompute=recompute)
    assert mailbox.tracker is None
    execute(program.instructions[rank], placement, stages, mailbox)  # and without it, as before


@pytest.mark.parametrize(("name", "recompute", "transport"), [("1f1b", False, "device"), ("dualpipe", True, "host")])
def test_records_every_action_and_message_where_it_was(tmp_path, name, recompute, transport):
    run_ranks(record, 2, tmp_path / "trace", name, recompute, 2, 4, transport)
    recording = Recording.load(tmp_path / "trace" / "step-000007.json")
    assert "step 7" in recording.title
    assert (recording.step, recording.pipeline, recording.device) == (7, 0, "cpu")
    program = compile(build(name, 2, 4), recompute=recompute)
    assert recording.program().instructions == program.instructions
    predicted = simulate(program, Costs(f=1, b=1, w=1, r=1))

    for queue in ("compute", "send", "recv"):
        expected = sorted((s.rank, s.what) for s in predicted.spans if s.queue == queue)
        assert sorted((s.rank, s.what) for s in recording.spans if s.queue == queue) == expected
    least = {"F": 1e3 * F, "I": 1e3 * I, "W": 1e3 * W, "R": 1e3 * W, "B": 1e3 * (I + W)}
    for span in recording.spans:
        assert 0 <= span.start <= span.end
        if span.queue == "compute":
            assert span.end - span.start >= least[span.kind] - 0.5
    assert min(span.start for span in recording.spans) == 0

    # Nothing starts before what it needs is there, and a message does not move before it is computed.
    ends = {(s.kind, s.stage, s.microbatch): s.end for s in recording.spans if s.queue == "compute"}
    starts = {(s.kind, s.stage, s.microbatch): s.start for s in recording.spans if s.queue == "compute"}
    for span in recording.spans:
        if span.queue == "recv" and span.kind == "activation":
            assert ends["F", span.stage - 1, span.microbatch] <= span.start + 1e-3
            assert span.end <= starts["F", span.stage, span.microbatch] + 1e-3
    # The last rank waits for the first forward, though next to nothing is on the link meanwhile.
    if name == "1f1b":
        wait = next(s for s in recording.spans if s.rank == 1 and s.queue == "wait")
        assert wait.end >= ends["F", 0, 0]
    timeline = recorded(recording.spans, recording.title)
    assert timeline.summaries[1].idle > timeline.summaries[1].exposed

    costs = measured_costs(recording)
    assert (costs.f, costs.b, costs.w) >= (1e3 * F - 0.5, 1e3 * I - 0.5, 1e3 * W - 0.5)
    assert simulate(recording.program(), costs).makespan == pytest.approx(timeline.end, rel=0.25)


def test_the_command_line_shows_prediction_above_measurement(tmp_path, capsys):
    run_ranks(record, 2, tmp_path, "1f1b", False)
    file = str(tmp_path / "step-000007.json")
    assert main(["show", file]) == 0
    shown = capsys.readouterr().out
    assert 0 <= shown.index("predicted: 1f1b") < shown.index("measured: 1f1b: 2 ranks, 4 micro-batches, step 7")
    assert main(["show", file, "--html", str(tmp_path / "x.html")]) == 0
    assert "measured: 1f1b" in (tmp_path / "x.html").read_text()
    assert main(["show", file, "--compare", "zbv"]) == 2


class Split:
    def __len__(self):
        return 9

    def __getitem__(self, index):
        return torch.randint(0, 256, (12,), generator=torch.Generator().manual_seed(index))


def test_the_trainer_records_the_steps_asked_for_of_every_pipeline(tmp_path):
    from pipehc.trainer import Trainer  # imports Megatron: here, so that the processes need not

    def train(rank):
        trainer = Trainer(tiny_config("parallel.pp=2", "trace.steps=[2, 2]", "train.micro_batch=1"))
        for step in range(1, 4):
            with trainer.recorded(step, tmp_path):
                trainer.step(step, Split(), Sampler(9, seed=1))
        assert trainer.observers == []

    run_ranks(train, 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000002-pipeline1.json", "step-000002.json"]
    for path in tmp_path.iterdir():
        recording = Recording.load(path)
        assert recording.schedule.microbatches == 4
        assert recording.step == 2 and recording.pipeline == ("pipeline1" in path.name)
        assert {span.rank for span in recording.spans} == {0, 1}
        done = sorted((s.stage, s.kind, s.microbatch) for s in recording.spans if s.queue == "compute" and s.kind in "FW")
        assert [x for x in done if x[1] == "F"] == [(stage, "F", m) for stage in (0, 1) for m in range(4)]
        nodes = {(s.kind, s.microbatch, s.what.split()[1]) for s in recording.spans if s.queue in ("node", "high")}
        names = [f"{block}.{node}" for block in range(4) for node in ("attention", "mlp", "mlp_post")]
        assert {node for node in nodes if node[0] != "R"} == {(kind, m, name) for kind in "FB" for m in range(4) for name in names}


def message(queue, rank, start, end, microbatch, stage=1):
    return Span(rank, queue, start, end, f"activation {stage}.{microbatch}", "activation", 0, stage, microbatch)


def test_bytes_move_once_both_sides_are_there_and_the_link_is_free():
    sent = [message("send", 0, 10, 21, 0), message("send", 0, 12, 31, 1), message("send", 0, 50, 61, 2)]
    received = [message("recv", 1, 0, 20, 0), message("recv", 1, 0, 30, 1), message("recv", 1, 55, 60, 2)]
    spans = {(s.queue, s.microbatch): (s.start, s.end) for s in link_spans(sent, received, linear(2))}
    assert spans == {
        ("send", 0): (10, 21), ("recv", 0): (10, 20),  # posted long before
        ("send", 1): (20, 31), ("recv", 1): (20, 30),  # behind the first
        ("send", 2): (55, 61), ("recv", 2): (55, 60),  # posted too late
    }  # fmt: skip


def test_costs_of_stages_that_differ():
    spans = []
    for stage, factor in enumerate((1, 3)):
        for microbatch in range(2):
            for kind, length in (("F", 10), ("I", 20), ("W", 30)):
                spans.append(Span(stage, "compute", 0, factor * length, kind, kind, 0, stage, microbatch))
    spans += [message("recv", 1, 0, 4, 0), message("recv", 1, 0, 6, 1)]
    costs = measured_costs(Recording("", build("1f1b", 2, 2), False, tuple(spans)))
    assert (costs.f, costs.b, costs.w, costs.link) == (20, 40, 60, 5)
    assert costs.weights == (0.5, 1.5)


def record_ahead_of_others(rank, folder, *what):
    """Takes precedence over other work on the machine, if that is allowed: sleeping stages then keep their times."""
    with contextlib.suppress(PermissionError):
        for thread in os.listdir("/proc/self/task"):
            os.sched_setscheduler(int(thread), os.SCHED_FIFO, os.sched_param(1))
    record(rank, folder, *what)


@pytest.mark.parametrize(("name", "ranks", "microbatches", "hideable"), [("1f1b", 2, 4, 4), ("1f1b", 4, 8, 24), ("zbv", 4, 8, 12)])
def test_recomputation_hides_where_the_simulator_says(tmp_path, name, ranks, microbatches, hideable):
    """While the last rank computes, those before it recompute. hideable: how many R, at least."""
    run_ranks(record_ahead_of_others, ranks, tmp_path, name, True, ranks, microbatches)
    recording = Recording.load(tmp_path / "step-000007.json")
    share = recording.schedule.placement.share
    costs = Costs(f=1e3 * F / share, b=1e3 * I / share, w=1e3 * W / share, r=1e3 * W / share)
    possible = sum(simulate(recording.program(), costs).hidden_recompute)
    hidden = sum(summary.hidden for summary in recorded(recording.spans, "").summaries)
    assert possible >= hideable * 1e3 * W - 1e-6
    assert hidden >= 0.9 * possible


@pytest.mark.parametrize("name", ["1f1b", "zbv", "dualpipe", "dualpipev"])
def test_simulation_and_recording_count_alike(name):
    """The spans of a simulation, taken as recorded ones, give what the simulator says of itself."""
    predicted = simulate(compile(build(name, 4, 8), recompute=True), Costs(f=4, b=5, w=3, r=2, link=1.5))
    summaries = recorded(predicted.spans, name).summaries
    assert [s.hidden for s in summaries] == pytest.approx(predicted.hidden_recompute)
    assert [s.busy for s in summaries] == pytest.approx(predicted.busy)
    assert 0 < sum(predicted.hidden_recompute) < 4 * 8 * 2


def test_a_step_starts_at_zero():
    spans = merge([[Span(0, "compute", 1005, 1010, "0F0", "F", 0, 0, 0)], [Span(1, "wait", 1003, 1012, "wait")]], linear(2))
    assert [(s.rank, s.start, s.end) for s in spans] == [(0, 2, 7), (1, 0, 9)]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 99, "span": []}'])
def test_other_files_are_refused_by_name(tmp_path, text):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"other\.json: is no recorded step"):
        Recording.load(path)
