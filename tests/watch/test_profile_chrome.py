"""Chrome traces as others write them: what can be read is read rightly, the rest is refused in a sentence."""

import gzip
import json

import pytest

from pipehc import report
from pipehc.watch.profiles.model import Hints


def kernel(name, start, end, device=0, stream=7, **more):
    """Times in us, as torch.profiler writes it."""
    arguments = {"device": device, "stream": stream, "context": 1}
    return {
        "ph": "X",
        "cat": "kernel",
        "name": name,
        "pid": device,
        "tid": stream,
        "ts": start,
        "dur": end - start,
        "args": arguments,
    } | more


def copy(name, start, end, cat="gpu_memcpy", **arguments):
    return kernel(name, start, end, cat=cat, args={"device": 0, "stream": 7, "context": 1} | arguments)


def launch(correlation, time):
    return {
        "ph": "X",
        "cat": "cuda_runtime",
        "name": "cudaLaunchKernel",
        "pid": 1,
        "tid": 1,
        "ts": time,
        "args": {"correlation": correlation},
    }


def rows(tmp_path, events, hints=None, **more):
    path = tmp_path / "t.json"
    path.write_text(json.dumps(events if more.pop("bare", False) else {"schemaVersion": 1, "traceEvents": events} | more))
    return report.read(path, hints)


def losses(rank):
    return {loss.why: pytest.approx(loss.ms) for loss in rank.losses if loss.ms > 1e-9}


GEMMS = [kernel("gemm", 0, 1000), kernel("gemm", 2000, 3000)]


def figures(rank):
    return tuple(round(x, 6) for x in (rank.total, rank.compute, rank.communication, rank.exposed, rank.copies, rank.bubble))


def test_a_notify_kernel_is_communication(tmp_path):
    """shared/cases: deepep_notify.json."""
    name = "void dpsk::ep::internode::cached_notify<1>(x)"
    (rank,) = rows(tmp_path, [*GEMMS, kernel(name, 1000, 2000, stream=20)])
    assert figures(rank) == (3, 2, 1, 1, 0, 0)
    assert [(m.name, m.count, m.ms) for m in rank.messages] == [("dpsk::ep::internode::cached_notify", 1, 1)]


def test_kernels_that_communicate_at_once_are_counted_once(tmp_path):
    name = "ncclDevKernel_SendRecv(x)"
    (rank,) = rows(tmp_path, [*GEMMS, kernel(name, 1000, 2000, stream=20), kernel(name, 1000, 2000, stream=21)])
    assert figures(rank) == (3, 2, 1, 1, 0, 0)
    assert [(m.count, m.ms) for m in rank.messages] == [(2, 1)]
    assert losses(rank) == {"ncclDevKernel_SendRecv ran with nothing to compute beside it": 1}


def test_a_copy_is_neither_idle_nor_a_wait(tmp_path):
    """shared/cases: memcpy.json."""
    (rank,) = rows(
        tmp_path, [kernel("gemm", 0, 1000), copy("Memcpy HtoD (Pinned -> Device)", 1000, 6000), kernel("gemm", 6000, 7000)]
    )
    assert figures(rank) == (7, 2, 0, 0, 5, 0)
    assert losses(rank) == {"Memcpy HtoD ran with nothing to compute beside it": 5}


@pytest.mark.parametrize(
    ("event", "copies", "exposed"),
    [
        (copy("Memset (Device)", 1000, 2000, cat="gpu_memset"), 1, 0),
        (copy("Memset (Device)", 1000, 2000, cat="Memset"), 1, 0),
        (copy("Memcpy DtoH (Device -> Pageable)", 1000, 2000, cat="Memcpy"), 1, 0),
        (copy("Memcpy DtoD (Device -> Device)", 1000, 2000), 1, 0),
        (copy("Memcpy PtoP (Device -> Device)", 1000, 2000), 0, 1),
        (copy("Memcpy DtoD (Device -> Device)", 1000, 2000, fromDevice=0, inDevice=0, toDevice=1), 0, 1),
        (copy("Memcpy DtoD (Device -> Device)", 1000, 2000, fromDevice=0, inDevice=0, toDevice=0), 1, 0),
        (copy("Memcpy HtoD (Pinned -> Device)", 500, 1500), 0.5, 0),  # the other half is hidden
    ],
)
def test_copies_and_memsets(tmp_path, event, copies, exposed):
    (rank,) = rows(tmp_path, [*GEMMS, event])
    assert (rank.copies, rank.exposed) == pytest.approx((copies, exposed))
    assert rank.compute + rank.exposed + rank.copies + rank.bubble == pytest.approx(rank.total) == 3
    assert rank.bubble == pytest.approx(1 - copies - exposed)


def test_a_copy_between_devices_belongs_to_the_device_that_makes_it(tmp_path):
    event = copy("Memcpy PtoP (Device -> Device)", 0, 1000) | {"pid": 1}
    event["args"] = {"fromDevice": 1, "inDevice": 1, "toDevice": 0, "stream": 7}
    first, second = rows(tmp_path, [*GEMMS, event])
    assert (first.communication, second.communication) == (0, 1)


