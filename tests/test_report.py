"""The report on small traces made by hand, whose figures can be read off."""

import gzip
import json

import pytest
from gpu_traces import EXPECTED, LOSSES, figures, losses, profile

from pipehc import report
from pipehc.schedules import Action, Placement, Schedule, Span
from pipehc.schedules.__main__ import main as show
from pipehc.schedules.recording import Recording
from pipehc.watch.profiles.intervals import common, length, minus, union
from pipehc.watch.profiles.model import Hints


def test_intervals():
    a = union([(5, 9), (0, 2), (2, 3), (6, 7), (4, 4)])
    assert a == [(0, 3), (5, 9)] and length(a) == 7
    assert minus(a, [(1, 6), (8, 20)]) == [(0, 1), (6, 8)]
    assert minus(a, []) == a and minus([], a) == [] and minus(a, a) == []
    assert minus([(0, 10)], [(2, 3), (5, 6)]) == [(0, 2), (3, 5), (6, 10)]
    assert common(a, [(1, 6), (8, 20)]) == [(1, 3), (5, 6), (8, 9)]


def span(rank, queue, start, end, kind, stage=0, microbatch=0):
    return Span(rank, queue, float(start), float(end), f"{stage}{kind}{microbatch}", kind, 0, stage, microbatch)


def test_a_step_that_pipehc_recorded(tmp_path):
    """Two stages, one micro-batch. Rank 0: F, a message of 6 ms, R while the gradient is on its way, wait, I with a high piece."""
    rows = ((Action("F", 0, 0), Action("I", 0, 0), Action("W", 0, 0)), (Action("F", 1, 0), Action("I", 1, 0), Action("W", 1, 0)))
    spans = (
        span(0, "compute", 0, 10, "F"),
        span(0, "send", 10, 16, "activation", 1),
        span(0, "compute", 30, 50, "R"),
        span(0, "recv", 46, 52, "gradient"),
        span(0, "wait", 50, 53, "gradient"),
        span(0, "high", 55, 57, "I"),
        span(0, "compute", 57, 70, "I"),
        span(0, "compute", 70, 75, "W"),
        span(1, "wait", 0, 16, "activation", 1),
        span(1, "recv", 10, 16, "activation", 1),
        span(1, "compute", 16, 30, "F", 1),
        span(1, "compute", 30, 46, "I", 1),
        span(1, "send", 46, 52, "gradient"),
        span(1, "compute", 46, 60, "W", 1),
    )
    path = tmp_path / "step.json"
    Recording("one", Schedule("1f1b", Placement(((0, 1),)), 1, rows), True, spans, device="cuda").save(path)
    first, second = report.read(path)
    assert figures(first) == {
        "total": 75, "compute": 50, "bubble": 23, "communication": 12, "exposed": 2,
        "recompute": 20, "hidden": 20, "high_delay": 3,
    }  # fmt: skip
    assert figures(second) == {
        "total": 75, "compute": 44, "bubble": 25, "communication": 12, "exposed": 6,
        "recompute": 0, "hidden": 0, "high_delay": 0,
    }  # fmt: skip
    assert losses(first) == {
        "gradients from rank 1 were still on the link": 2,
        "rank 1 had not sent the gradients that were needed": 1,  # the wait ended 1 ms after the message did
        "between actions: the executor itself, and sends": 22,
        "high-priority work was ready, but stood behind other work": 3,
    }
    assert [loss.ms for loss in second.largest()] == [15, 10, 6]
    assert [loss.why for loss in second.largest()] == [
        "its own work was done, other ranks were still computing",
        "rank 0 had not sent the activations that were needed",
        "activations from rank 0 were still on the link",
    ]


def step_with_high(tmp_path, device, step=6, pipeline=0):
    """One rank's forward of 10 ms; its last piece comes 4 ms after the rest, behind a W."""
    rows = ((Action("F", 0, 0), Action("I", 0, 0), Action("W", 0, 0)),)
    spans = (
        span(0, "compute", 0, 10, "F"),
        span(0, "compute", 10, 14, "W"),
        span(0, "high", 14, 16, "F"),
        span(0, "compute", 16, 20, "I"),
    )
    path = tmp_path / f"step-{step:06}-{device}-{pipeline}.json"
    Recording("one", Schedule("1f1b", Placement(((0,),)), 1, rows), False, spans, step, pipeline, device).save(path)
    return path


