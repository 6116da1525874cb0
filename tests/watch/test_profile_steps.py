"""A trace with several ProfilerSteps is cut into steps: every ms belongs to one of them."""

import json

import pytest

from pipehc import report


def step(number, start, end, cat="user_annotation"):
    return {"ph": "X", "cat": cat, "name": f"ProfilerStep#{number}", "pid": 1, "tid": 1, "ts": start, "dur": end - start}


def work(name, launched, start, end, stream=7, correlation=None, **more):
    """A kernel and the call that launched it, in us; correlation None: of no known call."""
    event = {"ph": "X", "cat": "kernel", "name": name, "pid": 0, "tid": stream, "ts": start, "dur": end - start} | more
    event["args"] = {"device": 0, "stream": stream} | ({} if correlation is None else {"correlation": correlation})
    call = {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "pid": 1, "tid": 1, "ts": launched - 1, "dur": 1}
    return [event] if correlation is None else [event, call | {"args": {"correlation": correlation}}]


# The host is ahead: it ends step 4 at 1 ms, while the device is at it until 4 ms, and loads data for step 5 meanwhile.
EVENTS = [
    step(4, 0, 1000),
    step(5, 1000, 2500),
    *work("warm", -500, -400, -100, correlation=0),
    *work("gemm", 100, 1000, 3000, correlation=1),
    *work("ncclDevKernel_AllReduce(x)", 900, 3000, 4000, stream=20, correlation=2),
    *work("Memcpy HtoD (Pinned -> Device)", 1100, 1500, 2000, stream=30, correlation=3, cat="gpu_memcpy"),
    *work("gemm", 1500, 4500, 6000, correlation=4),
    *work("after", 9000, 9100, 9200, correlation=5),
]


def write(tmp_path, events, name="t.json", **more):
    (tmp_path / name).write_text(json.dumps({"traceEvents": events} | more))
    return tmp_path / name


def test_steps_are_cut_where_the_device_begins_them(tmp_path):
    four, five = report.read(write(tmp_path, EVENTS, distributedInfo={"rank": 3}))
    assert [rank.name for rank in (four, five)] == ["step 4 rank 3", "step 5 rank 3"] and (four.step, five.step) == (4, 5)
    # Step 4 from its first gemm to that of step 5: the device idles for 0.5 ms of it.
    assert (four.total, four.compute, four.exposed, four.bubble) == pytest.approx((3.5, 2, 1, 0.5))
    assert (five.total, five.compute, five.exposed) == pytest.approx((1.5, 1.5, 0))
    assert {loss.why: loss.ms for loss in four.losses if loss.ms > 1e-9} == pytest.approx(
        {"ncclDevKernel_AllReduce ran with nothing to compute beside it": 1, "the device was idle: gemm waited for an event": 0.5}
    )
    assert [(m.name, m.count) for m in four.messages] == [("ncclDevKernel_AllReduce", 1)] and five.messages == ()
    assert four.notes == ("rank 3: left out: 0.4 ms of work outside of every ProfilerStep",)


def test_one_step_alone(tmp_path):
    (rank,) = report.read(write(tmp_path, [event for event in EVENTS if event["name"] != "ProfilerStep#5"]))
    assert rank.name == "step 4 t.json" and rank.total == pytest.approx(3)


def test_without_launches_the_devices_own_ranges_cut(tmp_path):
    events = [
        step(1, 0, 10, "user_annotation"), step(1, 1000, 2000, "gpu_user_annotation"), step(2, 2000, 3500, "gpu_user_annotation"),
        *work("gemm", 0, 1000, 2000), *work("gemm", 0, 2000, 3000),
    ]  # fmt: skip
    assert [(rank.step, rank.total) for rank in report.read(write(tmp_path, events))] == [(1, 1), (2, 1)]


@pytest.mark.parametrize("odd", [{"dur": None}, {"dur": "x"}, {"dur": -1}])
def test_a_step_whose_end_is_not_known_lasts_until_the_next(tmp_path, odd):
    events = [step(4, 0, 1000) | odd, *EVENTS[1:]]
    assert [rank.step for rank in report.read(write(tmp_path, events))] == [4, 5]


def test_a_trace_without_steps_is_one_row(tmp_path):
    (rank,) = report.read(write(tmp_path, EVENTS[2:]))
    assert rank.step is None and rank.name == "t.json"


def test_the_command_line_chooses_steps(tmp_path, capsys):
    path = str(write(tmp_path, EVENTS))
    for chosen, there in (("4", {4}), ("5", {5}), ("4-5", {4, 5}), ("5,4", {4, 5}), ("1-4", {4})):
        assert report.main([path, "--step", chosen, "--json"]) == 0
        assert {rank["step"] for rank in json.loads(capsys.readouterr().out)} == there
    assert report.main([path]) == 0
    out = capsys.readouterr().out
    assert "step 4 t.json lost " in out and "step 5 t.json lost " in out and "note: t.json: left out: 0.4 ms" in out
    assert "step 4 t.json counted as communication: ncclDevKernel_AllReduce 1.0 ms (1)" in out


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        ("6", "--step: no such step; there are 4, 5"),
        ("x", "--step x: must be a step, a range"),
        ("", "--step : must be a step"),
        ("5-4", "--step 5-4: must be"),
        ("1-99999999", "--step 1-99999999: must be"),
        ("-1", "--step -1: must be"),
    ],
)
def test_steps_that_are_not_there(tmp_path, capsys, chosen, said):
    path = str(write(tmp_path, EVENTS))
    assert report.main([path, "--step", chosen]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and said in captured.err


def test_a_trace_without_steps_has_none_to_choose(tmp_path, capsys):
    assert report.main([str(write(tmp_path, EVENTS[2:])), "--step", "4"]) == 2
    assert "the files do not number their steps" in capsys.readouterr().err


def test_rows_of_one_name_in_several_files_are_told_apart(tmp_path, capsys):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    paths = [str(write(tmp_path / folder, EVENTS, distributedInfo={"rank": 0})) for folder in ("a", "b")]
    assert report.main([*paths, "--json"]) == 0
    names = [rank["name"] for rank in json.loads(capsys.readouterr().out)]
    assert names == [f"{path} step {number} rank 0" for path in paths for number in (4, 5)]