def test_devices_are_a_row_each(tmp_path):
    """shared/cases: twodev.json."""
    events = [
        kernel("gemm", 0, 1000), kernel("ncclDevKernel_AllReduce(x)", 1000, 2000, stream=20), kernel("gemm", 1000, 2000, device=1),
        kernel("gemm", 2000, 2100),
    ]  # fmt: skip
    first, second = rows(tmp_path, events)
    assert [first.name, second.name] == ["t.json device 0", "t.json device 1"]
    assert (figures(first), figures(second)) == ((2.1, 1.1, 1, 1, 0, 0), (1, 1, 0, 0, 0, 0))


def test_streams_of_high_priority_are_those_of_their_device(tmp_path):
    events = [launch(n, 0) for n in range(4)]
    for device, priority in ((0, -1), (1, 0)):
        for n, (stream, start) in enumerate(((7, 100), (20, 1100))):
            arguments = {
                "device": device,
                "stream": stream,
                "correlation": 2 * device + n,
                "priority": priority if stream == 20 else 0,
            }
            events.append(kernel("gemm", start, start + 1000, device) | {"args": arguments})
    assert [rank.high_delay for rank in rows(tmp_path, events)] == pytest.approx([1, 0])


@pytest.mark.parametrize("info", [None, {}, [], "x", {"rank": None}, {"rank": "two"}, {"rank": [1]}])
def test_a_rank_that_is_not_said_is_named_after_the_file(tmp_path, info):
    """shared/cases: distnull.json."""
    (rank,) = rows(tmp_path, GEMMS, distributedInfo=info)
    assert rank.name == "t.json" and rank.compute == 2


@pytest.mark.parametrize("category", ["Kernel", "KERNEL", "kernel"])
def test_categories_of_all_ages(tmp_path, category):
    """shared/cases: Kernelcat.json."""
    (rank,) = rows(tmp_path, [event | {"cat": category} for event in GEMMS])
    assert figures(rank)[:2] == (3, 2)


def test_a_list_of_events(tmp_path):
    """shared/cases: list.json."""
    (rank,) = rows(tmp_path, GEMMS, bare=True)
    assert figures(rank)[:2] == (3, 2)


@pytest.mark.parametrize("duration", [0, "0", 0.0])
def test_a_kernel_that_took_no_time(tmp_path, capsys, duration):
    """shared/cases: zerodur.json."""
    (rank,) = rows(tmp_path, [kernel("gemm", 5, 5) | {"dur": duration}])
    assert figures(rank) == (0, 0, 0, 0, 0, 0)
    assert report.main([str(tmp_path / "t.json")]) == 0
    assert "lost nothing" in capsys.readouterr().out


def test_a_call_without_duration(tmp_path):
    """shared/cases: launchnodur.json."""
    event = kernel("gemm", 5, 8)
    event["args"]["correlation"] = 1
    (rank,) = rows(tmp_path, [launch(1, 0), event])
    assert rank.compute == pytest.approx(0.003)


def without(key, event):
    return {k: v for k, v in event.items() if k != key}


ODD = {
    "no stream": (kernel("odd", 1000, 2000) | {"args": {"device": 0}}, "1 event without a stream"),
    "no args": (without("args", kernel("odd", 1000, 2000)), "1 event without a stream"),
    "args null": (kernel("odd", 1000, 2000) | {"args": None}, "1 event without a stream"),
    "no duration": (without("dur", kernel("odd", 1000, 2000)), "1 event without a duration"),
    "no time": (without("ts", kernel("odd", 1000, 2000)), "1 event without a time"),
    "negative": (kernel("odd", 1000, 2000) | {"dur": -5}, "1 event with a duration that is none"),
    "NaN": (kernel("odd", 1000, 2000) | {"dur": float("nan")}, "1 event with a duration that is none"),
    "infinite": (kernel("odd", 1000, 2000) | {"dur": float("inf")}, "1 event with a duration that is none"),
    "huge": (kernel("odd", 1000, 2000) | {"dur": 1e300}, "1 event with a duration that is none"),
    "huge integer": (kernel("odd", 1000, 2000) | {"dur": 10**400}, "1 event with a duration that is none"),
    "text": (kernel("odd", 1000, 2000) | {"dur": "long"}, "1 event with a duration that is none"),
    "a list": (kernel("odd", 1000, 2000) | {"dur": [1]}, "1 event with a duration that is none"),
    "no object": ("kernel", "1 event not an object"),
}