def test_on_a_gpu_high_priority_work_that_stood_behind_other_work_is_a_loss(tmp_path):
    (rank,) = report.read(step_with_high(tmp_path, "cuda"))
    assert rank.high_delay == 4 and rank.notes == ()
    assert losses(rank) == {"high-priority work was ready, but stood behind other work": 4}


@pytest.mark.parametrize("device", ["cpu", None])
def test_on_a_cpu_it_is_none_and_that_is_said(tmp_path, capsys, device):
    """There one thread does everything. Files of before the device was noted are taken for a CPU's, and that is said too."""
    path = step_with_high(tmp_path, device)
    (rank,) = report.read(path)
    assert rank.high_delay is None and losses(rank) == {}
    assert rank.compute == 20
    assert report.main([str(path)]) == 0
    out = capsys.readouterr().out
    assert "stood behind" not in out and "note: step 6: recorded on a CPU" in out and "one thread does everything" in out
    assert ("assumed" in out) == (device is None)
    assert report.main([str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["high_delay"] is None


def test_every_row_names_its_step_and_pipeline(tmp_path, capsys):
    paths = [str(step_with_high(tmp_path, "cpu", *which)) for which in ((6, 0), (6, 1), (7, 0))]
    assert report.main([*paths, "--json"]) == 0
    names = [rank["name"] for rank in json.loads(capsys.readouterr().out)]
    assert names == ["step 6 rank 0", "step 6 pipeline 1 rank 0", "step 7 rank 0"]
    assert report.main([*paths, "--step", "7"]) == 0
    out = capsys.readouterr().out
    assert "step 7 rank 0 lost" in out and "step 6" not in out


def test_a_recording_of_before_steps_were_noted_is_named_after_its_file(tmp_path):
    path = step_with_high(tmp_path, "cpu")
    data = json.loads(path.read_text())
    for key in ("step", "device", "pipeline"):
        del data[key]
    path = tmp_path / "step-000123.json"
    path.write_text(json.dumps(data))
    (rank,) = report.read(path)
    assert rank.name == "step-000123 rank 0" and rank.step is None and rank.high_delay is None


ODD_SPANS = {
    "start": ("x", None, float("nan"), -1, True, [1]),
    "end": (-1, float("inf"), "x", None),
    "rank": (1, -1, "x", None, 0.5, True),
    "queue": ("x", None, 3, []),
    "what": (None, 3),
    "kind": (None, 3, {}),
    "lane": (1, -1, None),
    "stage": (7, -2, "x"),
    "pair": ("x", 0.5),
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in ODD_SPANS.items() for value in values])
def test_a_recording_with_a_span_that_cannot_be_is_refused(tmp_path, capsys, field, value):
    path = step_with_high(tmp_path, "cpu")
    data = json.loads(path.read_text())
    data["spans"][0][data["span"].index(field)] = value
    path.write_text(json.dumps(data))
    for command in (report.main, lambda arguments: show(["show", *arguments])):
        assert command([str(path)]) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.count("\n") == 1 and "is no recorded step of this version" in captured.err


@pytest.mark.parametrize(
    ("key", "value"),
    [("step", "x"), ("device", 3), ("pipeline", None), ("title", None), ("rows", 3), ("rows", [[1]]), ("rows", []), ("spans", 3),
     ("spans", [3]), ("spans", [[1, 2]]), ("schedule", None), ("schedule", {"name": "x"}), ("format", 9), ("recompute", 3),
     ("schedule", {"name": "x", "microbatches": "many", "forward_only": False})],
)  # fmt: skip
def test_a_recording_with_a_key_that_cannot_be_is_refused(tmp_path, capsys, key, value):
    path = step_with_high(tmp_path, "cpu")
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    for command in (report.main, lambda arguments: show(["show", *arguments])):
        assert command([str(path)]) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.count("\n") == 1 and "is no recorded step" in captured.err


def test_recomputation_that_hides_nothing_is_a_loss(tmp_path):
    rows = ((Action("F", 0, 0), Action("B", 0, 0)), (Action("F", 1, 0), Action("B", 1, 0)))
    spans = (
        span(0, "recv", 2, 4, "gradient"),
        span(0, "compute", 0, 10, "R"),
        span(0, "compute", 10, 20, "B"),
        span(1, "compute", 0, 20, "B", 1),
    )
    path = tmp_path / "step.json"
    Recording("one", Schedule("1f1b", Placement(((0, 1),)), 1, rows), True, spans).save(path)
    rank = report.read(path)[0]
    assert (rank.recompute, rank.hidden) == (10, 4)
    assert losses(rank) == {"recomputation ran though nothing had to be waited for": 6}


@pytest.mark.parametrize("suffix", [".json", ".json.gz"])
def test_a_trace_of_torch_profiler(tmp_path, suffix):
    path = tmp_path / f"trace{suffix}"
    with (gzip.open if suffix.endswith("gz") else open)(path, "wt") as file:
        json.dump(profile(), file)
    (rank,) = report.read(path)
    assert rank.name == "rank 3"
    assert figures(rank) == EXPECTED
    assert losses(rank) == pytest.approx(LOSSES)


def test_streams_named_by_hand(tmp_path):
    data = profile()
    for event in data["traceEvents"]:
        event.get("args", {}).pop("priority", None)
    path = tmp_path / "trace.json"
    path.write_text(json.dumps(data))
    assert report.read(path)[0].high_delay == 0
    assert report.read(path, Hints(frozenset({20})))[0].high_delay == pytest.approx(13)


def test_prints_the_three_largest_losses_in_words(tmp_path, capsys):
    path = tmp_path / "trace.json"
    path.write_text(json.dumps(profile()))
    assert report.main([str(path)]) == 0
    text = capsys.readouterr().out
    assert "60.0" in text and "42.0 (70.0 %)" in text and "4.0 (40 %)" in text
    line = next(line for line in text.splitlines() if "lost" in line)
    assert line.startswith("rank 3 lost 13.0 ms (21.7 %): high-priority work was ready")
    assert line.count(" ms (") == 3 and "gemm2 late" in line
    assert report.main([str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["bubble"] == pytest.approx(12)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.json", b"not json", "neither JSON nor SQLite"),
        ("a.json", b"\xff\xfe\x00", "neither JSON nor SQLite"),
        ("a.json", b"{}", "neither a Chrome trace"),
        ("a.json", b'{"traceEvents": []}', "no GPU kernels"),
        ("a.json", None, "No such file"),
        ("a.sqlite", b"not a database at all, by no means", "no export of Nsight Systems"),
    ],
)
def test_refuses_other_files_in_a_sentence(tmp_path, capsys, name, content, said):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert report.main([str(tmp_path / name)]) == 2
    assert said in capsys.readouterr().err


def test_a_pattern_of_the_users_names_communication(tmp_path, capsys):
    path = tmp_path / "trace.json"
    path.write_text(json.dumps(profile()))
    assert report.main([str(path), "--json", "--communication", "^reb.*d$"]) == 0
    (rank,) = json.loads(capsys.readouterr().out)
    assert {m["name"] for m in rank["messages"]} == {"ncclDevKernel_SendRecv", "deep_ep::internode::dispatch", "rebuild"}
    assert rank["compute"] == pytest.approx(32)
    assert report.main([str(path)]) == 0
    assert (
        "counted as communication: ncclDevKernel_SendRecv 12.0 ms (1), deep_ep::internode::dispatch 4.0 ms (1)"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--communication", ""], "error: --communication '': matches every name"),
        (["--communication", "("], "error: --communication (: must be a regular expression: missing )"),
        (["--communication", "*"], "error: --communication *: must be a regular expression"),
        (["--communication", "a{99999999999}"], "error: --communication a{99999999999}: must be a regular expression"),
        (["--high-streams", "7,x"], "error: --high-streams 7,x: must be numbers of streams"),
    ],
)
def test_flags_that_cannot_be_are_named(tmp_path, capsys, arguments, said):
    path = tmp_path / "trace.json"
    path.write_text(json.dumps(profile()))
    assert report.main([str(path), *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith(said)
