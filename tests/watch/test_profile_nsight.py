"""Exports of Nsight Systems: the same work as in the trace of torch.profiler, and what exports of all versions may lack."""

import sqlite3

import pytest
from gpu_traces import EXPECTED, KERNELS, LOSSES, figures, losses

from pipehc import report


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


def test_a_database_without_kernels_is_refused(tmp_path):
    with sqlite3.connect(tmp_path / "x.sqlite") as db:
        db.execute("create table StringIds (id integer, value text)")
    db.close()
    with pytest.raises(ValueError, match="no CUDA kernels"):
        report.read(tmp_path / "x.sqlite")


def copies(path, rows=((1, 0, 0), (8, 0, 1), (8, 0, 0), (10, None, None)), kernels=True):
    """Two kernels of 10 ms, and between them, 10 ms each, copies (kind, from device, to device) and a memset."""
    with sqlite3.connect(path) as db:
        db.executescript("""
            create table StringIds (id integer, value text);
            insert into StringIds values (1, 'gemm');
            create table CUPTI_ACTIVITY_KIND_KERNEL (start, end, deviceId, streamId, correlationId, globalPid, shortName);
            create table CUPTI_ACTIVITY_KIND_MEMCPY (start, end, deviceId, streamId, copyKind, srcDeviceId, dstDeviceId);
            create table CUPTI_ACTIVITY_KIND_MEMSET (start, end, deviceId, streamId);
        """)
        ends = (0, 10 * (len(rows) + 2)) if kernels else ()
        for start in ends:
            db.execute(
                "insert into CUPTI_ACTIVITY_KIND_KERNEL values (?, ?, 0, 7, 1, null, 1)", (start * 10**6, (start + 10) * 10**6)
            )
        for number, row in enumerate(rows, start=1):
            times = number * 10**7, (number + 1) * 10**7
            db.execute("insert into CUPTI_ACTIVITY_KIND_MEMCPY values (?, ?, 0, 7, ?, ?, ?)", (*times, *row))
        last = (len(rows) + 1) * 10**7
        db.execute("insert into CUPTI_ACTIVITY_KIND_MEMSET values (?, ?, 0, 7)", (last, last + 10**7))
    db.close()
    return path


def test_copies_and_memsets_are_activity_and_copies_between_devices_communicate(tmp_path):
    """Columns that old exports have not are missing here: launches, processes, demangled names."""
    (rank,) = report.read(copies(tmp_path / "a b#1.sqlite"))
    assert rank.name == "process 0 device 0"
    assert (rank.total, rank.compute, rank.exposed, rank.copies) == pytest.approx((70, 20, 20, 30))
    assert rank.bubble == pytest.approx(0)
    assert [(m.name, m.count) for m in rank.messages] == [("Memcpy DtoD", 1), ("Memcpy PtoP", 1)]


def test_copies_alone_are_work(tmp_path):
    (rank,) = report.read(copies(tmp_path / "x.sqlite", ((1, 0, 0),), kernels=False))
    assert (rank.total, rank.compute, rank.copies) == pytest.approx((20, 0, 20))


def test_any_name_of_a_database(tmp_path):
    copies(tmp_path / "report.db")
    (tmp_path / "report.db").rename(tmp_path / "report")
    assert report.read(tmp_path / "report")[0].compute == pytest.approx(20)


def test_rows_that_cannot_be_read_are_left_out_with_a_word(tmp_path):
    path = copies(tmp_path / "x.sqlite")
    with sqlite3.connect(path) as db:
        for row in ((None, 5, 0, 7), (5, None, 0, 7), ("x", 5, 0, 7), (9, 5, 0, 7), (5, 9, 0, None), (5, 9, None, 7)):
            db.execute("insert into CUPTI_ACTIVITY_KIND_KERNEL values (?, ?, ?, ?, null, null, 99)", row)
        db.execute("insert into CUPTI_ACTIVITY_KIND_KERNEL values (0, 1000000, 0, 8, 'x', 'y', 99)")
    db.close()
    (rank,) = report.read(path)
    assert rank.compute == pytest.approx(20)
    assert rank.notes == ("x.sqlite: rows without a time (4), without a stream or a device (2)",)


def test_whole_graphs_count_as_computation_and_that_is_said(tmp_path):
    path = copies(tmp_path / "x.sqlite")
    with sqlite3.connect(path) as db:
        db.execute("create table CUPTI_ACTIVITY_KIND_GRAPH_TRACE (start, end, deviceId, streamId, correlationId, globalPid)")
        db.execute("insert into CUPTI_ACTIVITY_KIND_GRAPH_TRACE values (60000000, 90000000, 0, 7, 5, null)")
    db.close()
    (rank,) = report.read(path)
    assert rank.compute == pytest.approx(40) and "--cuda-graph-trace=node" in rank.notes[0]


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("create table CUPTI_ACTIVITY_KIND_KERNEL (a, b)", "holds no CUDA kernels"),
        (
            "create table CUPTI_ACTIVITY_KIND_KERNEL (start, end); insert into CUPTI_ACTIVITY_KIND_KERNEL values (1, 2)",
            "no CUDA kernels",
        ),
        ("create table CUPTI_ACTIVITY_KIND_KERNEL (start, end, streamId, deviceId)", "holds no CUDA kernels"),
        ("create table x (a)", "holds no CUDA kernels"),
    ],
)
def test_databases_without_work_are_refused_in_a_sentence(tmp_path, capsys, script, said):
    with sqlite3.connect(tmp_path / "x.sqlite") as db:
        db.executescript(script)
    db.close()
    assert report.main([str(tmp_path / "x.sqlite")]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and said in captured.err


@pytest.mark.parametrize("keep", [20, 100, 1000, 5000])
def test_a_database_that_was_cut_off(tmp_path, capsys, keep):
    copies(tmp_path / "x.sqlite")
    (tmp_path / "x.sqlite").write_bytes((tmp_path / "x.sqlite").read_bytes()[:keep])
    assert report.main([str(tmp_path / "x.sqlite")]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and captured.err.startswith("error: ")