@pytest.mark.parametrize("event, said", ODD.values(), ids=ODD)
def test_events_that_cannot_be_read_are_left_out_with_a_word_or_are_the_end(tmp_path, capsys, event, said):
    """shared/cases: nostream.json, nodur.json. Alone: exit code 2; among others the rest is read."""
    (rank,) = rows(tmp_path, [*GEMMS, event])
    assert figures(rank)[:2] == (3, 2) and rank.notes == (f"t.json: left out: {said}",)
    assert report.main([str(tmp_path / "t.json")]) == 0
    assert f"left out: {said}" in capsys.readouterr().out
    (tmp_path / "alone.json").write_text(json.dumps({"traceEvents": [event]}))
    assert report.main([str(tmp_path / "alone.json")]) == 2
    captured = capsys.readouterr()
    assert (
        captured.out == ""
        and captured.err.count("\n") == 1
        and "alone.json: holds no GPU kernels" in captured.err
        and said in captured.err
    )


def test_numbers_written_as_text_are_numbers(tmp_path):
    events = [event | {"ts": str(event["ts"]), "dur": str(event["dur"]), "args": {"device": "0", "stream": "7"}} for event in GEMMS]
    (rank,) = rows(tmp_path, events)
    assert figures(rank)[:2] == (3, 2) and rank.notes == ()


def test_times_since_1970_keep_their_fractions(tmp_path):
    zero = 1.7e15
    (rank,) = rows(tmp_path, [event | {"ts": event["ts"] + zero} for event in [kernel("a", 0, 1), kernel("b", 2, 3)]])
    assert (rank.total, rank.compute) == pytest.approx((0.003, 0.002), abs=1e-9)


def test_what_may_be_communication_is_said(tmp_path):
    events = [*GEMMS, kernel("peer_push(x)", 1000, 2000)]
    (rank,) = rows(tmp_path, events)
    assert rank.compute == 3 and "peer_push (1.0 ms)" in rank.notes[0] and "--communication" in rank.notes[0]
    import re

    (rank,) = rows(tmp_path, events, Hints(communication=re.compile("push")))
    assert figures(rank) == (3, 2, 1, 1, 0, 0) and rank.notes == ()


def test_a_gzip_by_what_it_is_not_by_its_name(tmp_path):
    text = json.dumps({"traceEvents": GEMMS}).encode()
    (tmp_path / "a.json").write_bytes(gzip.compress(text))
    (tmp_path / "b.json.gz").write_bytes(text)
    (tmp_path / "c.json").write_bytes(b"\xef\xbb\xbf" + text)
    assert [report.read(tmp_path / name)[0].compute for name in ("a.json", "b.json.gz", "c.json")] == [2, 2, 2]


CUT = json.dumps({"traceEvents": GEMMS}).encode()
BROKEN = {
    "cut gzip": ("x.json.gz", gzip.compress(CUT)[:-20], "is a gzip file that is cut off or damaged"),
    "cut early": ("x.json.gz", gzip.compress(CUT)[:9], "is a gzip file that is cut off or damaged"),
    "damaged gzip": ("x.json.gz", gzip.compress(CUT)[:30] + b"\0" * 40, "is a gzip file that is cut off or damaged"),
    "no gzip": ("x.json.gz", b"hello", "is neither JSON nor SQLite"),
    "empty": ("x.json", b"", "is empty"),
    "empty database": ("x.sqlite", b"", "is empty"),
    "cut JSON": ("x.json", CUT[:-30], "x.json: is JSON that was cut off"),
    "cut in a word": ("x.json", CUT[:60], "x.json: is JSON that was cut off"),
    "no JSON": ("x.json", b"\x00\x01\x02\xff", "is neither JSON nor SQLite"),
    "deep": ("x.json", b"[" * 200_000, "x.json: is "),
    "number": ("x.json", b"12", "neither a Chrome trace"),
    "null": ("x.json", b"null", "neither a Chrome trace"),
    "list": ("x.json", b"[1, 2]", "neither a Chrome trace"),
    "no events": ("x.json", b"[]", "neither a Chrome trace"),
    "object": ("x.json", b'{"a": 1}', "neither a Chrome trace"),
    "events null": ("x.json", b'{"traceEvents": null}', "its traceEvents are no list, but NoneType"),
    "events an object": ("x.json", b'{"traceEvents": {"a": 1}}', "its traceEvents are no list, but dict"),
    "no kernels": ("x.json", b'{"traceEvents": [{"ph": "X", "cat": "cpu_op", "ts": 0, "dur": 1}]}', "holds no GPU kernels"),
    "a report itself": ("x.nsys-rep", b"abc", "nsys export --type sqlite"),
}


@pytest.mark.parametrize("name, content, said", BROKEN.values(), ids=BROKEN)
def test_broken_files_are_refused_in_a_sentence(tmp_path, capsys, name, content, said):
    """shared/cases: trunc.json.gz."""
    (tmp_path / name).write_bytes(content)
    assert report.main([str(tmp_path / name)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1 and said in captured.err


def test_a_folder_is_no_file(tmp_path, capsys):
    assert report.main([str(tmp_path)]) == 2
    assert "is a folder, not a file" in capsys.readouterr().err
