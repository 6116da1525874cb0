"""The report on small traces made by hand, whose figures can be read off."""

import gzip
import json
import sqlite3

import pytest

from pipehc import report
from pipehc.schedules import Action, Placement, Schedule, Span
from pipehc.schedules.recording import Recording
from pipehc.watch.profiles.intervals import common, length, minus, union
from pipehc.watch.profiles.model import Hints


def figures(rank):
    names = ("total", "compute", "bubble", "communication", "exposed", "recompute", "hidden", "high_delay")
    return {name: pytest.approx(getattr(rank, name)) for name in names}


def losses(rank):
    return {loss.why: loss.ms for loss in rank.losses if loss.ms}


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


# Kernels of one GPU, in ms: (start, end, name, stream, launched). Stream 20 has high priority.
KERNELS = [
    (0, 10, "void gemm<float>(int)", 7, 0),
    (4, 16, "ncclDevKernel_SendRecv(ncclDevComm*)", 13, 1),
    (20, 30, "rebuild", 7, 2),  # idle from 16 to 20, though launched long before: waited for an event
    (24, 28, "void deep_ep::internode::dispatch<1>()", 13, 3),
    (30, 40, "attention", 7, 4),
    (40, 42, "post_res", 20, 27),  # ready at 27, but 13 ms behind the others
    (50, 60, "gemm2", 7, 49),  # idle from 42 to 50: the host was late
]
EXPECTED = {
    "total": 60, "compute": 42, "bubble": 12, "communication": 16, "exposed": 6, "recompute": 10, "hidden": 4, "high_delay": 13,
}  # fmt: skip
LOSSES = {
    "ncclDevKernel_SendRecv ran with nothing to compute beside it": 6,
    "the device was idle: rebuild waited for an event": 4,
    "the device was idle: the host launched gemm2 late": 8,
    "recomputation ran with no message under way": 6,
    "high-priority work was ready, but stood behind other work": 13,
}


def profile():
    events = [{"ph": "M", "name": "process_name"}, {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": 0, "dur": 5, "tid": 1}]
    for number, (start, end, name, stream, launched) in enumerate(KERNELS):
        arguments = {"correlation": number, "stream": stream, "priority": -5 if stream == 20 else 0}
        events.append({"ph": "X", "cat": "kernel", "name": name, "ts": 1e3 * start, "dur": 1e3 * (end - start), "args": arguments})
        call = {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "tid": 1, "args": {"correlation": number}}
        events.append(call | {"ts": 1e3 * launched - 10, "dur": 10})
    for name, start in (("Run 0R3", 1.9), ("Run 0F3", 3.5)):
        events.append({"ph": "X", "cat": "user_annotation", "name": name, "ts": 1e3 * start, "dur": 500, "tid": 1})
    return {"traceEvents": events, "distributedInfo": {"rank": 3}}


@pytest.mark.parametrize("suffix", [".json", ".json.gz"])
def test_a_trace_of_torch_profiler(tmp_path, suffix):
    path = tmp_path / f"trace{suffix}"
    with (gzip.open if suffix.endswith("gz") else open)(path, "wt") as file:
        json.dump(profile(), file)
    (rank,) = report.read(path)
    assert rank.name == "rank 3"
    assert figures(rank) == EXPECTED
    assert losses(rank) == pytest.approx(LOSSES)


def nsight(path, pid=77):
    """The tables and columns of an Nsight Systems export that matter here."""
    process, thread = pid << 24, (pid << 24) + 5
    strings = {name: number for number, name in enumerate(sorted({k[2] for k in KERNELS} | {"Run 1R2@1"}))}
    with sqlite3.connect(path) as db:
        db.executescript("""
            create table StringIds (id integer, value text);
            create table CUPTI_ACTIVITY_KIND_KERNEL (start integer, end integer, deviceId integer, streamId integer,
                correlationId integer, globalPid integer, demangledName integer, shortName integer);
            create table CUPTI_ACTIVITY_KIND_RUNTIME (start integer, end integer, globalTid integer, correlationId integer);
            create table NVTX_EVENTS (start integer, end integer, text text, textId integer, globalTid integer);
            create table TARGET_INFO_CUDA_STREAM (streamId integer, processId integer, priority integer);
        """)
        db.executemany("insert into StringIds values (?, ?)", [(number, name) for name, number in strings.items()])
        db.executemany("insert into TARGET_INFO_CUDA_STREAM values (?, ?, ?)", [(7, pid, 0), (20, pid, -5), (7, pid + 1, -5)])
        db.execute("insert into NVTX_EVENTS values (?, ?, null, ?, ?)", (1_900_000, 2_400_000, strings["Run 1R2@1"], thread))
        db.execute("insert into NVTX_EVENTS values (?, ?, 'Run 0F3', null, ?)", (3_500_000, 4_100_000, thread))
        db.execute("insert into NVTX_EVENTS values (?, null, 'mark', null, ?)", (1, thread))
        for number, (start, end, name, stream, launched) in enumerate(KERNELS):
            row = (start * 10**6, end * 10**6, 0, stream, number, process, strings[name], strings[name])
            db.execute("insert into CUPTI_ACTIVITY_KIND_KERNEL values (?, ?, ?, ?, ?, ?, ?, ?)", row)
            call = (launched * 10**6 - 9, launched * 10**6, thread, number)
            db.execute("insert into CUPTI_ACTIVITY_KIND_RUNTIME values (?, ?, ?, ?)", call)
    db.close()


def test_an_nsight_systems_export(tmp_path):
    nsight(tmp_path / "report.sqlite")
    (rank,) = report.read(tmp_path / "report.sqlite")
    assert rank.name == "process 77 device 0"
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


def test_a_database_without_kernels_is_refused(tmp_path):
    with sqlite3.connect(tmp_path / "x.sqlite") as db:
        db.execute("create table StringIds (id integer, value text)")
    db.close()
    with pytest.raises(ValueError, match="no CUDA kernels"):
        report.read(tmp_path / "x.sqlite")
